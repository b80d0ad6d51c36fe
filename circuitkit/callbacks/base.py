"""Callback: what wants to be told how a run goes."""

from __future__ import annotations

from typing import Any

from circuitkit.core.records import RunInfo, Step


class Callback:
    """Hears of a run's events. Override what you need; a method ``on_...`` that is none of these is refused when the class is made."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = {name for name in vars(Callback) if name.startswith("on_")}
        for name in vars(cls):
            if name.startswith("on_") and name not in known:
                events = ", ".join(sorted(known))
                raise TypeError(f"{cls.__name__}.{name} is not an event of a run, so it would never be called. Events: {events}.")

    def on_run_start(self, info: RunInfo) -> None:
        """Called when model and prompts are ready, before the first score."""

    def on_baseline(self, baseline: Any) -> None:
        """Called with the scores of the untouched and of the fully patched model."""

    def on_step(self, step: Step) -> None:
        """Called after each evaluated candidate."""

    def on_discover_end(self, result: Any) -> None:
        """Called when the method is done, with the result so far."""

    def on_evaluate_end(self, result: Any) -> None:
        """Called when the found circuit was scored once more."""

    def on_checkpoint(self, result: Any) -> None:
        """Called when the result is about to be written."""

    def on_exception(self, error: BaseException) -> None:
        """Called when the run fails or is interrupted, before loggers are finalized."""

    def on_run_end(self, result: Any) -> None:
        """Called last, when everything is written. Not called after an exception."""
