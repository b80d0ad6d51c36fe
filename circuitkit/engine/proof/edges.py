"""The engine for edges that goes with one for nodes, and its self-check at the start of an edge stage."""

from __future__ import annotations

import logging
from typing import Any

import torch

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError
from circuitkit.engine.base import Engine
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.quick import few, rebuilt
from circuitkit.models.checks import relative, tolerance

_log = logging.getLogger(__name__)

N_EDGES = 6


def edge_engine(engine: Engine, circuit: Circuit, **options: Any) -> EdgeEngine:
    """The engine for edges that is as fast or as naive as the engine for nodes.

    Args:
        engine: For nodes.
        circuit: The node circuit.
        options: ``level`` and ``mlps``, as for every edge engine.
    """
    own = engine.local
    if isinstance(own, PackedEngine):
        return PackedEdges(own, circuit, **options)
    if isinstance(own, ReferenceEngine):
        return ReferenceEdges(own, circuit, **options)
    raise MeasurementError(f"Edges are scored by the packed and by the reference engine, and this is a {type(own).__name__}. "
                           "Run with engine=packed.")  # fmt: skip


def check_edges(edges: EdgeEngine) -> None:
    """Compares single edges and whole masks with the naive path on a few prompts.

    Raises:
        MeasurementError: They differ.
    """
    if edges.engine.model.device.type == "meta" or edges.oracle is edges:  # nothing to compare
        return
    universe, engine = edges.universe, rebuilt(edges.engine, few(edges.engine))
    circuit = Circuit.of(engine.universe, edges.mask)
    small = edge_engine(engine, circuit, level=universe.level, mlps=edges.mlps)
    some = [universe.edges[place * len(universe) // N_EDGES] for place in range(min(N_EDGES, len(universe)))]
    half = torch.rand(2, len(universe), generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = torch.cat([small.oracle.alone(some), small.oracle.score(half)])
    found = torch.cat([small.alone(some), small.score(half)])
    clean = engine.measure(engine.clean_logits()[None], slice(0, len(engine.prompts)))
    difference, allowed = relative(torch.cat([found, clean]), torch.cat([wanted, clean])), tolerance(engine.model)
    if not difference <= allowed:
        raise MeasurementError(
            f"The fast and the naive path give different scores for edges (difference {difference:.2g} of their spread, {allowed:g} is "
            "allowed). Their numbers would be wrong. Run with engine=reference, and report this with the output of `circuitkit job=doctor`."
        )
    _log.info("Self-check: edges agree with the naive path to %.1e of the scores' spread.", difference)
