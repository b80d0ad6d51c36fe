"""The paper's node search: greedy removal in alternating sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.node import Kind, Node
from circuitkit.core.records import Step
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine
from circuitkit.engine.units import Units
from circuitkit.methods.base import NODES, Method, OnStep
from circuitkit.methods.guessing import Decision, Guesser

DIRECTIONS = ("backward", "forward")


class IterativePruning(Method):
    """Starts with everything and removes, one after the other, each node without which the score stays above the threshold. Final.

    Sweeps alternate, last layer to first (in a layer the MLP, then the heads in order) and first to last (the heads, then the MLP),
    until one changes nothing. What was removed stays removed. The result depends on the order and the threshold.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), iterative pruning for nodes, T_n = 80 %.

    Args:
        threshold: Share of the untouched model's score that must be left, in (0, 1].
        order: Direction of the first sweep, ``backward`` or ``forward``.
        max_sweeps: Stop after so many sweeps; None to go on until one changes nothing. 1 is what the paper does for Llama-2.
        keep: Names of nodes that are never removed, such as ``[m11]``.
        speculate: Whether several candidates may be scored in one pass by guessing the decisions between them; never changes a decision.
        units: What is removed: heads and MLPs, whole attentions, neurons or features.
    """

    name = "iterative_pruning"
    threshold: float

    def __init__(
        self,
        threshold: float = 0.8,
        order: str = "backward",
        max_sweeps: int | None = None,
        keep: Iterable[str] = (),
        speculate: bool = True,
        units: Units = NODES,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"method.threshold must be in (0, 1], found {threshold}. It is the share of the untouched model's score that must be left; "
                "the paper takes 0.8."
            )
        if order not in DIRECTIONS:
            raise ConfigError(unknown_choice("order of sweeps (method.order)", order, DIRECTIONS))
        if max_sweeps is not None and max_sweeps < 1:
            raise ConfigError(f"method.max_sweeps must be at least 1, found {max_sweeps}. Leave it out to sweep until nothing changes.")
        self.threshold = threshold
        self.order = order
        self.max_sweeps = max_sweeps
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.speculate = speculate
        self.units = units

    def discover(self, engine: Engine, *, on_step: OnStep, history: Sequence[Step] = ()) -> Circuit:
        universe = engine.universe.as_nodes()
        never = {universe.nodes[universe.index(name)] for name in self.keep}
        mask, score, sweep, order = universe.full(), 100.0, 0, 0
        while self.max_sweeps is None or sweep < self.max_sweeps:
            direction = DIRECTIONS[(DIRECTIONS.index(self.order) + sweep) % 2]
            candidates = [node for node in candidates_in(universe, direction) if mask[universe.index(node)] and node not in never]
            before = int(mask.sum())
            guesser = Guesser(engine.batch if self.speculate else 1, removing=sweep == 0)
            done = 0
            while done < len(candidates):
                ahead = candidates[done : done + guesser.depth]
                for decision in guesser.recall(ahead, history[order:]) or self._decide(engine, mask, ahead, guesser):
                    if not decision.kept:
                        mask, score = universe.without(mask, [decision.candidate]), decision.score
                    size = int(mask.sum())
                    on_step(Step(sweep, order, str(decision.candidate), decision.score, decision.kept, size, direction, len(candidates)))
                    order, done = order + 1, done + 1
            sweep += 1
            if int(mask.sum()) == before:
                break
        return Circuit.of(universe, mask, model=engine.model.name, score=score)

    def _decide(self, engine: Engine, mask: Bool[Tensor, " node"], candidates: Sequence[Node], guesser: Guesser) -> list[Decision]:
        """Scores some candidates at once and returns those decisions whose guesses about earlier ones came true."""
        masks = torch.stack(guesser.masks(engine.universe, mask, candidates))
        scores = zip(masks, engine.percent(masks, base=mask).tolist(), strict=True)
        close = engine.margin
        sure = (engine.certain(trial) if abs(score - 100 * self.threshold) <= close else score for trial, score in scores)
        return guesser.decide(candidates, sure, 100 * self.threshold)


def candidates_in(universe: NodeUniverse, direction: str) -> list[Node]:
    """All nodes in the order in which a sweep tries them.

    ``forward`` goes from the first layer to the last, heads before the MLP; ``backward`` from the last layer to the first, the MLP
    before the heads, and heads in index order in both.
    """
    layers = range(universe.n_layers)
    by_layer: dict[int, tuple[list[Node], list[Node]]] = {layer: ([], []) for layer in layers}
    for node in universe.nodes:
        by_layer[node.layer][node.kind is Kind.MLP].append(node)
    if direction == "forward":
        return [node for layer in layers for node in (*by_layer[layer][0], *by_layer[layer][1])]
    return [node for layer in reversed(layers) for node in (*by_layer[layer][1], *by_layer[layer][0])]
