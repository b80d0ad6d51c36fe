"""Evaluation: what a circuit is worth, on its own task and on others, against chance, and how stable it is."""

from circuitkit.evaluation.bootstrap import Interval
from circuitkit.evaluation.cross_task import cross_task
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.evaluation.generation import Generated, generate
from circuitkit.evaluation.overlap import compare
from circuitkit.evaluation.solvable import solvable_prompts
from circuitkit.evaluation.stability import SearchRun, stability
from circuitkit.evaluation.transfer import transfer

__all__ = [
    "Generated",
    "Interval",
    "SearchRun",
    "compare",
    "cross_task",
    "evaluate",
    "generate",
    "solvable_prompts",
    "stability",
    "transfer",
]
