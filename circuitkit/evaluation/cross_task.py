"""Every circuit on every task's prompts, with controls."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.bodies import CrossTask, LevelOfEdges
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError, ConfigError
from circuitkit.core.findings import Finding
from circuitkit.engine.base import Engine
from circuitkit.evaluation.bootstrap import resampled
from circuitkit.evaluation.controls import random_sets
from circuitkit.evaluation.scoring import Measured, NamedMasks, measured, member_mask


@dataclass(frozen=True)
class _Row:
    label: str
    circuit: Circuit
    is_control: bool = False
    is_random: bool = False

    def size(self, draws: int) -> int:
        """How many masks it stands for."""
        return draws if self.is_random else 1


def cross_task(
    engines: Iterable[tuple[str, Engine]],
    circuits: Mapping[str, Circuit],
    *,
    controls: Mapping[str, Circuit] | None = None,
    draws: int = 20,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    provenance: Mapping[str, Any] | None = None,
) -> Finding[CrossTask]:
    """Scores every circuit on every task, in % of the untouched model on that task.

    Random circuits of each circuit's size are a control of their own: their row holds the mean over the draws, whose scores are in
    ``random_scores``.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), each circuit on each task's prompts.

    Args:
        engines: Task names with engines on their prompts, all of one model. Taken one after the other, so they can be made when they are
            asked for. For circuits of edges an engine over the edges of each frame (components between which edges were searched): the
            name of a task then comes once for each, and each circuit is scored over the edges of its own frame.
        circuits: By label, all of one level.
        controls: Circuits of something else, such as a published one, by label.
        draws: Random circuits of each circuit's size; 0 for none.
        seed: Of the draws.
        resamples: Of the bootstrap.
        confidence: Of the intervals.
        provenance: Settings, versions and hashes to keep with the result.

    Returns:
        A finding of kind ``cross_task``. Its rows, named in ``circuits``, are the circuits and then the controls, which ``controls``
        names once more.

    Raises:
        CircuitError: A circuit is empty, of another level than the others or the engines' masks, of another model, or of edges between
            components for which a task has no engine.
        ConfigError: No circuit or task, a label given twice, less than no draws, or less than one resample.
        MeasurementError: The model cannot do one of the tasks, or a score is not finite.
    """
    rows = _rows(circuits, controls or {}, draws)
    columns, n_prompts, random_scores, model, level = [], {}, {}, "", rows[0].circuit.level
    for task, of_task in groupby(engines, lambda each: each[0]):
        values: Measured = {}
        for _, engine in of_task:
            masks = _masks(engine, [row for row in rows if _scores(engine, row.circuit)], draws, seed)
            values |= measured(engine, [NamedMasks(masks)])
            baseline, n_prompts[task], model = engine.baseline(), len(engine.prompts), engine.model.name
        _check_all_scored(rows, values, task)
        draws_of = {row.label: torch.stack([values[row.label, place] for place in range(row.size(draws))]) for row in rows}
        table = torch.stack([each.mean(0) for each in draws_of.values()])
        columns.append(resampled(baseline, table, resamples=resamples, confidence=confidence, seed=seed))
        random_scores[task] = {row.label: baseline.percent(draws_of[row.label]).tolist() for row in rows if row.is_random}
    if not columns:
        raise ConfigError("tasks is empty. Name at least one task.")
    of_edges: LevelOfEdges = {"level": level.value} if level.of_edges else {}
    body: CrossTask = {
        "model": model,
        "circuits": [row.label for row in rows],
        "controls": [row.label for row in rows if row.is_control],
        "tasks": list(n_prompts),
        "percent": [[column.interval(place).plain() for column in columns] for place in range(len(rows))],
        "n_prompts": n_prompts,
        "members": {row.label: [] if row.is_random else row.circuit.member_names for row in rows},
        **of_edges,
        "random_scores": random_scores,
        "draws": draws,
        "confidence": confidence,
        "resamples": resamples,
    }
    return Finding("cross_task", f"Each circuit on each task in {model}", body, provenance or {})


def _rows(circuits: Mapping[str, Circuit], controls: Mapping[str, Circuit], draws: int) -> list[_Row]:
    if not circuits or draws < 0:
        raise ConfigError(f"Expected at least one circuit and draws of 0 or more, found {len(circuits)} circuits and draws={draws}.")
    rows = [_Row(label, circuit) for label, circuit in circuits.items()]
    rows += [_Row(label, circuit, is_control=True) for label, circuit in controls.items()]
    for row in rows:
        rows[0].circuit.check_level(row.circuit)
    if draws:
        rows += [_Row(f"random like {label}", circuit, is_control=True, is_random=True) for label, circuit in circuits.items()]
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is the label of several circuits. Give each circuit and each control a name of its own.")
    return rows


def _scores(engine: Engine, circuit: Circuit) -> bool:
    """Whether a circuit is scored by this engine: one of edges by that over the edges of its frame."""
    if engine.universe.level.of_edges and circuit.level.of_edges:
        return engine.universe.as_edges().nodes == circuit.within
    return True  # of one level, or refused with its label


def _check_all_scored(rows: Sequence[_Row], values: Measured, task: str) -> None:
    missing = [row.label for row in rows if (row.label, 0) not in values]
    if missing:
        raise CircuitError(
            f"No engine for {task} is over the edges between the components of {', '.join(missing)}. Give one made by "
            "`engine.edges(circuit.frame, level=circuit.level)` for each circuit."
        )


def _masks(engine: Engine, rows: Sequence[_Row], draws: int, seed: int) -> dict[Hashable, Bool[Tensor, " unit"]]:
    """The masks of each row, by label and number: one, or as many as there are draws."""
    masks: dict[Hashable, Bool[Tensor, " unit"]] = {}
    for row in rows:
        kept = member_mask(engine, row.circuit, row.label)
        drawn = random_sets(engine.universe, row.circuit.members, draws=draws, seed=seed) if row.is_random else []
        each = [engine.universe.mask(nodes) for nodes in drawn] if row.is_random else [kept]
        masks |= {(row.label, place): mask for place, mask in enumerate(each)}
    return masks
