"""LoggerGroup: many loggers as one, of which a broken one cannot end a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from circuitkit.core.errors import UserError
from circuitkit.core.records import Artifact
from circuitkit.loggers.base import Logger, Status

_log = logging.getLogger(__name__)

Verb = Literal["log_config", "log_metrics", "log_artifact", "finalize"]


class LoggerGroup(Logger):
    """Passes each verb to all loggers, the essential ones first.

    An essential logger's error is raised, except at the end of a run that failed already, whose own error says more.
    Any other's is reported once, and the run goes on.

    Attributes:
        loggers: The members, in the order in which they are told.
        failures: How often each member failed, without those whose error was raised; by position in ``loggers``.
    """

    essential = True

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        self.loggers = tuple(sorted(loggers, key=lambda logger: not logger.essential))
        self.failures: dict[int, int] = {}

    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Starts all. A ``UserError`` (such as a folder that holds a finished run) is raised before the next one is started."""
        self._tell("log_config", name, settings)

    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Passes numbers on."""
        self._tell("log_metrics", metrics, step)

    def log_artifact(self, artifact: Artifact) -> None:
        """Passes a file or table on."""
        self._tell("log_artifact", artifact)

    def finalize(self, status: Status) -> None:
        """Ends all, also where one of them fails."""
        self._tell("finalize", status)

    def _tell(self, verb: Verb, *args: Any) -> None:
        first_error: Exception | None = None
        for position, logger in enumerate(self.loggers):
            try:
                getattr(logger, verb)(*args)
            except Exception as error:  # whatever a tracker throws, the run is worth more
                if verb == "log_config" and (logger.essential or isinstance(error, UserError)):
                    raise
                if logger.essential and (verb != "finalize" or args[0] == "finished"):
                    first_error = first_error or error
                else:
                    self._count(position, verb, error)
        if first_error is not None:
            raise first_error

    def _count(self, position: int, verb: Verb, error: Exception) -> None:
        self.failures[position] = self.failures.get(position, 0) + 1
        if self.failures[position] == 1:
            name = type(self.loggers[position]).__name__
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning("%s failed in %s (%s). That does not end the run; its further failures are not reported.", name, verb, reason)
