"""Log-probability of the answer."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Values
from circuitkit.metrics import functional
from circuitkit.metrics.base import Floor, Metric


class LogProb(Metric):
    """Log-probability of the answers together, nats. 100 % is the untouched model, 0 % everything ablated. Final.

    Answers of several tokens are scored by teacher forcing: the log-probability of each of their tokens behind those before it.

    Args:
        reduce: ``sum`` over the tokens of an answer, which is the log-probability of the answer; or their ``mean``, for answers of
            different numbers of tokens.
        zero: What counts as 0 %, as for every metric.

    Raises:
        ConfigError: No such reduction.
    """

    name = "log_prob"
    unit = "nats"
    higher_is_better = True
    floor = Floor.ABLATED
    reads_wrongs = False
    reads_steps = True

    def __init__(self, reduce: Literal["sum", "mean"] = "sum", zero: Literal["zero", "ablated"] | None = None) -> None:
        super().__init__(zero)
        if reduce not in ("sum", "mean"):
            raise ConfigError(unknown_choice("reduction over the tokens of an answer (metric.reduce)", reduce, ("sum", "mean")))
        self.reduce = reduce

    def score(self, logits: Float[Tensor, "*axes d_vocab"], prompts: PromptSet, *, clean_logits: CleanLogits | None = None) -> Values:
        if not prompts.targets.shape[1]:
            return functional.log_prob(logits, prompts.answers)
        steps = logits if prompts.n_scored > 1 else logits.unsqueeze(-2)
        return functional.continuation_log_prob(steps, prompts.targets, mean=self.reduce == "mean")
