"""What every logger must keep to."""

from __future__ import annotations

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Node
from circuitkit.core.records import TableArtifact, TextArtifact
from circuitkit.loggers.base import Logger
from circuitkit.testing.base import STEP, Conformance


class LoggerConformance(Conformance):
    """What every logger must keep to. ``make`` returns one that writes where a test may."""

    def test_it_takes_a_whole_run(self) -> None:
        """The four verbs in order, with text, numbers that are not finite, tables and files."""
        logger: Logger = self.make()
        logger.log_config("toy", {"task": {"name": "months", "n": 4}, "seed": 0, "none": None, "list": [1, "a"]})
        logger.log_metrics({"baseline/logit_diff": 3.25, "run/prompts": 4})
        logger.log_metrics({"step/score": float("nan"), "step/node": "a0.h0", "step/kept": False}, step=0)
        logger.log_metrics({"step/score": float("inf"), "step/size": 11}, step=1)
        logger.log_artifact(TextArtifact("circuit.json", Circuit((Node.of_mlp(0),), 1, 1).to_json()))
        logger.log_artifact(TableArtifact("scores", [STEP.row(), STEP.row()]))
        logger.finalize("finished")

    def test_it_can_end_at_any_time(self) -> None:
        """A run may fail before or after it was configured."""
        for status in ("failed", "interrupted"):
            self.make().finalize(status)
        logger = self.make()
        logger.log_config("toy", {})
        logger.finalize("failed")
