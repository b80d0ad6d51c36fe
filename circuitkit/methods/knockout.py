"""Every node knocked out alone."""

from __future__ import annotations

from pathlib import Path

import torch

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError
from circuitkit.core.records import Step
from circuitkit.engine.base import Engine
from circuitkit.methods.base import Method, OnStep


class Knockout(Method):
    """Removes each node in turn, from the full model or from a circuit, and gives the score that is left in %. Final.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), importance of single components.

    Args:
        circuit: A circuit, or the path of its file, to remove members from; None for the full model.
    """

    name = "knockout"

    def __init__(self, circuit: Circuit | str | Path | None = None) -> None:
        self.circuit = circuit

    def discover(self, engine: Engine, *, on_step: OnStep) -> Scores:
        graph = engine.graph
        start = Circuit.load(self.circuit) if isinstance(self.circuit, str | Path) else self.circuit
        if start is not None:
            start.check_fits(engine.model.n_layers, engine.model.n_heads, engine.model.name)
        base = graph.full() if start is None else start.mask(graph)
        nodes = graph.members(base)
        if not nodes:
            raise CircuitError("The circuit is empty: it has no member to knock out. Take another one, or none for the full model.")
        scores = {}
        masks = torch.stack([graph.without(base, [node]) for node in nodes])
        for order, (node, score) in enumerate(zip(nodes, engine.percent(masks, base=base).tolist(), strict=True)):
            scores[str(node)] = score
            on_step(Step(0, order, str(node), score, True, len(nodes), "single", len(nodes)))
        return Scores(scores, "% of the untouched model", graph.n_layers, graph.n_heads, engine.model.name)
