"""Roles of attention heads, and how much each head of a model plays each of them.

A role names, for some queries, the keys that a head of that role looks at. Its score for a head is the attention probability that such a
query gives to its keys together, less what an even spread over all positions that the query can see would give them, averaged over the
queries and then over the prompts. So 0 is a head that does not care, and 1 minus the even share is the most. Heads of a role are found
by their score among all heads of the model; none is looked up.

The control of a score is ``chance``: how often as many keys, taken at random, get as much of that head's attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.analysis.attention import MeanPattern
from circuitkit.core.errors import MeasurementError, PromptError
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel

Cells = Bool[Tensor, "query key"]
Table = Float[Tensor, "layer head"]

_MEMBER = re.compile(r"(?P<kind>[A-Z]+)(?P<place>\d+)\Z")
ASKED = "S"
"""The letters of the labels of the sequence that is asked for: S1, S2, ..."""


@dataclass(frozen=True)
class Role:
    """One thing that heads do, as cells of an attention pattern.

    Attributes:
        name: One word for it.
        description: Which query looks at which keys.
        cells: From the prompts of a group to the cells; all False where the prompts have none.
        control: Whether it is measured on repeated random tokens instead of the task's prompts.
    """

    name: str
    description: str
    cells: Callable[[MeanPattern], Cells]
    control: bool = False


def role_scores(patterns: Sequence[MeanPattern], role: Role) -> Table:
    """How much each head plays a role, as this module says.

    Args:
        patterns: Mean patterns of the groups. Groups in which the role has no cells do not count.
        role: The role.

    Raises:
        PromptError: The role has no cells in any group.
    """
    shares: list[Table] = []
    counts: list[int] = []
    for pattern in patterns:
        cells = role.cells(pattern)
        queries = cells.any(-1)
        if queries.any():
            even = cells.sum(-1) / torch.arange(1, pattern.n_pos + 1)
            excess = (pattern.mean * cells).sum(-1) - even
            shares.append(pattern.n * excess[..., queries].mean(-1))
            counts.append(pattern.n)
    if not shares:
        raise PromptError(
            f"The role {role.name} ({role.description}) needs positions that these prompts do not have. Use a task whose prompts "
            "repeat the words of a template and label their members S1, S2, ..., or labels of your own in task.path."
        )
    return torch.stack(shares).sum(0) / sum(counts)


def chance(patterns: Sequence[MeanPattern], role: Role, head: Node, *, draws: int = 999, seed: int = 0) -> float:
    """How often a head would score as much on as many keys taken at random: a permutation test (p-value) of its role.

    Every query of the role gets as many keys as the role gives it, drawn among the positions that it can see. The first position is left
    out where the role does, because heads that have nothing to do rest there (attention sinks). Groups share a draw, so that templates
    of one shape are no independent evidence.

    Args:
        patterns: As for ``role_scores``.
        role: The role.
        head: The head.
        draws: How many sets of keys to draw.
        seed: Of the draws.

    Returns:
        The share of draws that score no less than the role itself, which counts as one of them.

    Raises:
        PromptError: The role has no cells in any group.
    """
    observed = role_scores(patterns, role)[head.layer, head.head].double()
    reached = torch.zeros(draws, dtype=torch.double)
    counted = 0
    for pattern in patterns:
        cells = role.cells(pattern)
        queries = cells.any(-1)
        if queries.any():
            drawn = _drawn(cells[queries], torch.arange(1, pattern.n_pos + 1)[queries], draws, seed)
            even = cells[queries].sum(-1) / torch.arange(1, pattern.n_pos + 1)[queries]
            shares = (pattern.mean[head.layer, head.head, queries].double() * drawn).sum(-1) - even
            reached += pattern.n * shares.mean(-1)
            counted += pattern.n
    return (1 + int((reached / counted >= observed - 1e-6).sum())) / (1 + draws)


def _drawn(cells: Cells, seen: Int[Tensor, " query"], draws: int, seed: int) -> Bool[Tensor, "draw query key"]:
    """As many keys for every query as it has, at random among the first positions, which it sees."""
    n_queries, n_pos = cells.shape
    allowed = torch.arange(n_pos) < seen[:, None]
    allowed[:, 0] &= cells[:, 0]
    order = torch.rand(draws, n_queries, n_pos, generator=torch.Generator().manual_seed(seed)).masked_fill(~allowed, 2.0)
    return order.argsort(-1).argsort(-1) < cells.sum(-1, keepdim=True)


def best(scores: Table, *, threshold: float = 0.1, top: int = 5) -> tuple[Node, ...]:
    """The heads with the highest scores, best first.

    Args:
        scores: A number a head.
        threshold: Heads below it are left out.
        top: At most this many.
    """
    values, order = scores.flatten().sort(descending=True, stable=True)
    chosen = order[:top][values[:top] >= threshold]
    return tuple(Node.of_head(*divmod(place, scores.shape[1])) for place in chosen.tolist())


def member_positions(labels: Mapping[str, int]) -> dict[str, list[int]]:
    """Positions of the sequence members by kind, in order: labels S1, S2, ... are of kind ``S``, and N1, N2, ... of kind ``N``."""
    found: dict[str, list[tuple[int, int]]] = {}
    for label, position in labels.items():
        match = _MEMBER.match(label)
        if match:
            found.setdefault(match["kind"], []).append((int(match["place"]), position))
    return {kind: [position for _, position in sorted(places)] for kind, places in found.items()}


def repeated_tokens(model: HookedModel, n: int = 64, period: int = 12, seed: int = 0, first: int | None = None) -> PromptSet:
    """Random tokens, all different, said twice: the standard control for heads that repeat.

    Text of a task repeats its template's words, always at the same distance and with a meaning, so that a head that looks a fixed way
    back, or at a kind of word, cannot be told from one that looks for the same token; here the token is all there is to go by.

    Args:
        model: The model; special tokens of its tokenizer are not drawn.
        n: Number of prompts.
        period: Tokens before the repetition; fewer if the model has not as many positions.
        seed: Of the draw.
        first: A token to begin with, such as that which begins the task's prompts.

    Raises:
        MeasurementError: The model has too few positions or tokens.
    """
    longest = model.n_ctx or 2 * period + 1
    special = {*(getattr(model.tokenizer, "all_special_ids", None) or ()), first}
    known = min(model.d_vocab, len(model.tokenizer)) if model.tokenizer is not None else model.d_vocab
    usable = torch.tensor([token for token in range(known) if token not in special])
    period = min(period, (longest - 1) // 2, len(usable))
    if period < 2:
        raise MeasurementError(
            f"Random tokens cannot be repeated in {model.name}: it has {longest} positions and {len(usable)} tokens to draw from. Expected "
            "at least 5 positions and 2 tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:period]] for _ in range(n)])
    begin = torch.full((n, 0 if first is None else 1), first or 0)
    ids = torch.cat([begin, drawn, drawn], 1)
    return PromptSet(ids, ids, drawn[:, 0], drawn[:, 1], torch.zeros(n, dtype=torch.long), ("repeated random tokens",))


def _none(pattern: MeanPattern) -> Cells:
    return torch.zeros(pattern.n_pos, pattern.n_pos, dtype=torch.bool)


def _similar_member(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    for places in member_positions(pattern.labels).values():
        for place, query in enumerate(places):
            cells[query, places[:place]] = True
    return cells


def _other_member(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    kinds = member_positions(pattern.labels)
    for kind, places in kinds.items():
        for query in places:
            cells[query, [key for other, keys in kinds.items() if other != kind for key in keys if key < query]] = True
    return cells


def _previous_member(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    for places in member_positions(pattern.labels).values():
        for key, query in zip(places, places[1:], strict=False):
            cells[query, key] = True
    return cells


def _last_to_newest(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    cells[-1, member_positions(pattern.labels).get(ASKED, [])[-1:]] = True
    return cells


def _last_to_members(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    cells[-1, member_positions(pattern.labels).get(ASKED, [])] = True
    return cells


def _duplicate_token(pattern: MeanPattern) -> Cells:
    return pattern.repeats


def _last_to_repeats(pattern: MeanPattern) -> Cells:
    cells = _none(pattern)
    cells[-1] = pattern.repeats[-1]
    return cells


def _induction(pattern: MeanPattern) -> Cells:
    return pattern.repeats.roll(1, -1).tril(-1)  # one key later; what rolls around is no earlier key


def _previous_token(pattern: MeanPattern) -> Cells:
    return _none(pattern).fill_diagonal_(True).roll(-1, -1).tril(-1)


ROLES = (
    Role("similar_member", "a member looks at the earlier members of its kind", _similar_member),
    Role("previous_member", "a member looks at the member before it", _previous_member),
    Role("last_to_newest", "the last position looks at the newest member", _last_to_newest),
    Role("last_to_members", "the last position looks at all members", _last_to_members),
    Role("last_to_repeats", "the last position looks at the earlier occurrences of its token in the text", _last_to_repeats),
    Role("duplicate_token", "a token looks at its earlier occurrence", _duplicate_token, control=True),
    Role("induction", "a token looks at the token after its earlier occurrence", _induction, control=True),
    Role("previous_token", "a token looks at the token before it", _previous_token, control=True),
)
"""The roles that every task is looked through for."""

OTHER_MEMBER = Role("other_member", "a member looks at earlier members of another kind", _other_member)
"""The control of ``similar_member`` on prompts that mix two sequences."""
