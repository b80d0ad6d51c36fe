"""Prompts as the engine sees them: token ids in step, with what should and should not come next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import PromptError
from circuitkit.core.token_sets import TokenSets

_NUMBER = re.compile(r"-?[0-9]+")

Answers = str | Sequence[str] | Mapping[str, float]
"""An answer as text, several that count alike, or several with the weight that the probability of each counts with."""


def weighted(answers: Answers) -> dict[str, float]:
    """Each answer with its weight, which is 1 where none is given.

    Raises:
        PromptError: An answer is named twice, or a weight is no number above 0.
    """
    if isinstance(answers, str):
        return {answers: 1.0}
    if isinstance(answers, Mapping):
        for text, weight in answers.items():
            if not 0 < weight < float("inf"):
                raise PromptError(f"The weight of an answer must be a number above 0, found {weight} for {text!r}. Leave out what is none.")
        return {text: float(weight) for text, weight in answers.items()}
    found = dict.fromkeys(answers, 1.0)
    if len(found) < len(answers):
        raise PromptError(f"An answer may be named once per prompt, found {list(answers)}. Give a weight to what counts for more.")
    return found


@dataclass(frozen=True)
class Prompt:
    """One clean prompt with its corrupt twin, as text.

    Attributes:
        clean: The prompt.
        corrupt: The same prompt with the signal removed; same number of tokens.
        answer: The text that should follow the clean prompt, as it would be appended to it; or several, with or without weights.
        wrong: The text of the runner-up (the last shown member), likewise; or several.
        group: Name of the template, the unit over which means may be taken.
        stratum: What the draw is balanced over, such as the first member.
        spans: Label to (start, end) in the clean text, end exclusive, such as ``{"S1": (12, 15)}``.
        corrupt_spans: The same labels in the corrupt text.
    """

    clean: str
    corrupt: str
    answer: Answers
    wrong: Answers
    group: str = "all"
    stratum: str = ""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    corrupt_spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, float]:
        """The answers with their weights."""
        return weighted(self.answer)

    @property
    def wrongs(self) -> dict[str, float]:
        """The wrong answers with their weights."""
        return weighted(self.wrong)


@dataclass(frozen=True, init=False)
class PromptSet:
    """A batch of clean and corrupt prompts of equal length. The scored position is always the last one.

    Attributes:
        clean: Token ids of the clean prompts.
        corrupt: Token ids of the corrupt prompts, row by row the twins of ``clean``.
        answers: Tokens that should come next, a weighted set per prompt.
        wrongs: Tokens that should not, likewise: the runner-up.
        groups: Template of each prompt, as an index into ``group_names``.
        group_names: Names of the templates.
        spans: Label to position, for labels that lie at the same positions in a group:
            ``spans[label][group]`` is a position. ``last`` is always there.
        items: The prompts as they were before tokenization.
    """

    clean: Int[Tensor, "prompt pos"]
    corrupt: Int[Tensor, "prompt pos"]
    answers: TokenSets
    wrongs: TokenSets
    groups: Int[Tensor, "prompt"]
    group_names: tuple[str, ...] = ("all",)
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    items: tuple[Prompt, ...] = ()

    def __init__(
        self,
        clean: Int[Tensor, "prompt pos"],
        corrupt: Int[Tensor, "prompt pos"],
        answers: TokenSets | Int[Tensor, "prompt"],
        wrongs: TokenSets | Int[Tensor, "prompt"],
        groups: Int[Tensor, "prompt"],
        group_names: tuple[str, ...] = ("all",),
        spans: Mapping[str, tuple[int, ...]] | None = None,
        items: tuple[Prompt, ...] = (),
    ) -> None:
        """Takes the columns. Answers and wrong answers may be given as one token per prompt.

        Raises:
            PromptError: Columns of different lengths, no prompt, or an answer that is a wrong answer too.
        """
        sets = [each if isinstance(each, TokenSets) else TokenSets.single(each) for each in (answers, wrongs)]
        given = {"clean": clean, "corrupt": corrupt, "answers": sets[0], "wrongs": sets[1], "groups": groups}
        for name, value in {**given, "group_names": group_names, "spans": spans or {}, "items": items}.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.clean.ndim != 2 or self.clean.shape != self.corrupt.shape:
            raise PromptError(
                f"Clean and corrupt prompts must be two tables of equal size, found {tuple(self.clean.shape)} and "
                f"{tuple(self.corrupt.shape)}. Choose members and fillers with equal numbers of tokens."
            )
        n = len(self.clean)
        if not all(len(column) == n for column in (self.answers, self.wrongs, self.groups)):
            raise PromptError(f"{n} prompts need {n} answers, wrong answers and groups; found {len(self.answers)}, "
                              f"{len(self.wrongs)} and {len(self.groups)}.")  # fmt: skip
        if n == 0:
            raise PromptError("No prompt is left. Draw more (task.n), relax the filter (task.filter=false) or take another task.")
        shared = self.answers.shared(self.wrongs)
        if shared.any():
            row = int(shared.int().argmax())
            raise PromptError(
                f"Answers and wrong answers must be different tokens, but {int(shared.sum())} of {n} prompts have a token in both sets, "
                f"the first in row {row}: answers {self.answers.ids[row].tolist()}, wrong answers {self.wrongs.ids[row].tolist()}. Leave "
                "it out of one of them."
            )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def n_pos(self) -> int:
        """Number of tokens a prompt."""
        return self.clean.shape[1]

    def take(self, rows: Int[Tensor, "row"] | Bool[Tensor, "prompt"] | Sequence[int]) -> PromptSet:
        """The prompts at these rows, or where a boolean column is True."""
        rows = torch.as_tensor(rows)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
        columns = {name: getattr(self, name)[rows] for name in ("clean", "corrupt", "groups")}
        items = tuple(self.items[row] for row in rows.tolist()) if self.items else ()
        return replace(self, items=items, answers=self.answers.take(rows), wrongs=self.wrongs.take(rows), **columns)

    def position(self, span: str, group: int) -> int:
        """Position of a label, or of a number given as text, in one group.

        Raises:
            PromptError: No such label, or a number outside of the prompt.
        """
        if span == "last":
            return self.n_pos - 1
        if _NUMBER.fullmatch(span):
            position = int(span)
            if -self.n_pos <= position < self.n_pos:
                return position % self.n_pos
            raise PromptError(f"Position {position} is outside of prompts with {self.n_pos} tokens (0-{self.n_pos - 1}).")
        if span not in self.spans:
            known = ", ".join(sorted({*self.spans, "last"}))
            raise PromptError(f"These prompts have no position labelled {span!r}. Choices: {known}, or a number.")
        return self.spans[span][group]

    def content_hash(self) -> str:
        """SHA-256 of everything that a score can depend on."""
        digest = hashlib.sha256()
        for column in (self.clean, self.corrupt, self.groups):
            digest.update(str(tuple(column.shape)).encode())
            digest.update(column.to(torch.int64).cpu().contiguous().numpy().tobytes())
        self.answers.update(digest)
        self.wrongs.update(digest)
        digest.update(repr(sorted((label, tuple(places)) for label, places in self.spans.items())).encode())
        return digest.hexdigest()
