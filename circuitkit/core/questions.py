"""Prompts that are answered by generating: a question as text, and a set of them as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Question:
    """One prompt with the text that should follow.

    Attributes:
        prompt: What the model is given; no space at its end.
        answer: What should follow, as it would be appended: usually with a space before it.
        corrupt: The same kind of prompt with the signal removed and the same number of tokens, from which means and interchanges are
            taken; empty where there is none, and then only patchers that need no corrupt run can be used.
        group: Name of the template, the unit over which means may be taken.
    """

    prompt: str
    answer: str
    corrupt: str = ""
    group: str = "all"


@dataclass(frozen=True)
class QuestionSet:
    """Questions as a model is asked them.

    Attributes:
        name: Of the set.
        questions: As text.
        ids: Token ids of each prompt.
        corrupt_ids: Token ids of its corrupt twin; empty where there is none.
        n_new_tokens: How many tokens each answer may take.
        free: Whether that number is a bound on a free answer; else it is the number of tokens of the right one.
        is_right: Says of a question and a generated text whether that answers it.
    """

    name: str
    questions: tuple[Question, ...]
    ids: tuple[tuple[int, ...], ...]
    corrupt_ids: tuple[tuple[int, ...], ...]
    n_new_tokens: tuple[int, ...]
    free: bool
    is_right: Callable[[Question, str], bool]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: Iterable[int]) -> QuestionSet:
        """The questions at these places."""
        columns = list(zip(self.questions, self.ids, self.corrupt_ids, self.n_new_tokens, strict=True))
        questions, ids, corrupt_ids, n_new_tokens = zip(*(columns[row] for row in rows), strict=True)
        return replace(self, questions=questions, ids=ids, corrupt_ids=corrupt_ids, n_new_tokens=n_new_tokens)

    def by_length(self) -> list[list[int]]:
        """The places of questions whose prompts have equally many tokens, which can share a pass without padding."""
        batches: dict[int, list[int]] = {}
        for row, ids in enumerate(self.ids):
            batches.setdefault(len(ids), []).append(row)
        return list(batches.values())
