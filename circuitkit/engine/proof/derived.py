"""Checks of what rests on a model's parts: that they add up to each layer, edges, and gradients. All against plain passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.core.node import Level, Node
from circuitkit.core.shapes import Acts
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.proof.doctor import Patient
from circuitkit.models.checks import Check, largest, relative, tolerance
from circuitkit.models.hooked import Layer
from circuitkit.patchers.base import Patcher

N_EDGES = 6
N_DIRECTIONS = 3
STEPS = (0.003, 0.0005)
"""How far soft masks are moved to either side; the second where the first does not agree. What picks experts or tokens jumps, and a
smaller step is less likely to meet a jump; a wrong derivative stays wrong."""
DERIVATIVE_TOLERANCE = 0.02


def addends(patient: Patient) -> Check:
    """What a layer adds to the residual stream is what its attention and its MLP add."""
    if not patient.model.map.additive:
        raise ModelError(
            f"In {patient.model.name} ({patient.model.map.family}) each sum passes through a norm before the next part is added, so the "
            "addends cannot be compared with what the layer adds. Take heads and MLPs as units, without edges."
        )
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(layer: Layer) -> None:
        resid, block = layer.resid, layer.block
        parts = torch.zeros_like(resid)
        if block.attention is not None:
            parts = parts + block.attention.scale * layer.attention_added
        if block.mlp is not None:
            parts = parts + block.mlp.scale * layer.mlp_added
        seen[layer.index] = parts, layer.out - resid

    patient.model.run(patient.prompts.clean, visit, **patient.prompts.padding(slice(0, len(patient.prompts))))
    differences = [relative(parts, whole) for parts, whole in seen.values()]
    what = "what attention and MLP add = what the layer adds to the residual stream"
    return Check.of("addends", what, largest(differences), tolerance(patient.model))


def edges(patient: Patient) -> Check:
    """Single edges and random masks of edges score what the naive path says, and a node without its edges what the node engine says.

    The second holds where edges have the naive path alone, too: it is another way to the same number.
    """
    model = patient.model
    level = Level.EDGE if any(block.heads is not None and not block.heads.has_ports for block in model.map.blocks) else Level.EDGE_QKV
    nodes = patient.engine(model, patient.prompts, patient.resample, patient.metric)
    engine = nodes.edges(level=level)
    naive, universe = engine.oracle, engine.universe.as_edges()
    some = [universe.unit(place * len(universe) // N_EDGES) for place in range(min(N_EDGES, len(universe)))]
    masks = torch.rand(2, len(universe), generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.5], [0.9]])
    found, expected = (torch.cat([each.alone(some), each.score(masks)]) for each in (engine, naive))
    units = [nodes.universe.unit(place * len(nodes.universe) // N_EDGES) for place in range(min(N_EDGES, len(nodes.universe)))]
    full = universe.full()
    without = torch.stack([universe.without(full, [edge for edge in universe.edges if edge.src == unit]) for unit in units])
    found, expected = torch.cat([found, engine.score(without)]), torch.cat([expected, nodes.alone(units)])
    what = (f"{len(some)} of {len(universe)} edges alone and {len(masks)} masks of edges = the naive path; {len(units)} nodes without the "
            "edges from them = these nodes replaced")  # fmt: skip
    return Check.of("edges", what, relative(found, expected), tolerance(model))


def gradients(patient: Patient) -> Check:
    """Derivatives of the metric by soft masks are the difference quotients of the naive path."""
    universe, generator = patient.model.universe, torch.Generator().manual_seed(0)
    mask = 0.3 + 0.4 * torch.rand(len(universe), generator=generator)
    directions = 2 * torch.rand(N_DIRECTIONS, len(universe), generator=generator) - 1
    patchers = (patient.zero, patient.resample)
    engines = [patient.engine(patient.model, patient.prompts, patcher, patient.metric) for patcher in patchers]
    found = torch.cat([directions.double() @ each.gradients().grad(mask).cpu().double() for each in engines])
    differences = []
    for step in STEPS:
        quotients = [_quotient(patient, patcher, mask, step * each) / step for patcher in patchers for each in directions]
        differences.append(relative(found, torch.tensor(quotients, dtype=torch.float64)))
        if differences[-1] <= DERIVATIVE_TOLERANCE:
            break
    what = f"derivatives by soft masks in {len(found)} directions = difference quotients of the naive path"
    return Check.of("gradients", what, min(differences), DERIVATIVE_TOLERANCE)


def _quotient(patient: Patient, patcher: Patcher, mask: Tensor, step: Tensor) -> float:
    """By how much the mean metric of the naive path rises over a step, from the same step to either side of a soft mask."""
    universe = patient.model.universe
    means = []
    for soft in (mask + step, mask - step):
        mixed = Soft(patcher, dict(zip(universe.nodes, soft.tolist(), strict=True)))
        engine = ReferenceEngine(patient.model, patient.prompts, mixed, patient.metric)
        means.append(engine.score(universe.empty()[None]).double().mean().item())
    return (means[0] - means[1]) / 2


class Soft(Patcher):
    """Mixes what a component computes with what another patcher gives: a soft mask, for the naive path. Final.

    Args:
        patcher: What a mask of 0 gives.
        mask: The share of each component that is left.
    """

    reads_activation = True

    def __init__(self, patcher: Patcher, mask: Mapping[Node, float]) -> None:
        self.patcher = patcher
        self.mask = mask
        self.needs = patcher.needs

    def patch(self, act: Acts, source: Acts | None, site: Node) -> Acts:
        return self.mask[site] * act + (1 - self.mask[site]) * self.patcher.patch(act, source, site)


DERIVED_CHECKS: tuple[Callable[[Patient], Check], ...] = (addends, edges, gradients)
"""In the order in which they are best read."""
