"""The fast path for edges: many of them a pass, from states of the circuit that are computed once.

Exact: it gives the numbers of the naive path in ``engine/oracle/edges.py``, which tests compare it with. Up to its receiver an edge takes
no forward pass of its own: what the receiver then reads is a sum of states that are held, and, where MLPs recompute, of what these
make of it. From the receiver on, edges x prompts are the rows of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import noting
from circuitkit.core.node import Edge
from circuitkit.core.shapes import Masks, Values
from circuitkit.engine.base import WHOLE, Share, pass_over
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.edges.held import EdgePasses
from circuitkit.engine.edges.pruned import PrunedEdges
from circuitkit.engine.edges.single import SingleEdges
from circuitkit.engine.packed.engine import PackedEngine


class PackedEdges(EdgeEngine):
    """Scores many edges per pass. Final.

    Args:
        engine: A packed engine for nodes; its row budget bounds the passes here too.
        circuit: The node circuit; None for the whole model.
        options: As for every edge engine.

    Attributes:
        passes: Runs the circuit.
    """

    def __init__(self, engine: PackedEngine, circuit: Circuit | None = None, **options: Any) -> None:
        super().__init__(engine, circuit, **options)
        self._packed = engine
        self.passes = EdgePasses(engine, self.universe, self.mask, self.patcher)
        self._single = SingleEdges(self.passes, self.mlps)
        self._pruned = PrunedEdges(self.passes)

    @property
    def batch(self) -> int:
        return self._packed.batch

    def prepare(self) -> None:
        self._packed.plain.make(self._packed.universe)

    @property
    def oracle(self) -> EdgeEngine:
        return self._packed.oracle.edges(self.circuit, **self.options)

    def alone(self, units: Sequence[Edge | str], share: Share = WHOLE) -> Float[Tensor, "edge prompt"]:  # type: ignore[override]
        places = self.places_of(units)
        values = torch.full((len(self.universe), len(self.prompts)), torch.nan)
        edges = {self.universe.unit(place) for place in places}

        def fill(rows: slice) -> None:
            with noting(lambda: f"while the edges {', '.join(map(str, units[:6]))}{' ...' * (len(units) > 6)} were patched one by one, "
                                f"over prompts {rows.start}-{rows.stop - 1}"):  # fmt: skip
                self._single.fill(edges, rows, values, share)

        self.passes.in_slices(fill)
        return values[places]

    def score(self, masks: Masks, base: Bool[Tensor, " edge"] | None = None) -> Values:
        masks = self.checked(masks, base)
        starts = self._pruned.first_layers(masks)
        values = torch.empty(len(masks), len(self.prompts))
        whole = starts > self.model.n_layers
        if whole.any():  # with every edge the circuit is the node circuit
            values[whole] = self.engine.score(self.mask[None])
        groups = [(int(start), (starts == start).nonzero().flatten()) for start in starts[~whole].unique().tolist()]

        def fill(rows: slice) -> None:
            for start, chosen in groups:
                for part in chosen.split(self.passes.copies(rows)):
                    with noting(partial(_pass, rows, masks, self.universe, part)):
                        values[part, rows] = self.passes.measured(self._pruned.logits(start, masks[part], rows), rows)

        if groups:
            self.passes.in_slices(fill)
        return values


def _pass(rows: slice, masks: Masks, universe: EdgeUniverse, part: Int[Tensor, " some"]) -> str:
    return f"in a pass {pass_over(rows, masks[part], universe, part.tolist())}"
