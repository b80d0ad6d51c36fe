"""Greedy generation with components removed, at every position of the prompt and of what is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError, ModelError, noting
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks, TokenIds
from circuitkit.core.token_sets import TokenSets
from circuitkit.engine.base import removed_by
from circuitkit.engine.packed.layout import Edits, Layout
from circuitkit.engine.packed.memory import RowBudget, in_slices
from circuitkit.engine.packed.packed_pass import PackedPass
from circuitkit.engine.packed.replacements import Collected, Replacements, collected
from circuitkit.engine.packed.work import Work
from circuitkit.models.cache import new_cache
from circuitkit.models.hooked import HookedModel, Visit
from circuitkit.patchers.base import Patcher


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        tokens: For each mask and prompt the new tokens; where the end-of-text token came, it and all behind it are -1.
        ended: Whether it came.
    """

    tokens: Int[Tensor, "mask prompt new"]
    ended: Bool[Tensor, "mask prompt"]

    def text(self, mask: int, prompt: int, decode: Callable[[list[int]], str], n_tokens: int) -> str:
        """One of them as text, up to a number of tokens."""
        tokens = self.tokens[mask, prompt, :n_tokens]
        return decode(tokens[tokens >= 0].tolist())


def generate(
    model: HookedModel,
    ids: TokenIds,
    masks: Masks,
    patcher: Patcher,
    corrupt_ids: TokenIds | None = None,
    *,
    max_new_tokens: int,
    groups: Int[Tensor, " prompt"] | None = None,
    use_cache: bool = True,
    max_rows: int | None = None,
) -> Generated:
    """Continues prompts greedily, each under every mask; rows of a pass are masks x prompts.

    A removed component is replaced by what the patcher says at every position. Where the patcher asks for a corrupt run or its mean, a
    position of the prompt takes the value of the same position, and a generated one that of the prompt's last position: corrupt prompts
    have nothing behind it, and there a clean prompt too is about to be answered.

    Args:
        model: The model.
        ids: Prompts of equal length.
        masks: One row per mask over ``model.universe``; True = left as it is.
        patcher: What removed components are replaced by.
        corrupt_ids: The corrupt twins, of the same length; needed by patchers that ask for a corrupt run.
        max_new_tokens: How many tokens to generate at most. A pass ends early when every row has come to its end-of-text token.
        groups: Template of each prompt, for means by group; None for one template.
        use_cache: Keep keys and values. Without, every step computes all positions anew: slow, with the same result.
        max_rows: Bound on the rows of a pass; None for what the free memory allows.

    Raises:
        MeasurementError: The patcher needs corrupt prompts and there are none, or of another length; or conditional means.
    """
    _check(model, ids, max_new_tokens)
    # Most of what a row takes in a large model are the keys and values that it keeps.
    kept = 2 * model.n_layers * model.n_kv_heads * model.d_head * (ids.shape[1] + max_new_tokens) * model.dtype.itemsize
    budget = RowBudget(model, ids.shape[1] + max_new_tokens, max_rows, held=kept)
    untouched = bool(masks.all())
    prompts = _prompts(ids, ids if untouched else corrupt_ids, groups, patcher)
    sources = Collected() if untouched else collected(model, prompts, patcher.needs, budget, Work())
    replacements, layout = Replacements(model, prompts, patcher, sources), Layout(model.universe, prompts)

    n_masks, n_prompts = len(masks), len(ids)
    tokens = torch.full((n_masks * n_prompts, max_new_tokens), -1)

    def run(part: slice) -> Int[Tensor, "row new"]:
        rows = torch.arange(part.start, part.stop)
        chosen, which = masks[rows // n_prompts], rows % n_prompts

        def visit(going: Int[Tensor, " row"], first: int, end: int) -> Visit | None:
            if chosen[going].all():
                return None
            values = replacements.at(which[going], torch.arange(first, end).clamp(max=prompts.n_pos - 1))
            # Nothing is skipped: an attention whose keys and values were missing would move the positions of those that come.
            return PackedPass(model, Edits.by_row(layout, chosen[going]), values, slice(0, len(going)), skip=False)

        with noting(
            lambda: f"while generating from prompts {which.tolist()[:8]} under the masks of places {(rows // n_prompts).tolist()[:8]}, "
            f"the first of which removes {removed_by(chosen[0], model.universe)}"
        ):
            return _continued(model, ids[which], visit, max_new_tokens, use_cache)

    for part, new in in_slices(len(tokens), run, budget):
        tokens[part] = new
    tokens = tokens.view(n_masks, n_prompts, max_new_tokens)
    return Generated(tokens, (tokens < 0).any(-1))


def _continued(
    model: HookedModel,
    ids: TokenIds,
    visit: Callable[[Int[Tensor, " row"], int, int], Visit | None],
    max_new_tokens: int,
    use_cache: bool,
) -> Int[Tensor, "row new"]:
    """The tokens that each row continues with. Rows that have ended are not computed any further.

    Args:
        model: The model.
        ids: The prompt of each row.
        visit: What to do in a pass over some of the rows, from one position to another.
        max_new_tokens: How many at most.
        use_cache: Keep keys and values.
    """
    n_pos, end_of_text = ids.shape[1], _end_of_text(model)
    tokens = torch.full((len(ids), max_new_tokens), -1)
    cache = new_cache(model) if use_cache and model.map.caches else None
    inputs: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    seen, rows = ids, torch.arange(len(ids))
    for new in range(max_new_tokens):
        first = 0 if cache is None or new == 0 else n_pos + new - 1
        logits = model.run(seen[:, first:], visit(rows, first, n_pos + new), **inputs)
        assert logits is not None
        chosen = logits[:, -1].float().argmax(-1).cpu()
        going = (~torch.isin(chosen, end_of_text)).nonzero().flatten()
        rows, chosen = rows[going], chosen[going]
        tokens[rows, new] = chosen
        if not len(rows):
            break
        if cache is not None and len(rows) < len(seen):
            cache.batch_select_indices(going)
        seen = torch.cat([seen[going], chosen[:, None]], 1)
    return tokens


def _end_of_text(model: HookedModel) -> Int[Tensor, " token"]:
    found = [getattr(part, "eos_token_id", None) for part in (getattr(model.hf, "generation_config", None), model.tokenizer)]
    tokens = {token for each in found for token in (each if isinstance(each, list) else [each]) if token is not None}
    return torch.tensor(sorted(tokens), dtype=torch.long)


def _check(model: HookedModel, ids: TokenIds, max_new_tokens: int) -> None:
    limit = model.n_ctx
    if not model.map.causal:
        raise ModelError(
            f"{model.name} ({model.map.family}) cannot generate: its positions read later ones. Score prompts with known answers instead."
        )
    if max_new_tokens < 1 or (limit is not None and ids.shape[1] + max_new_tokens > limit + 1):
        raise MeasurementError(
            f"A prompt of {ids.shape[1]} tokens can be continued by at least 1 and, in this model, at most "
            f"{'any number of' if limit is None else max(0, limit + 1 - ids.shape[1])} tokens; found max_new_tokens={max_new_tokens}. "
            "Set it within these bounds, or take shorter prompts."
        )


def _prompts(ids: TokenIds, corrupt_ids: TokenIds | None, groups: Int[Tensor, " prompt"] | None, patcher: Patcher) -> PromptSet:
    """The prompts with their twins. Nothing is asked of a single token, so there are no answers."""
    none = TokenSets.none(len(ids))
    groups = torch.zeros(len(ids), dtype=torch.long) if groups is None else groups
    if patcher.needs.source == "none":
        return PromptSet(ids, ids, none, none, groups)
    if corrupt_ids is None:
        raise MeasurementError(
            f"{type(patcher).__name__} takes its values from corrupt prompts, and there are none. Give corrupt_ids, or use patcher=zero."
        )
    if corrupt_ids.shape != ids.shape:
        raise MeasurementError(
            "A corrupt prompt must have as many tokens as its clean one, because values are taken position by position; found tables of "
            f"{tuple(corrupt_ids.shape)} and {tuple(ids.shape)}. Give corrupt prompts of that length, or use patcher=zero."
        )
    if patcher.needs.conditional:
        raise MeasurementError("Conditional means are not taken during generation. Use patcher.means=plain, or another patcher.")
    return PromptSet(ids, corrupt_ids, none, none, groups)
