"""Guards: callbacks that end a run whose numbers have stopped to mean anything."""

from __future__ import annotations

import math

from circuitkit.callbacks.base import Callback
from circuitkit.core.errors import MeasurementError
from circuitkit.core.records import Step


class NanGuard(Callback):
    """Ends a search at the first score that is no number, since every later decision would rest on it."""

    def on_step(self, step: Step) -> None:
        """Looks at the candidate's score.

        Raises:
            MeasurementError: The score is NaN or infinite.
        """
        if not math.isfinite(step.score):
            raise MeasurementError(
                f"Expected a finite score in %, found {step.score} for {step.node} in sweep {step.sweep}. "
                "Half precision that overflowed and a baseline of 0 are the usual causes: "
                "load the model in float32, or choose another metric or other prompts."
            )
