"""The fast path for edges: many of them a pass, from states of the circuit that are computed once.

Exact: it gives the numbers of the naive path in ``engine/oracle/edges.py``, which tests compare it with. Up to its receiver an edge takes
no forward pass of its own: what the receiver then reads is a sum of states that are held, and, where MLPs recompute, of what these
make of it. From the receiver on, edges x prompts are the rows of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Edge
from circuitkit.core.shapes import Values
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.edges.held import EdgePasses
from circuitkit.engine.edges.pruned import PrunedEdges
from circuitkit.engine.edges.single import SingleEdges
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.packed.engine import PackedEngine


class PackedEdges(EdgeEngine):
    """Scores many edges a pass. Final.

    Args:
        engine: A packed engine for nodes; its row budget bounds the passes here too.
        circuit: The node circuit.
        options: As for every edge engine.

    Attributes:
        passes: Runs the circuit.
    """

    def __init__(self, engine: PackedEngine, circuit: Circuit, **options: Any) -> None:
        super().__init__(engine, circuit, **options)
        self._packed = engine
        self._circuit = circuit
        self.passes = EdgePasses(engine, self.universe, self.mask)
        self._single = SingleEdges(self.passes, self.mlps)
        self._pruned = PrunedEdges(self.passes)

    @property
    def batch(self) -> int:
        return self._packed.batch

    @cached_property
    def oracle(self) -> EdgeEngine:
        return ReferenceEdges(self._packed.oracle, self._circuit, level=self.universe.level, mlps=self.mlps)

    def alone(self, edges: Sequence[Edge]) -> Float[Tensor, "edge prompt"]:
        places = [self.universe.index(edge) for edge in edges]
        values = torch.empty(len(self.universe), len(self.engine.prompts))
        self.passes.in_slices(lambda rows: self._single.fill(set(edges), rows, values))
        return values[places]

    def score(self, masks: Bool[Tensor, "mask edge"]) -> Values:
        masks = self.checked(masks)
        starts = torch.tensor([self._pruned.first_layer(mask) for mask in masks])
        values = torch.empty(len(masks), len(self.engine.prompts))
        whole = starts > self.engine.model.n_layers
        if whole.any():  # with every edge the circuit is the node circuit
            values[whole] = self.engine.score(self.mask[None])
        groups = [(int(start), (starts == start).nonzero().flatten()) for start in starts[~whole].unique().tolist()]

        def fill(rows: slice) -> None:
            for start, chosen in groups:
                for part in chosen.split(self.passes.copies(rows)):
                    values[part, rows] = self.passes.measured(self._pruned.logits(start, masks[part], rows), rows)

        if groups:
            self.passes.in_slices(fill)
        return values
