"""How much of the model's performance a circuit has, what each member is worth, and how random circuits of its size do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.bodies import Drop, EvaluatedCircuit, Evaluation, Frame, Measure, PromptScores, RandomCircuits, RandomHead, RemovedSet
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Kind, Level, Unit
from circuitkit.core.universe import Universe
from circuitkit.engine.base import Engine
from circuitkit.evaluation.controls import random_sets
from circuitkit.evaluation.scoring import NamedMasks, NamedScores, measured, member_mask, scored

_CIRCUIT = "circuit"


@dataclass(frozen=True)
class _RemovedSet:
    """A set that is removed from the model at once, with random sets of its size."""

    label: str
    units: tuple[Unit, ...]
    controls: list[tuple[Unit, ...]]


def evaluate(
    engine: Engine,
    circuit: Circuit,
    *,
    label: str = "circuit",
    task: str = "",
    shared: Circuit | None = None,
    draws: int = 20,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    provenance: Mapping[str, Any] | None = None,
) -> Finding[Evaluation]:
    """Evaluates a circuit on an engine's prompts.

    All scores are in % of the untouched model. Intervals are bootstraps over prompts; all masks see the same resamples. The random heads'
    mean drop counts gains as 0. ``share_as_good`` of the random circuits is (1 + number at least as good) / (1 + draws), so it is never 0.
    Each set that is removed at once is followed by the mean over random sets with as many heads and MLPs, which avoid the set as far as the
    model has others (``in_common``: how many of its members they still have, on average); ``share_as_bad`` is (1 + number of them that
    leave no more) / (1 + draws).

    Of a circuit of edges the members are its edges, and the engine's masks are over the edges of its frame: the components between which
    they were searched. "The model" is then the frame with all of its edges (the whole model, if they were searched there), from which
    edges are removed one by one and at once; random circuits are as many edges of it; and there are no random heads, so that their mean
    drop is None.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), importance of components and random baselines.

    Args:
        engine: Scores masks over the kind of units that the circuit has.
        circuit: What to evaluate.
        label: Of the circuit, for people.
        task: Name of the task that the prompts are of.
        shared: A second set to remove at once from the full model, such as what several circuits share.
        draws: Random circuits, and random sets for each set that is removed.
        seed: Of all draws.
        resamples: Of the bootstrap.
        confidence: Of the intervals.
        provenance: Settings, versions and hashes to keep with the result.

    Returns:
        A finding of kind ``evaluation``.

    Raises:
        CircuitError: The circuit, or the shared set, is empty, of another level than the engine's masks, or of another model.
        ConfigError: Less than one draw or resample, or a confidence outside of (0, 1).
        MeasurementError: The model cannot do the task, or a score is not finite.
    """
    if draws < 1:
        raise ConfigError(f"draws must be at least 1, found {draws}.")
    universe, kept = engine.universe, member_mask(engine, circuit, label)
    if shared is not None:
        member_mask(engine, shared, "of the shared set")
    sets = _removed_sets(universe, circuit, label, shared, draws, seed)
    random_circuits = random_sets(universe, circuit.members, draws=draws, seed=seed)
    groups = _masks(universe, circuit, kept, sets, random_circuits)
    found = measured(engine, groups)
    found |= {("control", each.label): torch.stack([found["control", each.label, draw] for draw in range(draws)]).mean(0) for each in sets}
    scores = scored(engine, found, resamples=resamples, confidence=confidence, seed=seed)
    within: Frame = {"frame": [str(node) for node in circuit.within], "frame_edges": len(universe)} if circuit.level.of_edges else {}
    body: Evaluation = {
        "circuit": _described(circuit, label),
        **within,
        "task": task,
        "model": engine.model.name,
        **_measure(engine),
        "score": scores.interval(_CIRCUIT).plain(),
        "confidence": confidence,
        "resamples": resamples,
        "prompts": _prompts(engine, scores),
        "removed_from_circuit": {str(unit): _removed(scores, ("circuit without", unit), _CIRCUIT) for unit in circuit.members},
        "removed_from_model": {str(unit): _removed(scores, ("model without", unit)) for unit in circuit.members},
        "random_head": _random_head(scores, universe),
        "random_circuits": _random_circuits(scores, draws, engine.margin),
        "sets_removed_from_model": [entry for each in sets for entry in _removed_set(scores, each, engine.margin)],
    }
    return Finding("evaluation", f"{label} on {task or 'its prompts'} in {engine.model.name}", body, provenance or {})


def _masks(
    universe: Universe,
    circuit: Circuit,
    kept: Bool[Tensor, " unit"],
    sets: Sequence[_RemovedSet],
    random_circuits: Sequence[Sequence[Unit]],
) -> list[NamedMasks]:
    """Every mask to score, together with those that share most with it."""
    full = universe.full()
    members = set(circuit.members)
    alone = [unit for unit in universe if unit.kind is Kind.HEAD or unit in members]
    return [
        NamedMasks({_CIRCUIT: kept} | {("circuit without", unit): universe.without(kept, [unit]) for unit in circuit.members}, kept),
        NamedMasks(
            {("model without", unit): universe.without(full, [unit]) for unit in alone}
            | {("set", each.label): universe.without(full, each.units) for each in sets}
            | {("control", each.label, draw): universe.without(full, units) for each in sets for draw, units in enumerate(each.controls)},
            full,
        ),
        NamedMasks({("random circuit", draw): universe.mask(units) for draw, units in enumerate(random_circuits)}),
    ]


def _removed_sets(universe: Universe, circuit: Circuit, label: str, shared: Circuit | None, draws: int, seed: int) -> list[_RemovedSet]:
    """The circuit and the shared set, and the heads of each alone, because most sets hold nearly all MLPs."""
    whole = {label: circuit} | ({"the shared set": shared} if shared is not None else {})
    heads = {
        f"{name}, heads only": replace(each, nodes=each.heads)
        for name, each in whole.items()
        if each.heads and each.mlps and not each.level.of_edges
    }
    return [
        _RemovedSet(name, each.members, random_sets(universe, each.members, draws=draws, seed=seed, avoid=each.members))
        for name, each in (whole | heads).items()
    ]


def _described(circuit: Circuit, label: str) -> EvaluatedCircuit:
    told: EvaluatedCircuit = {
        "label": label,
        "nodes": list(circuit.names),
        "n_heads": len(circuit.heads),
        "n_mlps": len(circuit.mlps),
    }
    if circuit.level.of_edges:
        told |= {"level": circuit.level.value, "edges": circuit.member_names, "n_edges": len(circuit.edges)}
    elif circuit.level is not Level.NODE:
        told["size"] = circuit.summary
    return told


def _measure(engine: Engine) -> Measure:
    baseline = engine.baseline()
    return {
        "metric": engine.metric.name,
        "unit": baseline.unit,
        "zero": baseline.floor.value,
        "formula": baseline.floor.formula,
        "n_prompts": len(engine.prompts),
        "clean_mean": baseline.clean.double().mean().item(),
        "patched_mean": baseline.patched.double().mean().item(),
    }


def _prompts(engine: Engine, scores: NamedScores) -> list[PromptScores]:
    prompts, clean = engine.prompts, engine.baseline().clean.tolist()
    texts = [item.clean for item in prompts.items] or [f"prompt {row}" for row in range(len(prompts))]
    groups = [prompts.group_names[group] for group in prompts.groups.tolist()]
    rows = zip(texts, groups, clean, scores.prompts(_CIRCUIT).tolist(), strict=True)
    return [{"text": text, "group": group, "clean": whole, "circuit": part} for text, group, whole, part in rows]


def _removed(scores: NamedScores, key: object, reference: object | None = None) -> Drop:
    drop = scores.drop(key, reference)
    return {**scores.interval(key).plain(), "drop": drop.value, "drop_low": drop.low, "drop_high": drop.high}


def _random_head(scores: NamedScores, universe: Universe) -> RandomHead:
    drops = {str(node): scores.drop(("model without", node)).value for node in universe if node.kind is Kind.HEAD}
    mean = sum(max(0.0, drop) for drop in drops.values()) / len(drops) if drops else None  # there are none among edges
    return {"mean_drop": mean, "n": len(drops), "drops": drops}


def _random_circuits(scores: NamedScores, draws: int, margin: float) -> RandomCircuits:
    found = [scores.percent(("random circuit", draw)) for draw in range(draws)]
    as_good = sum(score >= scores.percent(_CIRCUIT) - margin for score in found)  # equal but for rounding is as good
    return {"scores": found, "mean": sum(found) / draws, "share_as_good": (1 + as_good) / (1 + draws)}


def _removed_set(scores: NamedScores, each: _RemovedSet, margin: float) -> list[RemovedSet]:
    """The set, and as one more entry the mean over its controls."""
    score, draws = scores.percent(("set", each.label)), len(each.controls)
    controls = [scores.percent(("control", each.label, draw)) for draw in range(draws)]
    as_bad = (1 + sum(control <= score + margin for control in controls)) / (1 + draws)
    interval = scores.interval(("set", each.label)).plain()
    mean = scores.interval(("control", each.label)).plain()
    names = [str(unit) for unit in each.units]
    in_common = sum(len({*control} & {*each.units}) for control in each.controls) / draws
    return [
        {"label": each.label, "nodes": names, "score": interval, "control_of": None, "share_as_bad": as_bad},
        {
            "label": f"random like {each.label}",
            "nodes": [],
            "score": mean,
            "control_of": each.label,
            "scores": controls,
            "in_common": in_common,
        },
    ]
