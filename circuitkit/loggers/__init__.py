"""Where a run's numbers and files go. ``WandbLogger`` is loaded on first use, so that nothing here imports wandb."""

from typing import TYPE_CHECKING, Any

from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.loggers.jsonl import JsonlLogger
from circuitkit.loggers.redaction import redacted

if TYPE_CHECKING:
    from circuitkit.loggers.wandb import WandbLogger

__all__ = ["JsonlLogger", "Logger", "LoggerGroup", "Status", "WandbLogger", "redacted"]


def __getattr__(name: str) -> Any:
    if name == "WandbLogger":
        from circuitkit.loggers.wandb import WandbLogger

        return WandbLogger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
