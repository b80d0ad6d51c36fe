"""Greedy generation with components removed, at every position of the prompt and of what is generated."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks, TokenIds
from circuitkit.core.token_sets import TokenSets
from circuitkit.engine.packed.memory import RowBudget, free_room, row_bytes, within_memory
from circuitkit.engine.packed.replacements import Collected, Collector, entries
from circuitkit.models.cache import new_cache
from circuitkit.models.hooked import HookedModel, Layer, Visit
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
    budget = _budget(model, ids.shape[1] + max_new_tokens, max_rows)
    untouched = bool(masks.all())
    prompts = _prompts(ids, ids if untouched else corrupt_ids, groups, patcher)
    collected = Collected() if untouched else _collected(model, prompts, patcher, budget)
    values, entry = _Values(patcher, collected, prompts.n_pos), entries(patcher.needs, prompts)

    n_masks, n_prompts = len(masks), len(ids)
    tokens = torch.full((n_masks * n_prompts, max_new_tokens), -1)

    def run(rows: Int[Tensor, " row"]) -> Int[Tensor, "row new"]:
        edits = _Edits(model, values, masks[rows // n_prompts], entry[rows % n_prompts])
        return _continued(model, ids[rows % n_prompts], edits, max_new_tokens, use_cache)

    packs = torch.arange(n_masks * n_prompts).split(budget.rows)
    for rows, new in within_memory(packs, run, budget, lambda rows: rows.split(budget.rows)):
        tokens[rows] = new
    tokens = tokens.view(n_masks, n_prompts, max_new_tokens)
    return Generated(tokens, (tokens < 0).any(-1))


class _Values:
    """What removed components are replaced by. Values of patchers that do not read the activation are made once and kept."""

    def __init__(self, patcher: Patcher, collected: Collected, n_pos: int) -> None:
        self._patcher = patcher
        self._sources = {True: collected.heads, False: {layer: act.unsqueeze(-2) for layer, act in collected.mlps.items()}}
        self._made: dict[tuple[Node, ...], Tensor] = {}
        self.n_pos = n_pos

    def at(
        self, sites: tuple[Node, ...], act: Float[Tensor, "row pos site d"], entry: Int[Tensor, " row"], positions: Int[Tensor, " pos"]
    ) -> Float[Tensor, "row pos site d"]:
        """The values for some components of a layer, given what they compute now, where each row finds its source, and positions."""
        source = self._sources[sites[0].kind is Kind.HEAD].get(sites[0].layer)
        if self._patcher.reads_activation:
            return self._patched(sites, act, None if source is None else source[entry[:, None], positions])
        if sites not in self._made:
            shape = (1, self.n_pos, *act.shape[2:]) if source is None else source.shape
            self._made[sites] = self._patched(sites, act.new_zeros(()).expand(shape), source)
        made = self._made[sites]
        return made[(entry if len(made) > 1 else torch.zeros_like(entry))[:, None], positions]

    def _patched(self, sites: tuple[Node, ...], act: Tensor, source: Tensor | None) -> Tensor:
        parts = [None if source is None else source[..., place, :] for place in range(len(sites))]
        made = [self._patcher.value(act[..., place, :], part, site) for place, (part, site) in enumerate(zip(parts, sites, strict=True))]
        return torch.stack(made, -2)


class _Edits:
    """Replaces outputs in the passes of some rows, each with its own mask and source."""

    def __init__(self, model: HookedModel, values: _Values, masks: Masks, entry: Int[Tensor, " row"]) -> None:
        self._values = values
        self._entry = entry
        self._keep = masks.view(len(masks), model.n_layers, -1)
        self._sites = [tuple(Node.of_head(layer, head) for head in range(model.n_heads)) for layer in range(model.n_layers)]
        self._positions = torch.arange(0)

    def take(self, rows: Int[Tensor, " some"]) -> _Edits:
        """The same for some of the rows."""
        other = copy(self)
        other._entry, other._keep = self._entry[rows], self._keep[rows]
        return other

    def at(self, first: int, end: int) -> Visit | None:
        """What to do at each layer of a pass over these positions."""
        self._positions = torch.arange(first, end).clamp(max=self._values.n_pos - 1)
        return None if self._keep.all() else self._visit

    def _visit(self, layer: Layer) -> None:
        heads, mlp = self._keep[:, layer.index, :-1], self._keep[:, layer.index, -1:]
        if not heads.all():
            layer.z = self._edited(self._sites[layer.index], layer.z, heads)
        if not mlp.all():
            layer.mlp_out = self._edited((Node.of_mlp(layer.index),), layer.mlp_out.unsqueeze(-2), mlp).squeeze(-2)

    def _edited(self, sites: tuple[Node, ...], act: Tensor, keep: Bool[Tensor, "row site"]) -> Tensor:
        value = self._values.at(sites, act, self._entry, self._positions).to(act.device)
        return torch.where(keep[:, None, :, None].to(act.device), act, value)


def _continued(model: HookedModel, ids: TokenIds, edits: _Edits, max_new_tokens: int, use_cache: bool) -> Int[Tensor, "row new"]:
    """The tokens that each row continues with. Rows that have ended are not computed any further."""
    n_pos, end_of_text = ids.shape[1], _end_of_text(model)
    tokens = torch.full((len(ids), max_new_tokens), -1)
    cache = new_cache(model) if use_cache else None
    inputs: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    seen, rows = ids, torch.arange(len(ids))
    for new in range(max_new_tokens):
        first = 0 if cache is None or new == 0 else n_pos + new - 1
        logits = model.run(seen[:, first:], edits.at(first, n_pos + new), **inputs)
        assert logits is not None
        chosen = logits[:, -1].float().argmax(-1).cpu()
        going = (~torch.isin(chosen, end_of_text)).nonzero().flatten()
        rows, chosen = rows[going], chosen[going]
        tokens[rows, new] = chosen
        if not len(rows):
            break
        if cache is not None and len(rows) < len(seen):
            cache.batch_select_indices(going)
        seen, edits = torch.cat([seen[going], chosen[:, None]], 1), edits.take(going)
    return tokens


def _end_of_text(model: HookedModel) -> Int[Tensor, " token"]:
    found = [getattr(part, "eos_token_id", None) for part in (model.hf.generation_config, model.tokenizer)]
    tokens = {token for each in found for token in (each if isinstance(each, list) else [each]) if token is not None}
    return torch.tensor(sorted(tokens), dtype=torch.long)


def _collected(model: HookedModel, prompts: PromptSet, patcher: Patcher, budget: RowBudget) -> Collected:
    """The one run over the corrupt prompts, where the patcher asks for it."""
    if patcher.needs.source == "none":
        return Collected()
    collector = Collector(model, prompts, patcher.needs)

    def split(rows: slice) -> list[slice]:
        return [slice(first, min(first + budget.rows, rows.stop)) for first in range(rows.start, rows.stop, budget.rows)]

    for _ in within_memory(split(slice(0, len(prompts))), collector.add, budget, split):
        pass
    return collector.collected()


def _budget(model: HookedModel, n_pos: int, max_rows: int | None) -> RowBudget:
    """Rows of a pass; the keys and values that a row keeps count too, which are most of what it takes in a large model."""
    kept = 2 * model.n_layers * model.n_kv_heads * model.d_head * n_pos * model.dtype.itemsize
    fitting = int(0.5 * free_room(model) // (row_bytes(model, n_pos) + kept))
    return RowBudget(model, n_pos, max(1, fitting) if max_rows is None else max_rows)


def _check(model: HookedModel, ids: TokenIds, max_new_tokens: int) -> None:
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    if max_new_tokens < 1 or (limit is not None and ids.shape[1] + max_new_tokens > limit + 1):
        raise MeasurementError(
            f"A prompt of {ids.shape[1]} tokens can be continued by at least 1 and, in this model, at most "
            f"{'any number of' if limit is None else max(0, limit + 1 - ids.shape[1])} tokens; found max_new_tokens={max_new_tokens}."
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
