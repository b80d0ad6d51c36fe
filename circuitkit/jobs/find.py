"""The main job: find the circuit of a task in a model."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from circuitkit.callbacks import Callback
from circuitkit.config import build, build_each
from circuitkit.engine import Engine
from circuitkit.loggers import JsonlLogger, Logger
from circuitkit.methods import Method
from circuitkit.metrics import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Patcher
from circuitkit.results import RunResult
from circuitkit.runner import Runner
from circuitkit.tasks import Task


def run(config: DictConfig) -> None:
    """Finds the circuit and says what was found."""
    config.dir = HydraConfig.get().runtime.output_dir
    show(find(config), Path(config.dir))


def find(config: DictConfig, model: HookedModel | None = None) -> RunResult:
    """Builds the parts that the configuration names and runs them.

    Args:
        config: Of the run; ``dir`` is its folder.
        model: Already loaded; None to load the one that the configuration names.
    """
    task = build(config.task, Task)  # small parts first: a wrong setting is refused before a large model is loaded
    method = build(config.method, Method)
    patcher = build(config.patcher, Patcher)
    metric = build(config.metric, Metric)
    engine = build(config.engine, Engine)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    JsonlLogger(config.dir, overwrite=config.overwrite).check_unused()  # before minutes are spent on loading a large model
    runner = Runner(loggers=loggers(config), callbacks=build_each(config.callback, Callback))
    return runner.run(
        model=model or load(config),
        task=task,
        method=method,
        patcher=patcher,
        metric=metric,
        engine=engine,
        name=config.name,
        settings={str(key): value for key, value in settings.items()},
    )


def load(config: DictConfig) -> HookedModel:
    """Loads the model that the configuration names."""
    return build(config.model, HookedModel)


def loggers(config: DictConfig) -> list[Logger]:
    """The run folder, then whatever else the configuration names. Those that can group runs group them by sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        for node in config.logger.values():
            if "group" in node and node.group is None:
                node.group = "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])
    return [JsonlLogger(config.dir, overwrite=config.overwrite), *build_each(config.logger, Logger)]


def show(result: RunResult, folder: Path) -> None:
    """Prints what was found, and where it is."""
    table = Table(show_header=False, box=None, pad_edge=False)
    clean, patched = (values.mean().item() for values in (result.baseline.clean, result.baseline.patched))
    table.add_row("baseline", f"{clean:.3f} {result.baseline.unit} (everything replaced: {patched:.3f})")
    if result.circuit is not None:
        circuit = result.circuit
        score = "not measured" if circuit.score is None else f"{circuit.score:.1f} %"
        table.add_row("score", score)
        table.add_row("circuit", f"{len(circuit.heads)} heads, {len(circuit.mlps)} MLPs")
        table.add_row("members", " ".join(circuit.names))
    if result.scores is not None:
        lowest = ", ".join(f"{name} {value:.1f}" for name, value in result.scores.top(10))
        table.add_row("lowest", f"{lowest} ({result.scores.unit})")
    console = Console(highlight=False)
    console.print(table)
    files = " ".join(sorted(file.name for file in folder.iterdir() if file.is_file()))
    console.print(f"folder    {folder}\nfiles     {files}\n", soft_wrap=True)
