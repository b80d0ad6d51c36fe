"""What jobs share that measure something of given circuits: prompts, an engine, and where the result goes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from circuitkit.config import build
from circuitkit.core.circuit import Circuit
from circuitkit.core.describe import describe
from circuitkit.core.errors import ConfigError, noted
from circuitkit.core.findings import Finding
from circuitkit.core.node import Level
from circuitkit.core.records import TextArtifact
from circuitkit.engine import Engine
from circuitkit.engine.distributed import shared
from circuitkit.engine.units import Attentions, Neurons, Nodes, Units
from circuitkit.evaluation import solvable_prompts
from circuitkit.jobs.find import loggers
from circuitkit.jobs.found_with import found_with, measured_with, warn_of_others
from circuitkit.jobs.metrics import metric_of
from circuitkit.loggers import JsonlLogger
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.metrics import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.patchers import Patcher
from circuitkit.results import run_info
from circuitkit.storage.literature import PublishedCircuit, fitted
from circuitkit.tasks import Task

# Levels of circuits whose members are no heads and MLPs.
_NEED_UNITS = (Level.ATTENTION, Level.NEURON, Level.FEATURE, Level.MIXED)


@dataclass(frozen=True)
class Parts:
    """What a measurement is made of besides the model; built before a large model is loaded, so that a wrong setting is refused first.

    Attributes:
        patcher: What removed components are replaced by.
        metric: What that costs.
        engine: Makes the engine.
        units: What can be in a circuit, where no circuit says it.
        least_accuracy: Share of the prompts drawn that the model must solve.
        force: Go on where it solves fewer.
        edge_patcher: By what a removed edge replaces what its sender gives, for circuits of edges; None for the patcher.
    """

    patcher: Patcher
    metric: Metric
    engine: Any
    units: Units
    least_accuracy: float
    force: bool
    edge_patcher: Patcher | None = None

    @classmethod
    def of(cls, config: DictConfig) -> Parts:
        """Those that the configuration names."""
        patcher, metric, engine = build(config.patcher, Patcher), metric_of(config), build(config.engine, Engine)
        edge_patcher = None if config.edge_patcher is None else build(config.edge_patcher, Patcher)
        return cls(patcher, metric, engine, build(config.units, Units), config.least_accuracy, config.force, edge_patcher)

    def on(self, model: HookedModel, task: Task, circuits: Collection[Circuit]) -> Engine:
        """An engine over nodes on the task's prompts, over the units that circuits have.

        Raises:
            MeasurementError: The model cannot do the task.
            ConfigError: No such units were configured, or others than a circuit was found among.
        """
        units = self._units_of(circuits)
        prompts = solvable_prompts(task, model, least_accuracy=self.least_accuracy, force=self.force)
        featurizers = units.featurizers()
        options = {"featurizers": featurizers} if featurizers else {}
        engine = self.engine(model, prompts, self.patcher, self.metric, units.universe(model), **options)
        for each in circuits:
            _check_units(each, engine, units)
            name = f"A circuit of {len(each.member_names)} units found on {each.provenance.get('task', 'an unknown task')}"
            warn_of_others(name, found_with(each), measured_with(self.patcher, self.edge_patcher, self.metric), "is measured here")
        return engine

    def _units_of(self, circuits: Iterable[Circuit]) -> Units:
        """Those that were configured; where none were, those of the circuits' level."""
        known = {Level.ATTENTION: Attentions(), Level.NEURON: Neurons()}
        levels = {each.level for each in circuits}
        if self.units != Nodes() or not levels & set(_NEED_UNITS):
            return self.units
        level = min(levels & set(_NEED_UNITS))
        if level in known:
            return known[level]
        raise ConfigError(
            f"A circuit of level {level} is scored over units that its file does not have. Name them as in the search that found it, such "
            "as units=features units.dictionaries=[saes/layer_8]."
        )

    def over(self, nodes: Engine, circuit: Circuit) -> Engine:
        """The engine over what a circuit has: for one of edges one over the edges of its frame, made from that over nodes.

        Raises:
            UserError: Edges cannot be scored by this engine or in this model.
        """
        if not circuit.level.of_edges:
            return nodes
        return nodes.edges(circuit.frame, level=circuit.level, patcher=self.edge_patcher)

    def provenance(self, engine: Engine, task: Task, question: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, seed, versions, model and hashes of a measurement.

        Args:
            engine: Of the measurement.
            task: Whose prompts it has.
            question: What was asked besides, plain values only.
        """
        parts = {"task": task, "patcher": self.patcher, "metric": self.metric, "question": question}
        if engine.universe.level.of_edges:
            parts["edge_patcher"] = self.edge_patcher or self.patcher
        return dict(run_info("", engine, parts, None).provenance)


def _check_units(circuit: Circuit, engine: Engine, units: Units) -> None:
    """Refuses to score a circuit over other units than it was found among, or with other dictionaries."""
    found = circuit.provenance.get("universe")
    featurizers = circuit.provenance.get("settings", {}).get("engine", {}).get("featurizers")
    here = describe(engine).get("featurizers")
    if found is not None and (found != engine.universe.digest() or featurizers != here):
        raise ConfigError(
            f"A circuit of level {circuit.level} was found among other units than units={type(units).__name__.lower()} are here, so its "
            "score would be another. Name them as in the search that found it, such as units=neurons units.layers=[3]; its file has them "
            "under provenance, settings, method, units."
        )


def sampling(config: DictConfig, *, least_draws: int) -> dict[str, Any]:
    """The settings of random draws and intervals.

    Raises:
        ConfigError: One of them is out of its range.
    """
    found = {key: config[key] for key in ("draws", "seed", "resamples", "confidence")}
    for key, least in (("draws", least_draws), ("seed", 0), ("resamples", 1)):
        if type(found[key]) is not int or found[key] < least:
            raise ConfigError(f"{key} must be a whole number of at least {least}, found {found[key]!r}.")
    if type(found["confidence"]) is not float or not 0 < found["confidence"] < 1:
        raise ConfigError(f"confidence must be a number between 0 and 1, such as 0.95; found {found['confidence']!r}.")
    return found


@contextmanager
def recording(config: DictConfig) -> Iterator[LoggerGroup]:
    """Takes the run folder, and gives it and the configured loggers as one; they are finalized whatever happens.

    Raises:
        ConfigError: The folder holds a finished run.
    """
    config.dir = HydraConfig.get().runtime.output_dir
    folder = JsonlLogger(config.dir, overwrite=config.overwrite)
    folder.claim()
    with finalized(LoggerGroup([folder, *loggers(config)] if processes().is_first else [folder]), config) as group:
        yield group


@contextmanager
def finalized(group: LoggerGroup, config: DictConfig) -> Iterator[LoggerGroup]:
    """Within this context loggers follow a job; then they are told how it ended."""
    try:
        yield group
    except BaseException as error:
        noted(error, f"in the run {config.name}")
        group.finalize("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
        raise
    group.finalize("finished")


def start(group: LoggerGroup, config: DictConfig) -> None:
    """Tells the loggers of the settings, once nothing can be wrong with them any more."""
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    group.log_config(config.name, {str(key): value for key, value in settings.items()})


def leave(group: LoggerGroup, finding: Finding[Any], numbers: Mapping[str, float | int | str | bool]) -> None:
    """Hands a finding and its main numbers to the loggers."""
    group.log_metrics(numbers)
    group.log_artifact(TextArtifact(f"{finding.kind}.json", finding.to_json(), kind=finding.kind))


@contextmanager
def scorer(engine: Engine) -> Iterator[Engine | None]:
    """An engine that is checked and that all processes of the launch share; None in a process that has only served the first one."""
    with shared(engine) as joined:
        if joined is not None:
            joined.check()
            joined.prepare()
        yield joined


def on_model(found: Circuit | PublishedCircuit, model: HookedModel) -> Circuit:
    """What a file holds, as a circuit of this model.

    Raises:
        CircuitError: It belongs to another model.
    """
    return fitted(found, model.name, model.n_layers, model.n_heads)


def asked(circuit: Circuit) -> Any:
    """A circuit as part of a question: its members, and of edges the frame in which they are measured."""
    if not circuit.level.of_edges:
        return circuit.member_names
    return {"level": circuit.level.value, "edges": circuit.member_names, "within": [str(node) for node in circuit.within]}


def folder_of(config: DictConfig) -> Path:
    """The run folder, as ``recording`` set it."""
    return Path(config.dir)


def spoken(value: float | None, low: float | None, high: float | None) -> str:
    """A score with its interval."""
    if value is None:
        return ""
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} [{low:.1f}, {high:.1f}]"
