"""What an intervention cost, as one number per prompt."""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from circuitkit.core.errors import ConfigError, MeasurementError, unknown_choice
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Values


class Floor(str, Enum):
    """What counts as 0 % when a metric is normalised to a faithfulness score (the untouched model is 100 %)."""

    ZERO = "zero"
    ABLATED = "ablated"

    def __str__(self) -> str:
        return self.value

    @property
    def formula(self) -> str:
        """The score of a circuit C in %, of metric means m over the prompts."""
        return _FORMULAS[self]


_FORMULAS = {
    Floor.ZERO: "100 m(C) / m(full)",
    Floor.ABLATED: "100 (m(C) - m(ablated)) / (m(full) - m(ablated))",
}


class Metric(Part):
    """Turns next-token logits into one number per prompt. Differentiable where the measure is, and float32.

    Args:
        zero: What counts as 0 % (``score.zero`` of the configuration). ``zero``: the plain ratio of metrics, as in "Towards Interpretable
            Sequence Continuation" (arXiv 2311.04131). ``ablated``: the metric with everything ablated, as in "MIB: A Mechanistic
            Interpretability Benchmark" (arXiv 2504.13151). None: what is usual for the metric, its ``floor``.

    Attributes:
        name: As it is logged.
        unit: Such as ``logits`` or ``nats``.
        higher_is_better: Direction.
        floor: What counts as 0 %: a metric of zero (a difference of logits), or the metric when everything is ablated (a distance, which is
            zero when nothing is lost).
        differentiable: Whether it has a gradient by the logits that says anything; a count has none.
        reads_answers, reads_wrongs: Whether it needs answers, and wrong answers, to look at.
        reads_others: Whether a score depends on the logits of tokens that are neither answers nor wrong answers, as every probability does.
            Where it does not, logits come with columns for answers and wrong answers only, which ``prompts`` then numbers likewise.
        reads_steps: Whether it can score answers of several tokens: its logits then have an axis of steps before that of the vocabulary,
            and ``prompts.targets`` says which token each step should give.

    Raises:
        ConfigError: No such zero.
    """

    name: str
    unit: str
    higher_is_better: bool = True
    floor: Floor = Floor.ZERO
    differentiable: bool = True
    reads_answers: bool = True
    reads_wrongs: bool = True
    reads_others: bool = True
    reads_steps: bool = False

    def __init__(self, zero: Literal["zero", "ablated"] | None = None) -> None:
        if zero is not None:
            if zero not in tuple(Floor):
                raise ConfigError(unknown_choice("zero of the score (score.zero)", zero, Floor))
            self.floor = Floor(zero)
        self.zero = zero

    @abstractmethod
    def score(self, logits: Float[Tensor, "*axes d_vocab"], prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        """The metric for each prompt, with any number of leading mask axes.

        Args:
            logits: Logits under the intervention, float32: ``Logits`` at the last position, or ``StepLogits`` where it ``reads_steps``.
            prompts: The prompts, for their answers.
            clean_logits: Logits of the untouched model, for metrics that compare with them.
        """

    def check(self, prompts: PromptSet) -> None:
        """Refuses prompts on which the metric would mean nothing.

        Raises:
            MeasurementError: There are no answers, or no wrong answers, to compare with, or answers of more tokens than it reads.
        """
        if prompts.targets.shape[1]:
            if not self.reads_steps:
                raise MeasurementError(
                    f"The metric {self.name} reads one token, and these prompts have answers of up to {prompts.n_scored} tokens. Use "
                    "metric=log_prob, which scores all of them, or answers of one token."
                )
            return
        for what, sets, needed in (("answer", prompts.answers, self.reads_answers), ("wrong answer", prompts.wrongs, self.reads_wrongs)):
            empty = int((sets.sizes == 0).sum())
            if needed and empty:
                raise MeasurementError(
                    f"The metric {self.name} needs at least one {what} per prompt, and {empty} of {len(prompts)} prompts have none. Give "
                    "them one, or take a metric that does without (metric=log_prob for prompts without wrong answers, metric=kl for "
                    "prompts without any)."
                )
