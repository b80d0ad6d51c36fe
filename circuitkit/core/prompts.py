"""Prompts as the engine sees them: token ids in step, with what should and should not come next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
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
    """A batch of clean and corrupt prompts. The scored position is the last one, unless ``behind`` says that tokens stand behind it.

    A corrupt prompt is as long as its clean twin. Where pairs differ in length, the shorter rows are padded on the left, so that the last
    column is the last token of every row. Answers of several tokens are scored at as many last positions.

    Attributes:
        clean: Token ids of the clean prompts.
        corrupt: Token ids of the corrupt prompts, row by row the twins of ``clean``.
        answers: Tokens that should come next, a weighted set per prompt.
        wrongs: Tokens that should not, likewise: the runner-up.
        groups: Template of each prompt, as an index into ``group_names``.
        group_names: Names of the templates.
        spans: Label to the token that it is on in each prompt, counted from the prompt's own first one. ``last`` is always there.
        items: The prompts as they were before tokenization.
        pads: How many columns of padding each row begins with.
        targets: Answers of several tokens, by teacher forcing: the prompts hold all of them but the last, and this is the token that each
            of the last positions should predict; -1 at the left of an answer with fewer. No column where answers are one token.
        behind: How many tokens stand behind the scored position of each prompt: 0 for causal models, which predict what comes next; for an
            encoder what follows its mask token.
    """

    clean: Int[Tensor, "prompt pos"]
    corrupt: Int[Tensor, "prompt pos"]
    answers: TokenSets
    wrongs: TokenSets
    groups: Int[Tensor, " prompt"]
    group_names: tuple[str, ...] = ("all",)
    spans: Mapping[str, Int[Tensor, " prompt"]] = field(default_factory=dict)
    items: tuple[Prompt, ...] = ()
    pads: Int[Tensor, " prompt"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    targets: Int[Tensor, "prompt step"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    behind: Int[Tensor, " prompt"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __init__(
        self,
        clean: Int[Tensor, "prompt pos"],
        corrupt: Int[Tensor, "prompt pos"],
        answers: TokenSets | Int[Tensor, " prompt"],
        wrongs: TokenSets | Int[Tensor, " prompt"],
        groups: Int[Tensor, " prompt"],
        group_names: tuple[str, ...] = ("all",),
        spans: Mapping[str, tuple[int, ...] | Int[Tensor, " prompt"]] | None = None,
        items: tuple[Prompt, ...] = (),
        pads: Int[Tensor, " prompt"] | None = None,
        targets: Int[Tensor, "prompt step"] | None = None,
        behind: Int[Tensor, " prompt"] | None = None,
    ) -> None:
        """Takes the columns. Answers and wrong answers may be given as one token per prompt, and the positions of a label as one per group.

        Raises:
            PromptError: Columns of different lengths, no prompt, padding that differs between twins or leaves no token, or an answer that
                is a wrong answer too.
        """
        sets = [each if isinstance(each, TokenSets) else TokenSets.single(each) for each in (answers, wrongs)]
        given: dict[str, Any] = {"clean": clean, "corrupt": corrupt, "answers": sets[0], "wrongs": sets[1], "groups": groups}
        pads = torch.zeros(len(clean), dtype=torch.long) if pads is None else pads
        targets = torch.zeros(len(clean), 0, dtype=torch.long) if targets is None else targets
        behind = torch.zeros(len(clean), dtype=torch.long) if behind is None else behind
        given |= {"pads": pads, "targets": targets, "behind": behind}
        for name, value in {**given, "group_names": group_names, "spans": {}, "items": items}.items():
            object.__setattr__(self, name, value)
        self._check()
        places = {label: torch.tensor(at)[groups] if isinstance(at, tuple) else at for label, at in (spans or {}).items()}
        object.__setattr__(self, "spans", places)

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
        padding = torch.arange(self.n_pos) < self.pads[:, None]
        if len(self.pads) != n or (self.pads >= self.n_pos).any() or (self.clean != self.corrupt)[padding].any():
            raise PromptError(
                f"{n} prompts need {n} numbers of padding columns, each less than the {self.n_pos} columns, with the same padding in clean "
                f"and corrupt twins; found {len(self.pads)} numbers, of {int(self.pads.min())} to {int(self.pads.max())}."
            )
        if len(self.targets) != n or (self.targets.shape[1] and not (self.targets[:, -1] >= 0).all()):
            raise PromptError(
                f"{n} prompts whose answers have several tokens need {n} rows of targets, each with at least one token at its end; found "
                f"{len(self.targets)} rows of {self.targets.shape[1]}."
            )
        if len(self.behind) != n or (self.behind < 0).any() or (self.behind >= self.lengths).any():
            raise PromptError(
                f"{n} prompts need {n} numbers of tokens behind the scored position, each from 0 to less than the prompt's tokens; found "
                f"{len(self.behind)} numbers, of {int(self.behind.min())} to {int(self.behind.max())}."
            )
        if self.targets.shape[1] and self.behind.any():
            raise PromptError(
                "Answers of several tokens are scored at the last positions, so no token may stand behind those. Score one token."
            )
        if int(self.lengths.min()) < self.n_scored:
            raise PromptError(
                f"A prompt, with its answer but for the last token, must have at least as many tokens as the longest answer, which has "
                f"{self.n_scored}, and the shortest has {int(self.lengths.min())}. Use longer prompts, or shorter answers."
            )
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
        """Number of columns: of tokens of the longest prompt."""
        return self.clean.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Number of tokens of each prompt."""
        return self.n_pos - self.pads

    @property
    def n_scored(self) -> int:
        """How many last positions are scored: 1, or as many as the longest answer has tokens."""
        return max(1, self.targets.shape[1])

    @property
    def n_kept(self) -> int:
        """How many last positions must be computed so that the scored ones are among them."""
        return max(self.n_scored, int(self.behind.max()) + 1)

    def scored(self, logits: Float[Tensor, "row pos d_vocab"], rows: slice = slice(None)) -> Float[Tensor, "row *step d_vocab"]:
        """Of logits at some last positions those that are scored, in float32; without an axis for them where it is a single one.

        Args:
            logits: At ``n_kept`` last positions or more; rows are copies x prompts.
            rows: The prompts; all of them if they are left out.
        """
        if self.n_scored > 1:
            return logits[:, -self.n_scored :].float()
        behind = self.behind[rows]
        if not behind.any():
            return logits[:, -1].float()
        places = logits.shape[1] - 1 - behind.repeat(len(logits) // len(behind))
        return logits[torch.arange(len(logits)), places.to(logits.device)].float()

    def require_last(self, what: str) -> None:
        """Refuses prompts whose scored position is not the last one.

        Args:
            what: What needs it to be the last one, as the subject of a sentence.

        Raises:
            PromptError: In some prompts tokens stand behind it.
        """
        if self.behind.any():
            raise PromptError(
                f"{what} reads the last position of each prompt, and in {int(self.behind.bool().sum())} of {len(self)} prompts tokens "
                "stand behind the scored one. Measure units by removing them (method=knockout), which takes the scored position as it is."
            )

    @property
    def is_padded(self) -> bool:
        """Whether prompts differ in length."""
        return bool(self.pads.any())

    def padding(self, rows: slice, copies: int = 1, cut: int = 0) -> dict[str, Any]:
        """What a forward pass has to be told so that padding counts for nothing; nothing if these rows have none.

        Args:
            rows: The prompts of the pass.
            copies: How often the pass has each of them; its rows are copies x prompts.
            cut: First column that the pass computes; keys and values of those before are given to it.

        Returns:
            Empty, or ``attention_mask`` over all columns and ``position_ids`` of those that are computed.
        """
        pads = self.pads[rows, None]
        if not pads.any():
            return {}
        places = torch.arange(self.n_pos) - pads
        return {
            "attention_mask": (places >= 0).long().repeat(copies, 1),
            "position_ids": places.clamp(min=0)[:, cut:].repeat(copies, 1),
        }

    def require_equal_lengths(self, what: str, remedy: str) -> None:
        """Refuses prompts of different lengths.

        Args:
            what: What needs equal lengths, as the subject of a sentence.
            remedy: What to do, as a sentence.

        Raises:
            PromptError: Lengths differ.
        """
        if self.is_padded:
            shortest, longest = int(self.lengths.min()), int(self.lengths.max())
            raise PromptError(f"{what} needs prompts of the same number of tokens, and these have {shortest} to {longest}. {remedy}")

    def take(self, rows: Int[Tensor, " row"] | Bool[Tensor, " prompt"] | Sequence[int]) -> PromptSet:
        """The prompts at these rows, or where a boolean column is True."""
        rows = torch.as_tensor(rows)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
        if not len(rows):
            raise PromptError("No prompt is left. Draw more (task.n), relax the filter (task.filter=false) or take another task.")
        first = int(self.pads[rows].min())  # columns that are padding in all of them go
        return replace(
            self,
            clean=self.clean[rows, first:],
            corrupt=self.corrupt[rows, first:],
            answers=self.answers.take(rows),
            wrongs=self.wrongs.take(rows),
            groups=self.groups[rows],
            spans={label: places[rows] for label, places in self.spans.items()},
            items=tuple(self.items[row] for row in rows.tolist()) if self.items else (),
            pads=self.pads[rows] - first,
            targets=self.targets[rows],
            behind=self.behind[rows],
        )

    @property
    def asked(self) -> Int[Tensor, " some"]:
        """Every token that is an answer or a wrong answer of some prompt, sorted."""
        tokens: Tensor = torch.cat([each.ids[each.weights > 0] for each in (self.answers, self.wrongs)]).unique()
        return tokens

    def renumbered(self, tokens: Int[Tensor, " some"]) -> PromptSet:
        """The same prompts for logits whose columns are these tokens alone: answers and wrong answers are places in this sorted list."""
        return replace(self, answers=self.answers.renumbered(tokens), wrongs=self.wrongs.renumbered(tokens))

    def places(self, span: str) -> Int[Tensor, " prompt"]:
        """On which of its own tokens each prompt has a label, or a number given as text (negative ones count from the end).

        Raises:
            PromptError: No such label, or a number outside of a prompt.
        """
        if span == "last":
            return self.lengths - 1
        if _NUMBER.fullmatch(span):
            place, shortest = int(span), int(self.lengths.min())
            if -shortest <= place < shortest:
                return place % self.lengths
            raise PromptError(f"Position {place} is outside of prompts with {shortest} tokens (0-{shortest - 1}). Take one of these.")
        if span not in self.spans:
            known = ", ".join(sorted({*self.spans, "last"}))
            raise PromptError(f"These prompts have no position labelled {span!r}. Choices: {known}, or a number.")
        return self.spans[span]

    def columns(self, span: str) -> Int[Tensor, " prompt"]:
        """The same as columns of the tables. Raises as ``places``."""
        return self.places(span) + self.pads

    def position(self, span: str, group: int) -> int:
        """On which token all prompts of a group have a label.

        Raises:
            PromptError: They have it on different ones, or as ``places``.
        """
        found = self.places(span)[self.groups == group].unique().tolist()
        if len(found) != 1:
            raise PromptError(
                f"Expected {span!r} on the same token in all prompts of group {self.group_names[group]!r}, found it on {found}. Use groups "
                "whose prompts have equal numbers of tokens before it."
            )
        return int(found[0])

    def content_hash(self) -> str:
        """SHA-256 of everything that a score can depend on."""
        digest = hashlib.sha256()
        for column in (self.clean, self.corrupt, self.groups, self.pads, self.targets):
            digest.update(str(tuple(column.shape)).encode())
            digest.update(column.to(torch.int64).cpu().contiguous().numpy().tobytes())
        if self.behind.any():
            digest.update(f"behind {self.behind.tolist()}".encode())
        self.answers.update(digest)
        self.wrongs.update(digest)
        digest.update(repr(sorted((label, places.tolist()) for label, places in self.spans.items())).encode())
        return digest.hexdigest()
