"""What an intervention cost, as one number a prompt."""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum

from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Logits, Values


class Floor(str, Enum):
    """What counts as 0 % when a metric is turned into a performance score (the untouched model is 100 %)."""

    ZERO = "zero"
    PATCHED = "patched"

    def __str__(self) -> str:
        return self.value


class Metric(Part):
    """Turns next-token logits into one number a prompt. Differentiable where the measure is, and float32.

    Attributes:
        name: As it is logged.
        unit: Such as ``logits`` or ``nats``.
        higher_is_better: Direction.
        floor: What counts as 0 %: a metric of zero (a difference of logits), or the metric when everything is patched (a distance, which is
            zero when nothing is lost).
    """

    name: str
    unit: str
    higher_is_better: bool = True
    floor: Floor = Floor.ZERO

    @abstractmethod
    def score(self, logits: Logits, prompts: PromptSet, *, clean_logits: Logits | None = None) -> Values:
        """The metric for each prompt, with any number of leading mask axes.

        Args:
            logits: Logits at the last position under the intervention, float32.
            prompts: The prompts, for their answers.
            clean_logits: Logits of the untouched model, for metrics that compare with them.
        """
