"""Logger: where a run's numbers and files go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from circuitkit.core.records import Artifact

Status = Literal["finished", "failed", "interrupted"]


class Logger(ABC):
    """Four verbs. A logger of your own implements them; one that breaks is reported once and never ends a run.

    Attributes:
        essential: Whether the run's result would be lost without this logger, so that its errors do end the run.
    """

    essential: ClassVar[bool] = False

    @abstractmethod
    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Called once at the start, with the run's name and every setting, nested, plain values only.

        A ``UserError`` from here ends the run before it costs anything, whatever the logger.
        """

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Called with numbers as they come; keys are ``<phase>/<metric>``. Without a step they belong to the whole run."""

    @abstractmethod
    def log_artifact(self, artifact: Artifact) -> None:
        """Called with each file or table that the run leaves."""

    @abstractmethod
    def finalize(self, status: Status) -> None:
        """Called last, exactly once, also after a failure, and also where ``log_config`` was refused or never came."""
