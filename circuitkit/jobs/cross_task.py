"""Every circuit on every task's prompts, with controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table

from circuitkit.config import build
from circuitkit.core.bodies import CrossTask
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError
from circuitkit.core.findings import Finding
from circuitkit.engine import Engine
from circuitkit.evaluation import cross_task
from circuitkit.jobs import measuring
from circuitkit.jobs.circuit_files import origin, read_listed
from circuitkit.jobs.demo import for_task
from circuitkit.jobs.find import load
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.tasks import Task


def run(config: DictConfig) -> None:
    """Scores the circuit files on the prompts of each of ``tasks``, and says what was found."""
    if not isinstance(config.tasks, ListConfig) or not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ConfigError(f"tasks must be a list of names, each once, such as [numerals,months]; found {config.tasks}.")
    found, controls = read_listed(config.circuits, "circuits", least=1), read_listed(config.controls, "controls", least=0)
    tasks = {name: build(for_task(config, name).task, Task) for name in config.tasks}
    parts, settings = measuring.Parts.of(config), measuring.sampling(config, least_draws=0)
    with measuring.recording(config) as group:
        model = load(config)
        circuits, others = ({label: measuring.on_model(each, model) for label, each in files.items()} for files in (found, controls))
        question = {"circuits": _members(circuits), "controls": _members(others), **settings}
        measured: dict[str, Any] = {}
        every = [*circuits.values(), *others.values()]
        scorers = _scorers(model, tasks, parts, every, question, measured)
        if not (processes().is_first or model.is_shared):
            for _ in scorers:
                pass
            return
        measuring.start(group, config)
        finding = cross_task(scorers, circuits, controls=others, **settings)
        provenance = {"tasks": measured, **origin((circuits | others).items())}
        finding = replace(finding, provenance=provenance)
        measuring.leave(group, finding, numbers(finding.body))
    show(finding, measuring.folder_of(config))


def numbers(body: CrossTask) -> dict[str, float]:
    """Every score, as numbers to log."""
    rows = zip(body["circuits"], body["percent"], strict=True)
    return {f"cross_task/{label}/{task}": cell["value"] for label, row in rows for task, cell in zip(body["tasks"], row, strict=True)}


def show(finding: Finding[CrossTask], folder: Path) -> None:
    """Prints the matrix, and where it is."""
    body = finding.body
    table = Table("circuit \\ prompts", *(f"{task} ({n})" for task, n in body["n_prompts"].items()), box=None, pad_edge=False)
    for label, row in zip(body["circuits"], body["percent"], strict=True):
        style = "dim" if label in body["controls"] else None
        table.add_row(label, *(measuring.spoken(**cell) for cell in row), style=style)
    console = Console(highlight=False)
    if "level" in body:
        console.print(f"circuits of edges (level {body['level']})\n")
    console.print(table, "", f"% of the untouched model, with {100 * body['confidence']:g} % intervals over prompts", sep="\n")
    console.print(f"folder    {folder}", soft_wrap=True)


def frames(circuits: Sequence[Circuit]) -> list[Circuit]:
    """One circuit for each engine that is needed: of nodes one engine scores all, of edges one those of one frame.

    Raises:
        CircuitError: They are of different levels.
    """
    for each in circuits:
        circuits[0].check_level(each)
    return list({(each.frame.nodes if each.level.of_edges else None): each for each in circuits}.values())


def _scorers(
    model: HookedModel,
    tasks: Mapping[str, Task],
    parts: measuring.Parts,
    circuits: Sequence[Circuit],
    question: Mapping[str, Any],
    measured: dict[str, Any],
) -> Iterator[tuple[str, Engine]]:
    """The engines of each task when they are asked for, so that one at a time takes memory. Notes where each comes from in ``measured``."""
    for name, task in tasks.items():
        nodes = parts.on(model, task, circuits)
        for circuit in frames(circuits):
            with measuring.scorer(parts.over(nodes, circuit)) as scorer:
                if scorer is not None:
                    measured.setdefault(name, parts.provenance(scorer, task, question))
                    yield name, scorer


def _members(circuits: Mapping[str, Circuit]) -> dict[str, Any]:
    return {label: measuring.asked(each) for label, each in circuits.items()}
