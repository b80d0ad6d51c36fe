"""Question sets: prompts that a model answers by generating text, for which no answer has to be a single token."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.core.part import Part
from circuitkit.core.questions import Question, QuestionSet
from circuitkit.tasks.base import Tokenizer
from circuitkit.tasks.encoding import Encoder

__all__ = ["Question", "QuestionSet", "Questions"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions(Part):
    """Makes questions. Same settings and seed, same questions.

    A set of your own gives ``name`` and ``questions``, and where an answer may be right without being the very text also ``is_right``.

    Attributes:
        n: How many; fewer where there are not that many different ones.
        seed: Of whatever is drawn.
        n_new_tokens: Most tokens of a free answer. None gives an answer as many tokens as the right one has.
    """

    n: int = 50
    seed: int = 0
    n_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"{self.name}: n, the number of questions, must be 1 or more; found {self.n}.")
        if self.n_new_tokens is not None and self.n_new_tokens < 1:
            raise ConfigError(f"{self.name}: n_new_tokens, the bound of an answer, must be 1 or more, or null; found {self.n_new_tokens}.")

    @property
    @abstractmethod
    def name(self) -> str:
        """As it is configured and reported."""

    @abstractmethod
    def questions(self) -> list[Question]:
        """The questions, as text."""

    def is_right(self, question: Question, generated: str) -> bool:
        """Whether a generated text answers a question: here, whether it is the answer, blanks around it aside."""
        return generated.strip() == question.answer.strip()

    def encoded(self, tokenizer: Tokenizer) -> QuestionSet:
        """The questions as token ids. Those with words that the tokenizer does not know are left out, which is logged.

        An answer is what follows the prompt when both are tokenized together. Where the tokenizer makes a token of the space between
        them, the prompt ends with that space, as Llama's prompts in the paper do ("2 4 6 " -> "8"); else the space belongs to the answer
        ("2 4 6" -> " 8").

        Raises:
            PromptError: No question is left, or a prompt whose last token changes when the answer is appended.
        """
        asked = self._known(self.questions(), Encoder(tokenizer, bos=False))
        encoder = Encoder(tokenizer)
        joint = encoder.ids([question.prompt + question.answer for question in asked])
        gaps = _gaps(asked, joint, encoder)
        ids = encoder.ids([question.prompt + gap for question, gap in zip(asked, gaps, strict=True)])
        corrupt = encoder.ids([question.corrupt + gap for question, gap in zip(asked, gaps, strict=True)])
        return QuestionSet(
            name=self.name,
            questions=tuple(asked),
            ids=tuple(map(tuple, ids)),
            corrupt_ids=tuple(tuple(row) if question.corrupt else () for row, question in zip(corrupt, asked, strict=True)),
            n_new_tokens=tuple(self.n_new_tokens or len(both) - len(row) for both, row in zip(joint, ids, strict=True)),
            free=self.n_new_tokens is not None,
            is_right=self.is_right,
        )

    def _known(self, asked: Sequence[Question], encoder: Encoder) -> list[Question]:
        texts = [f"{question.prompt}{question.answer} {question.corrupt}" for question in asked]
        known = [question for question, ids in zip(asked, encoder.ids(texts), strict=True) if encoder.knows(ids)]
        if not known:
            raise PromptError(
                f"{self.name}: each of the {len(asked)} questions has a word that the tokenizer does not know, as in "
                f"{asked[0].prompt + asked[0].answer!r}. Leave these questions out, or take another model."
            )
        if len(known) < len(asked):
            _log.info("%s: %d of %d questions have words that the tokenizer does not know, so they are left out.", self.name,
                      len(asked) - len(known), len(asked))  # fmt: skip
        return known


def _gaps(asked: Sequence[Question], joint: Sequence[list[int]], encoder: Encoder) -> list[str]:
    """The space that each prompt ends with: that before its answer where it is a token of its own, else none.

    Raises:
        PromptError: An answer changes the tokens of its prompt.
    """
    spaces = [question.answer[: len(question.answer) - len(question.answer.lstrip())] for question in asked]
    spaced = encoder.ids([question.prompt + space for question, space in zip(asked, spaces, strict=True)])
    bare = encoder.ids([question.prompt for question in asked])
    gaps = []
    for question, space, both, *ends in zip(asked, spaces, joint, spaced, bare, strict=True):
        fitting = [gap for gap, ids in zip((space, ""), ends, strict=True) if len(ids) < len(both) and both[: len(ids)] == ids]
        if not fitting:
            raise PromptError(
                f"An answer must leave the tokens of its prompt as they are, but {question.answer!r} behind {question.prompt!r} changes "
                "the last one. End the prompt with a whole word, and begin the answer with a space."
            )
        gaps.append(fitting[0])
    return gaps
