"""A task: prompts in which the behaviour shows, each with a corrupt twin in which it cannot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet

Accept = Callable[[PromptSet], Bool[Tensor, " prompt"]]
"""Says of each prompt whether the untouched model can do it."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a task asks of a Hugging Face tokenizer."""

    bos_token_id: int | None
    unk_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Task(Part):
    """Makes prompts. Same settings and seed, same prompts.

    Attributes:
        name: As it is logged and configured.
        n: Prompts per template; None for all there are, where nothing is drawn.
        seed: Of the draw.
        filter: Whether prompts that the untouched model cannot do are drawn again.
    """

    name: str
    n: int | None
    seed: int
    filter: bool

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        """Draws the prompts.

        Args:
            tokenizer: Of the model that the prompts are for.
            n: Prompts per template; the task's own if None.
            seed: Of the draw; the task's own if None.
            accept: The filter; prompts that it refuses are drawn again, a bounded number of times. None keeps all.

        Raises:
            PromptError: A member or answer that is not one token, prompts of unequal length, or none left by the filter.
        """
