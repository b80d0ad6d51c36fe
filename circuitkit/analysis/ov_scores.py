"""What the OV circuit of each head makes of a sequence member: the same member (copy) or the next one (next).

The residual stream behind the first block, at the position of a member, goes through the head's value projection and its slice of the
output projection, and from there straight to the logits. What the head looks at plays no part. The method is that of Lan, Torr and Barez
(2023, arXiv 2311.04131), after the copy scores of Wang et al. (2022).

Choices: the head reads through the attention norm of its own layer, with its weights, as it would there. (Where the norms' weights are
folded into the value projections, what is left of the next block's norm and of the own layer's is the same, so this is the next block's
norm too.) The value bias counts; the bias of the output projection does not, because no head owns it. The final norm is applied once.
Where a norm lies behind attention (post-norm), the head's output goes through it with the scale held constant, that is, through its
weights: any constant gives the same, because the final norm takes the size off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.analysis.roles import ASKED, Table, member_positions
from circuitkit.core.errors import MeasurementError, ModelError, PromptError
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.models.blocks import norm_behind
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.linear import check_sums
from circuitkit.models.norms import HeldNorm

DEFINITION = (
    "Share of members for which the same (copy) or the next (next) member is among the top {k} tokens, with or without a space: residual "
    "stream after the first block, attention norm of the head's layer, W_V and b_V, W_O without its bias, weights of the norm behind "
    "attention where there is one, final norm, unembedding."
)


@dataclass(frozen=True)
class OVScores:
    """Copy and next scores of every head, in %.

    Attributes:
        k: How many top tokens count.
        definition: What was measured, in a sentence.
        copy: Share of members that come out as themselves.
        next: Share of members that come out as the next one.
        n: Members that were looked at.
    """

    k: int
    definition: str
    copy: Table
    next: Table
    n: int


def ov_scores(model: HookedModel, prompts: PromptSet, *, k: int = 5, successors: Mapping[str, str] | None = None) -> OVScores:
    """Copy and next scores of every head. Costs one unembedding a head, prompt and member.

    Args:
        model: The model.
        prompts: Prompts whose members are labelled S1, S2, ...
        k: How many top tokens count. Tokens whose logit ties with that of the next one down do not.
        successors: Text of a member to the text of what counts as its next. None: what the prompts themselves show, that is the member
            after it, and the answer after the last one.

    Raises:
        ModelError: The model has one layer.
        PromptError: The prompts have no labelled members, or ``successors`` lacks one.
        MeasurementError: ``k`` is no number of tokens.
    """
    if model.n_layers < 2:
        raise ModelError(f"OV scores read the residual stream behind the first block, and {model.name} has one layer. Use a deeper model.")
    check_sums(model, "OV scores")
    if not 1 <= k < model.d_vocab:
        raise MeasurementError(f"k must be from 1 to {model.d_vocab - 1}, the number of tokens less one; found {k}.")
    word = cache(partial(_word, model))
    members = _members(model, prompts)
    same = [word(token) for token in members.shown.tolist()]
    after = [word(token) for token in members.next.tolist()] if successors is None else _after(model, same, successors)
    copy, following = torch.zeros(2, model.n_layers, model.n_heads)
    for layer in range(model.n_layers):
        for head, out in enumerate(_head_outputs(model, layer, members.resid)):
            said = [{word(token) for token in tokens} for tokens in _top(model, out, k)]
            copy[layer, head] = _percent(same, said)
            following[layer, head] = _percent(after, said)
    return OVScores(k, DEFINITION.format(k=k), copy, following, len(same))


def _word(model: HookedModel, token: int) -> str:
    """A token as a word, so that it is the same with and without a space before it."""
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token]).strip()


class _Members(NamedTuple):
    """Every member of every prompt: the residual stream there behind the first block, its token, and that of the next one."""

    resid: Float[Tensor, "sample d_model"]
    shown: Int[Tensor, " sample"]
    next: Int[Tensor, " sample"]


def _members(model: HookedModel, prompts: PromptSet) -> _Members:
    names = list(prompts.spans)
    places = member_positions({name: place for place, name in enumerate(names)}).get(ASKED, [])
    if not places:
        raise PromptError("OV scores need prompts whose members are labelled S1, S2, ...; these have no such labels. Use another task.")
    labels = [names[place] for place in places]

    def columns(prompts: PromptSet) -> Int[Tensor, "prompt member"]:
        return torch.stack([prompts.columns(label) for label in labels], 1)

    positions = columns(prompts)
    shown = prompts.clean.gather(1, positions)
    following = torch.cat([shown[:, 1:], prompts.answers.tokens[:, None]], 1)
    rows = RowBudget(model, prompts.n_pos).rows
    parts = [prompts.take(part) for part in torch.arange(len(prompts)).split(rows)]
    resid = [_behind_first_block(model, part, columns(part)) for part in parts]
    return _Members(torch.cat(resid), shown.flatten(), following.flatten())


def _behind_first_block(model: HookedModel, prompts: PromptSet, positions: Int[Tensor, "row member"]) -> Float[Tensor, "sample d_model"]:
    states: list[Tensor] = []

    def visit(layer: Layer) -> None:
        if layer.index == 1:
            states.append(layer.resid.cpu())

    model.run(prompts.clean, visit, stop=1, **prompts.padding(slice(0, len(prompts))))
    return states[0][torch.arange(len(prompts))[:, None], positions].flatten(0, 1)


def _head_outputs(model: HookedModel, layer: int, resid: Float[Tensor, "sample d_model"]) -> Float[Tensor, "head sample d_model"]:
    """What each head of a layer writes if it looks at just this position."""
    device = model.device_of(layer)
    _, _, values = model.queries_keys_values(layer, resid.to(device)[:, None])
    values = values[:, 0].repeat_interleave(model.n_heads // model.n_kv_heads, 1)  # query heads of a group lie side by side
    nothing = torch.zeros_like(values)
    bias = model.project(layer, nothing[:1])
    outs = []
    for head in range(model.n_heads):
        alone = nothing.clone()
        alone[:, head] = values[:, head]
        outs.append(model.project(layer, alone) - bias)
    written = torch.stack(outs)
    norm = norm_behind(model, layer, "attention")
    return written if norm is None else HeldNorm.at(norm, written).through(written).to(written.dtype)


def _top(model: HookedModel, out: Float[Tensor, "sample d_model"], k: int) -> list[list[int]]:
    """The top k tokens of each sample, less those that tie with the token behind them: a head that writes nothing says nothing."""
    found: list[list[int]] = []
    for part in out.split(RowBudget(model, 1).rows):
        values, top = model.unembed(part[:, None])[:, 0].float().topk(k + 1)
        clear = values > values[:, -1:]
        found += [row[kept].tolist() for row, kept in zip(top.cpu(), clear.cpu(), strict=True)]
    return found


def _after(model: HookedModel, words: Sequence[str], successors: Mapping[str, str]) -> list[str]:
    """What the mapping says of each word, if it can be said in one token."""
    for word in dict.fromkeys(words):
        if word not in successors:
            raise PromptError(f"successors names no next member for {word!r}. Named are: {', '.join(successors)}.")
        if not _is_one_token(model, successors[word]):
            raise PromptError(
                f"successors says that {successors[word]!r} comes after {word!r}, but that is several tokens, with and without a space "
                "before it, so it could never be found. Name words of one token, or use another model."
            )
    return [successors[word] for word in words]


def _is_one_token(model: HookedModel, word: str) -> bool:
    """Whether it is, with or without a space before it. Without a tokenizer words are token ids."""
    if model.tokenizer is None:
        return True
    return any(len(ids) == 1 for ids in model.tokenizer([word, f" {word}"], add_special_tokens=False)["input_ids"])


def _percent(wanted: Sequence[str], said: Sequence[set[str]]) -> float:
    return 100 * sum(word in words for word, words in zip(wanted, said, strict=True)) / len(wanted)
