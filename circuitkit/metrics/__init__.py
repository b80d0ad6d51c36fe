"""Metrics: what an intervention cost."""

from circuitkit.metrics.accuracy import Accuracy
from circuitkit.metrics.base import Floor, Metric
from circuitkit.metrics.kl import KL
from circuitkit.metrics.log_prob import LogProb
from circuitkit.metrics.logit_diff import LogitDiff
from circuitkit.metrics.prob_diff import ProbDiff
from circuitkit.metrics.rank import AnswerRank

__all__ = ["KL", "Accuracy", "AnswerRank", "Floor", "LogProb", "LogitDiff", "Metric", "ProbDiff"]
