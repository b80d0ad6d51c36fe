"""The main job: find the circuit of a task in a model."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from circuitkit.callbacks import Callback, Journal
from circuitkit.config import build, build_each
from circuitkit.core.errors import ConfigError
from circuitkit.core.records import RunInfo
from circuitkit.engine import Engine
from circuitkit.engine.units import Units
from circuitkit.jobs import folders, outcome
from circuitkit.jobs.finished import AlreadyFinished, Finished
from circuitkit.jobs.metrics import metric_of
from circuitkit.jobs.model_shelf import SHELF
from circuitkit.jobs.objectives import Objective
from circuitkit.jobs.saved import saved
from circuitkit.loggers import JsonlLogger, Logger
from circuitkit.methods import Method
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Patcher
from circuitkit.results import RunResult
from circuitkit.runner import Runner
from circuitkit.storage.journal import JOURNAL, read
from circuitkit.tasks import Task

_log = logging.getLogger(__name__)


def run(config: DictConfig) -> float | None:
    """Finds the circuit and says what was found. Returns the number of ``objective``, for a sweeper."""
    if outcome.in_sweep() and config.resume is None:
        return objective(config, once(config))
    resume = config.resume is not None
    folder = HydraConfig.get().runtime.output_dir
    if resume and JsonlLogger(folder).has_finished:
        _log.info("The run in %s has finished already: there is nothing to go on with.", folder)
        return None
    if resume:
        config = saved(config)
    config.dir = folder
    show(find(config, resume=resume), Path(config.dir))
    return objective(config, Path(config.dir))


def once(config: DictConfig) -> Path:
    """Runs a job of a sweep, unless the same run has finished before. Returns the folder of the finished run."""
    config.finished_in = str(config.finished_in)  # before `dir` is set, which its default refers to
    config.dir = HydraConfig.get().runtime.output_dir
    config.overwrite = config.overwrite or config.rerun
    finished = Finished(config.finished_in)
    try:
        result = find(config, check=None if config.rerun else finished.refuse)
    except AlreadyFinished as done:
        _log.info("%s", done)
        outcome.note(same_as=os.path.relpath(done.folder, config.dir), content_hash=done.content_hash)
        return done.folder
    show(result, Path(config.dir))
    finished.add(result.info.content_hash, config.dir)
    outcome.note(content_hash=result.info.content_hash)
    return Path(config.dir)


def objective(config: DictConfig, folder: Path) -> float | None:
    """The number that a finished run has for a sweeper; None if the configuration names none."""
    wanted = objective_of(config)
    return None if wanted is None else wanted.value(folders.numbers(folder))


def objective_of(config: DictConfig) -> Objective | None:
    """What makes that number of a run."""
    return None if config.objective is None else build(config.objective, Objective)


def check_parts(config: DictConfig) -> None:
    """Makes the parts of a run for nothing, so that a wrong setting is refused before a large model is loaded.

    Raises:
        ConfigError: A part cannot be made.
    """
    build(config.task, Task)
    build(config.method, Method)
    build(config.patcher, Patcher)
    metric_of(config)
    build(config.engine, Engine)
    build_each(config.logger, Logger)
    build_each(OmegaConf.select(config, "callback"), Callback)
    objective_of(config)


def find(
    config: DictConfig, model: HookedModel | None = None, *, resume: bool = False, check: Callable[[RunInfo], None] | None = None
) -> RunResult:
    """Builds the parts that the configuration names and runs them.

    Args:
        config: Of the run; ``dir`` is its folder.
        model: Already loaded; None to load the one that the configuration names.
        resume: Go on with the run that was stopped in that folder.
        check: As for ``Runner.run``: may find that the run is not needed. Whether its folder can be used is looked at after that.
    """
    if config.model.get("tp_plan") and (resume or check is not None):
        raise ConfigError("A model over several processes (model.tp_plan) can neither be swept over nor gone on with. Start one run.")
    task = build(config.task, Task)  # small parts first: a wrong setting is refused before a large model is loaded
    method = build(config.method, Method)
    check_units(config, method)
    patcher = build(config.patcher, Patcher)
    metric = metric_of(config)
    engine = build(config.engine, Engine)
    callbacks = build_each(OmegaConf.select(config, "callback"), Callback)
    objective_of(config)
    folder = JsonlLogger(config.dir, overwrite=config.overwrite, resume=resume)
    others = loggers(config)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    if check is None:
        folder.claim()  # before minutes are spent on loading a large model
    try:
        recorded = read(Path(config.dir) / JOURNAL) if resume else None
        if resume and recorded is None:
            _log.info("The journal holds no whole record, so the run starts from its beginning.")
        runner = Runner(loggers=[folder, *others], callbacks=[Journal(config.dir, recorded), *callbacks])
        return runner.run(
            model=model or load(config),
            task=task,
            method=method,
            patcher=patcher,
            metric=metric,
            engine=engine,
            name=config.name,
            settings={str(key): value for key, value in settings.items()},
            resume=recorded,
            check=check,
        )
    finally:
        folder.release()


def check_units(config: DictConfig, method: Method) -> None:
    """Refuses units that the method does not search: they would be ignored.

    Raises:
        ConfigError: It searches others.
    """
    units = build(config.units, Units)
    if units != method.units:
        raise ConfigError(
            f"units={type(units).__name__.lower()} was asked for, and {method.name} searches {type(method.units).__name__.lower()} alone. "
            "Leave units out, or take a method that has them as a setting, such as knockout or iterative_pruning."
        )


def load(config: DictConfig) -> HookedModel:
    """Loads the model that the configuration names. Jobs that share a process share the model."""
    return SHELF.take(OmegaConf.to_yaml(config.model, resolve=True), lambda: build(config.model, HookedModel))


def loggers(config: DictConfig) -> list[Logger]:
    """Whatever the configuration names besides the run folder. Those that can group runs group them by sweep; those that name runs by an
    id are given one to keep, should the run be stopped and gone on with."""
    for node in config.logger.values():
        if node is not None and "id" in node and node.id is None:
            node.id = secrets.token_hex(4)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        for node in config.logger.values():
            if node is not None and "group" in node and node.group is None:
                node.group = "/".join(Path(HydraConfig.get().sweep.dir).parts[-2:])
    return build_each(config.logger, Logger)


def show(result: RunResult, folder: Path) -> None:
    """Prints what was found, and where it is."""
    table = Table(show_header=False, box=None, pad_edge=False)
    clean, patched = (values.mean().item() for values in (result.baseline.clean, result.baseline.patched))
    table.add_row("baseline", f"{clean:.3f} {result.baseline.unit} (everything replaced: {patched:.3f})")
    if result.circuit is not None:
        circuit = result.circuit
        score = "not measured" if circuit.score is None else f"{circuit.score:.1f} % ({result.baseline.floor.formula})"
        table.add_row("score", score)
        table.add_row("circuit", circuit.summary)
        table.add_row("members", " ".join(circuit.names))
        if circuit.level.of_edges:
            told = circuit.provenance
            alone = f"the circuit with all of them {told['node_score']:.1f} %, with those alone the score above"
            table.add_row("edges", f"{len(circuit.edges)} of {len(told['edge_scores'])} kept; {alone}")
    if result.scores is not None:
        lowest = ", ".join(f"{name} {value:.1f}" for name, value in result.scores.top(10))
        table.add_row("lowest", f"{lowest} ({result.scores.unit})")
    console = Console(highlight=False)
    console.print(table)
    files = " ".join(sorted(file.name for file in folder.iterdir() if file.is_file()))
    console.print(f"folder    {folder}\nfiles     {files}\n", soft_wrap=True)
