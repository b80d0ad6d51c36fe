"""The control: circuits of the same size, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import ConfigError
from circuitkit.core.node import Kind, Node
from circuitkit.core.records import Step
from circuitkit.engine.base import Engine
from circuitkit.methods.base import Method, OnStep
from circuitkit.methods.recall import scored_in_parts
from circuitkit.storage import load

_HEADS = (Kind.HEAD, Kind.ATTENTION)
"""What is drawn as heads: mixers too, which stand in the place of heads, and whole attentions where these are the units."""


class RandomCircuit(Method):
    """Draws circuits with a given number of heads and MLPs and scores each. Final.

    Give either a circuit to be like, or both numbers.

    Args:
        like: A circuit, or the path of its file, whose size the draws have.
        n_heads: Number of heads a draw, if there is no ``like``.
        n_mlps: Number of MLPs a draw, likewise.
        draws: How many.
        seed: Of the draws.
        exclude: Names of nodes that no draw may have.
    """

    name = "random_circuit"
    reads_files = ("like",)

    def __init__(
        self,
        like: Circuit | str | Path | None = None,
        n_heads: int | None = None,
        n_mlps: int | None = None,
        draws: int = 20,
        seed: int = 0,
        exclude: Iterable[str] = (),
    ) -> None:
        if (n_heads is None) != (n_mlps is None) or (like is None) == (n_heads is None):
            raise ConfigError(
                "A random circuit needs a size: either method.like=<circuit file>, or both method.n_heads and method.n_mlps. "
                f"Found like={like}, n_heads={n_heads}, n_mlps={n_mlps}."
            )
        if draws < 1:
            raise ConfigError(f"method.draws must be at least 1, found {draws}.")
        self.like = like
        self.n_heads = n_heads
        self.n_mlps = n_mlps
        self.draws = draws
        self.seed = seed
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def discover(self, engine: Engine, *, on_step: OnStep, history: Sequence[Step] = ()) -> Scores:
        universe = engine.universe.as_nodes()
        n_heads, n_mlps = self._size(engine)
        excluded = {universe.nodes[universe.index(name)] for name in self.exclude}
        pool = [node for node in universe.nodes if node not in excluded]
        heads = [node for node in pool if node.kind in _HEADS]
        mlps = [node for node in pool if node.kind is Kind.MLP]
        if not (0 <= n_heads <= len(heads) and 0 <= n_mlps <= len(mlps)):
            raise ConfigError(
                f"Cannot draw {n_heads} heads and {n_mlps} MLPs: {len(heads)} heads and {len(mlps)} MLPs are left to draw from. "
                "Ask for fewer, or exclude fewer (method.exclude)."
            )
        drawing = random.Random(self.seed)
        drawn: list[list[Node]] = [drawing.sample(heads, n_heads) + drawing.sample(mlps, n_mlps) for _ in range(self.draws)]
        scores, members = {}, {}
        parts = torch.stack([universe.mask(nodes) for nodes in drawn]).split(engine.batch)
        for order, (nodes, score) in enumerate(zip(drawn, scored_in_parts(engine, parts, history), strict=True)):
            name = f"draw{order}"
            scores[name], members[name] = score, [str(node) for node in universe.members(universe.mask(nodes))]
            on_step(Step(0, order, name, score, True, len(nodes), "draw", self.draws))
        return Scores(scores, "% of the untouched model", universe.n_layers, universe.n_heads, engine.model.name, {"members": members})

    def _size(self, engine: Engine) -> tuple[int, int]:
        if self.like is None:
            assert self.n_heads is not None and self.n_mlps is not None
            return self.n_heads, self.n_mlps
        like = load(Circuit, self.like) if isinstance(self.like, str | Path) else self.like
        like.check_fits(engine.model.n_layers, engine.model.n_heads)
        return sum(node.kind in _HEADS for node in like.nodes), len(like.mlps)
