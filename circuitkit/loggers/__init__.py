"""Where a run's numbers and files go. Loggers that need a tracker's package are loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.loggers.jsonl import JsonlLogger
from circuitkit.loggers.redaction import redacted

if TYPE_CHECKING:
    from circuitkit.loggers.mlflow import MlflowLogger
    from circuitkit.loggers.tensorboard import TensorBoardLogger
    from circuitkit.loggers.wandb import WandbLogger

__all__ = ["JsonlLogger", "Logger", "LoggerGroup", "MlflowLogger", "Status", "TensorBoardLogger", "WandbLogger", "redacted"]

_TRACKERS = {"MlflowLogger": "mlflow", "TensorBoardLogger": "tensorboard", "WandbLogger": "wandb"}


def __getattr__(name: str) -> Any:
    if name in _TRACKERS:
        return getattr(import_module(f"{__name__}.{_TRACKERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
