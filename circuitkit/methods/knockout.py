"""Every node knocked out alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import torch

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError, ConfigError
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import Step
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine
from circuitkit.engine.units import Units
from circuitkit.methods.base import NODES, Method, OnStep
from circuitkit.methods.recall import scored_in_parts
from circuitkit.models.hooked import HookedModel
from circuitkit.storage import load

# Entries of the masks that are made at a time: a layer of many neurons is told of in parts.
_ENTRIES = 2**26


class Knockout(Method):
    """Removes each node in turn, from the full model or from a circuit, and gives the score that is left in %. Final.

    With positions, the units are (component, position) pairs, and only positions from the removed one on are computed.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), importance of single components.

    Args:
        circuit: A circuit, or the path of its file, to remove members from; None for the full model.
        positions: Labels (``S1``, ``last``) or token positions at which to remove, each for itself; ``all`` for every position; None to
            remove components at all positions at once.
        units: What is removed: heads and MLPs, whole attentions, neurons or features.
    """

    name = "knockout"
    reads_files = ("circuit",)

    def __init__(
        self,
        circuit: Circuit | str | Path | None = None,
        positions: Iterable[str | int] | Literal["all"] | None = None,
        units: Units = NODES,
    ) -> None:
        self.circuit = circuit
        self.units = units
        self.positions = positions if positions is None or isinstance(positions, str) else tuple(positions)
        if isinstance(self.positions, str) and self.positions != "all":
            raise ConfigError(f"method.positions must be a list such as [S1,last] or [0,5], or 'all'; found {self.positions!r}.")

    def universe(self, model: HookedModel, prompts: PromptSet) -> NodeUniverse:
        if self.positions is None:
            return self.units.universe(model)
        return self.units.universe(model).at(range(prompts.n_pos) if self.positions == "all" else self.positions)

    def discover(self, engine: Engine, *, on_step: OnStep, history: Sequence[Step] = ()) -> Scores:
        universe = engine.universe.as_nodes()
        start = load(Circuit, self.circuit) if isinstance(self.circuit, str | Path) else self.circuit
        if start is not None:
            start.check_fits(engine.model.n_layers, engine.model.n_heads, engine.model.name)
        base = universe.full() if start is None else start.mask(universe)
        nodes = universe.members(base)
        if not nodes:
            raise CircuitError("The circuit is empty: it has no member to knock out. Take another one, or none for the full model.")
        # A layer at a time, so that steps are told on the way; the deepest first, which holds the most states for the others.
        layers = [part for _, layer in groupby(nodes, lambda node: node.layer) for part in _split(list(layer), len(universe))][::-1]
        parts = (torch.stack([universe.without(base, [node]) for node in layer]) for layer in layers)
        scores = {}
        for order, (node, score) in enumerate(zip(chain(*layers), scored_in_parts(engine, parts, history, base), strict=True)):
            scores[str(node)] = score
            on_step(Step(0, order, str(node), score, True, len(nodes), "single", len(nodes)))
        scores = {str(node): scores[str(node)] for node in nodes}
        return Scores(scores, "% of the untouched model", universe.n_layers, universe.n_heads, engine.model.name)


def _split(nodes: list[Node], n_units: int) -> list[list[Node]]:
    size = max(1, _ENTRIES // n_units)
    return [nodes[first : first + size] for first in range(0, len(nodes), size)]
