"""The self-check of an engine for edges, at the start of an edge stage."""

from __future__ import annotations

import logging

import torch

from circuitkit.core.errors import MeasurementError
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.proof.quick import few
from circuitkit.models.checks import relative, tolerance

_log = logging.getLogger(__name__)

N_EDGES = 6


def check_edges(edges: EdgeEngine) -> None:
    """Compares single edges and whole masks with the naive path on a few prompts.

    Raises:
        MeasurementError: They differ.
    """
    if edges.model.device.type == "meta" or edges.oracle is edges:  # nothing to compare
        return
    universe = edges.universe
    small = edges.on(few(edges.engine))
    naive = small.oracle
    some = [universe.unit(place * len(universe) // N_EDGES) for place in range(min(N_EDGES, len(universe)))]
    half = torch.rand(2, len(universe), generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = torch.cat([naive.alone(some), naive.score(half)])
    found = torch.cat([small.alone(some), small.score(half)])
    clean = small.measure(small.known_clean[None], slice(0, len(small.prompts)))
    difference, allowed = relative(torch.cat([found, clean]), torch.cat([wanted, clean])), tolerance(edges.model)
    if not difference <= allowed:
        raise MeasurementError(
            f"The fast and the naive path give different scores for edges (difference {difference:.2g} of their spread, {allowed:g} is "
            "allowed). Their numbers would be wrong. Run with engine=reference, and report this with the output of `circuitkit job=doctor`."
        )
    _log.info("Self-check: edges agree with the naive path to %.1e of the scores' spread.", difference)
