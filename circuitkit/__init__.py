"""circuitkit finds the circuits of language models: which heads and MLPs a behaviour needs, and the numbers that prove it.

    import circuitkit as ck
    result = ck.Runner(loggers=[ck.JsonlLogger("runs/months")]).run(
        model=ck.load_model("tiny_gpt2"), task=ck.tasks.Months(n=64), method=ck.methods.IterativePruning(threshold=0.8),
        patcher=ck.patchers.Mean(), metric=ck.metrics.LogitDiff())
    ck.save(result.circuit, "months.json")

Names are loaded when they are first used, so that ``import circuitkit`` and ``circuitkit --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitkit import analysis, callbacks, core, engine, evaluation, loggers, methods, metrics, models, patchers, storage, tasks
    from circuitkit.config import build
    from circuitkit.core.circuit import Circuit, Scores
    from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError, ModelError, PromptError, UserError
    from circuitkit.core.node import Edge, Node
    from circuitkit.core.prompts import Prompt, PromptSet
    from circuitkit.core.universe import Universe
    from circuitkit.loggers import JsonlLogger, WandbLogger
    from circuitkit.models.loading import load_model
    from circuitkit.results import RunResult
    from circuitkit.runner import Runner
    from circuitkit.storage import load, save

__version__ = "0.1.0"

_ROOMS = ("analysis", "callbacks", "core", "engine", "evaluation", "loggers", "methods", "metrics", "models", "patchers", "storage",
          "tasks")  # fmt: skip

_HOMES = {
    "Circuit": "core.circuit",
    "CircuitError": "core.errors",
    "ConfigError": "core.errors",
    "Edge": "core.node",
    "JsonlLogger": "loggers",
    "MeasurementError": "core.errors",
    "ModelError": "core.errors",
    "Node": "core.node",
    "Prompt": "core.prompts",
    "PromptError": "core.errors",
    "PromptSet": "core.prompts",
    "RunResult": "results",
    "Runner": "runner",
    "Scores": "core.circuit",
    "Universe": "core.universe",
    "UserError": "core.errors",
    "WandbLogger": "loggers",
    "build": "config",
    "load": "storage",
    "load_model": "models.loading",
    "save": "storage",
}

__all__ = [  # noqa: F822  loaded by __getattr__
    "Circuit",
    "CircuitError",
    "ConfigError",
    "Edge",
    "Universe",
    "JsonlLogger",
    "MeasurementError",
    "ModelError",
    "Node",
    "Prompt",
    "PromptError",
    "PromptSet",
    "RunResult",
    "Runner",
    "Scores",
    "Universe",
    "UserError",
    "WandbLogger",
    "__version__",
    "analysis",
    "build",
    "callbacks",
    "core",
    "engine",
    "evaluation",
    "load",
    "load_model",
    "loggers",
    "methods",
    "metrics",
    "models",
    "patchers",
    "save",
    "storage",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
