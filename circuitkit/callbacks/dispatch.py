"""Callbacks: the one place that calls hooks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

from circuitkit.callbacks.base import Callback

_log = logging.getLogger(__name__)

Event = Literal[
    "on_run_start", "on_baseline", "on_step", "on_discover_end", "on_evaluate_end", "on_checkpoint", "on_exception", "on_run_end"
]
TEAR_DOWN: tuple[Event, ...] = ("on_exception", "on_run_end")


class Callbacks:
    """Callbacks in the order in which they hear of events; they are torn down in the opposite one.

    Attributes:
        callbacks: The members.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)

    def notify(self, event: Event, *args: Any) -> None:
        """Calls one hook of every callback. Its error ends the run, except in ``on_exception``, where another already does."""
        for callback in reversed(self.callbacks) if event in TEAR_DOWN else self.callbacks:
            try:
                getattr(callback, event)(*args)
            except Exception as error:
                if event != "on_exception":
                    raise
                _log.warning("%s failed in on_exception (%s: %s).", type(callback).__name__, type(error).__name__, error)
