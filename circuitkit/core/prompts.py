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

_NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Prompt:
    """One clean prompt with its corrupt twin, as text.

    Attributes:
        clean: The prompt.
        corrupt: The same prompt with the signal removed; same number of tokens.
        answer: The text that should follow the clean prompt, as it would be appended to it.
        wrong: The text of the runner-up (the last shown member), likewise.
        group: Name of the template, the unit over which means may be taken.
        stratum: What the draw is balanced over, such as the first member.
        spans: Label to (start, end) in the clean text, end exclusive, such as ``{"S1": (12, 15)}``.
        corrupt_spans: The same labels in the corrupt text.
    """

    clean: str
    corrupt: str
    answer: str
    wrong: str
    group: str = "all"
    stratum: str = ""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    corrupt_spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """A batch of clean and corrupt prompts of equal length. The scored position is always the last one.

    Attributes:
        clean: Token ids of the clean prompts.
        corrupt: Token ids of the corrupt prompts, row by row the twins of ``clean``.
        answers: Token that should come next.
        wrongs: Token of the runner-up.
        groups: Template of each prompt, as an index into ``group_names``.
        group_names: Names of the templates.
        texts: The prompts as text.
        spans: Label to position, for labels that lie at the same positions in a group:
            ``spans[label][group]`` is a position. ``last`` is always there.
        items: The prompts as they were before tokenization.
    """

    clean: Int[Tensor, "prompt pos"]
    corrupt: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, "prompt"]
    wrongs: Int[Tensor, "prompt"]
    groups: Int[Tensor, "prompt"]
    group_names: tuple[str, ...] = ("all",)
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    items: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
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
        columns = {name: getattr(self, name)[rows] for name in ("clean", "corrupt", "answers", "wrongs", "groups")}
        items = tuple(self.items[row] for row in rows.tolist()) if self.items else ()
        return replace(self, items=items, **columns)

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
        for column in (self.clean, self.corrupt, self.answers, self.wrongs, self.groups):
            digest.update(str(tuple(column.shape)).encode())
            digest.update(column.to(torch.int64).cpu().contiguous().numpy().tobytes())
        digest.update(repr(sorted((label, tuple(places)) for label, places in self.spans.items())).encode())
        return digest.hexdigest()
