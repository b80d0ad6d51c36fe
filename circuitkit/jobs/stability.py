"""The same search over corruptions, seeds, orders and thresholds, and what its circuits have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from circuitkit import storage
from circuitkit.config import build
from circuitkit.core.bodies import Stability
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.findings import Finding
from circuitkit.evaluation.stability import FACTORS, SearchRun, stability
from circuitkit.jobs import measuring
from circuitkit.jobs.circuit_files import origin
from circuitkit.jobs.find import check_parts, find, load
from circuitkit.jobs.finished import AlreadyFinished, Finished
from circuitkit.models.hooked import HookedModel
from circuitkit.tasks import Task

_log = logging.getLogger(__name__)

# Each list of the configuration, with the setting that it varies.
_GRID = {"corruptions": "task.corruption", "seeds": "task.seed", "orders": "method.order", "thresholds": "method.threshold"}


def run(config: DictConfig) -> None:
    """Runs the search once for each combination, on one model, each run in a folder of its own; then says what they have in common."""
    settings = grid(config)
    for setting in settings:  # a wrong setting is refused before the first search
        one = configured(config, setting)
        check_parts(one)
        task = build(one.task, Task)
    with measuring.recording(config) as group:
        model = load(config)
        measuring.start(group, config)
        runs = [searched(config, setting, model) for setting in settings]
        finding = stability(runs, task=task.name, provenance=origin((run.label, run.circuit) for run in runs))
        measuring.leave(group, finding, numbers(finding.body))
    show(finding, measuring.folder_of(config))


def grid(config: DictConfig) -> list[dict[str, Any]]:
    """The combinations of the lists to run; a list that is null stands for the one value that is configured.

    Raises:
        ConfigError: A list is empty or holds a value twice, or the task or method has no such setting, or there is no such design.
    """
    if config.design not in DESIGNS:
        raise ConfigError(unknown_choice("design", config.design, DESIGNS))
    values = []
    for key, setting in _GRID.items():
        chosen, configured_value = config[key], OmegaConf.select(config, setting)
        if chosen is None:
            values.append([configured_value])
            continue
        if not isinstance(chosen, ListConfig) or not chosen or len(set(chosen)) < len(chosen):
            raise ConfigError(f"{key} must be a list of values, each once, such as {_example(key)}, or null; found {chosen}.")
        if configured_value is None:
            group, _, field = setting.partition(".")
            raise ConfigError(f"{key} varies {setting}, but this {group} has no {field}. Set {key}=null, or take another {group}.")
        values.append(list(chosen))
    return [dict(zip(FACTORS, combination, strict=True)) for combination in DESIGNS[config.design](values)]


def star(values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The first value of each list together, and every other value in its place with the others as they were."""
    centre = tuple(each[0] for each in values)
    return [centre, *((*centre[:place], other, *centre[place + 1 :]) for place, each in enumerate(values) for other in each[1:])]


DESIGNS: dict[str, Callable[[Sequence[Sequence[Any]]], Iterable[tuple[Any, ...]]]] = {"grid": lambda values: product(*values), "star": star}
"""Which combinations are run: all of them, or those that differ from the first in one factor."""


def configured(config: DictConfig, setting: Mapping[str, Any]) -> DictConfig:
    """The configuration of one run."""
    one = deepcopy(config)
    for key, value in zip(_GRID.values(), setting.values(), strict=True):
        if value is not None:
            OmegaConf.update(one, key, value)
    return one


def searched(config: DictConfig, setting: Mapping[str, Any], model: HookedModel) -> SearchRun:
    """The circuit of one combination, from its folder if the very same run has finished there before.

    Raises:
        ConfigError: The method finds no circuit.
    """
    one = configured(config, setting)
    label = SearchRun(Circuit((), model.n_layers, model.n_heads), **setting).label
    folder, finished = measuring.folder_of(config), Finished(config.dir)
    one.dir, one.name, one.overwrite = str(folder / label), f"{config.name}-{label}", True
    _log.info("Search %s", label)
    try:
        result = find(one, model, check=None if config.rerun else finished.refuse)
    except AlreadyFinished as done:
        _log.info("%s", done)
        return SearchRun(storage.load(Circuit, done.folder / "circuit.json"), **setting)
    if result.circuit is None:
        raise ConfigError("job=stability needs a method that finds a circuit, such as method=iterative_pruning.")
    finished.add(result.info.content_hash, one.dir)
    return SearchRun(result.circuit, **setting)


def numbers(body: Stability) -> dict[str, float]:
    """What the grid is summed up by."""
    found: dict[str, float] = {
        "stability/runs": len(body["runs"]),
        "stability/survive_all": len(body["survive_all"]),
        "stability/survive_corruptions": len(body["survive_corruptions"]),
    }
    return found | {f"stability/jaccard_{factor}": value for factor, value in body["mean_jaccard"].items() if value is not None}


def show(finding: Finding[Stability], folder: Path) -> None:
    """Prints the runs, what they have in common, and where it is."""
    body = finding.body
    units: Literal["edges", "nodes"] = "edges" if "edges" in body else "nodes"
    runs = Table("run", units, "score", box=None, pad_edge=False)
    for one in body["runs"]:
        runs.add_row(one["label"], str(len(one[units])), "" if one["score"] is None else f"{one['score']:.1f} %")
    jaccard = Table("pairs that differ in", "mean Jaccard", box=None, pad_edge=False)
    for factor, value in body["mean_jaccard"].items():
        jaccard.add_row("anything" if factor == "all" else f"the {factor} alone", "no such pair" if value is None else f"{value:.2f}")
    shares = Table(units.removesuffix("s"), "share of runs", box=None, pad_edge=False)
    for name, each in sorted(body[units].items(), key=lambda item: -item[1]["share"]):
        shares.add_row(name, f"{100 * each['share']:.0f} %")
    console = Console(highlight=False)
    console.print(runs, "", jaccard, "", shares, "", sep="\n")
    console.print(f"in every run: {' '.join(body['survive_all']) or 'nothing'}")
    console.print(f"in every run that differs from the first in its corruption alone: {' '.join(body['survive_corruptions']) or 'nothing'}")
    console.print(f"folder    {folder}", soft_wrap=True)


def _example(key: str) -> str:
    return {"corruptions": "[random,repeat_last]", "seeds": "[0,1]", "orders": "[backward,forward]", "thresholds": "[0.7,0.8]"}[key]
