"""EdgeEngine: turns edges of a circuit into scores.

An edge src->dst is removed by giving dst a residual stream in which src's output is what the circuit computes on the corrupt prompt.
Everything outside of the circuit stays replaced throughout, in the clean and in the corrupt run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError, ModelError, unknown_choice
from circuitkit.core.node import Edge, Level
from circuitkit.core.shapes import Values
from circuitkit.core.universe import EdgeUniverse
from circuitkit.engine.base import Engine

Mlps = Literal["recompute", "freeze"]
"""What MLPs between sender and receiver do while a single edge is patched: compute anew from what they read, as in the path patching of the
IOI paper, or stay as they were, which leaves the direct path alone. Those outside of the circuit stay replaced."""


class EdgeEngine(ABC):
    """Scores edges between the members of a circuit, on the model, prompts, patcher and metric of an engine for nodes.

    Source: path patching of "Interpretability in the Wild" (arXiv 2211.00593) inside the node circuit, as in "Towards Interpretable
    Sequence Continuation" (arXiv 2311.04131); whole edge masks as in "Towards Automated Circuit Discovery" (arXiv 2304.14997).

    Args:
        engine: For nodes.
        circuit: The node circuit.
        level: Whether edges into heads are split by queries, keys and values.
        mlps: What MLPs between sender and receiver do while a single edge is patched.

    Attributes:
        universe: The edges.
        mask: The circuit over the engine's universe.

    Raises:
        CircuitError: The circuit does not belong to this model, has edges already, or is empty.
        ConfigError: No such level or ``mlps``.
        ModelError: The model's heads do not add to the residual stream on their own.
    """

    def __init__(self, engine: Engine, circuit: Circuit, *, level: Level | str = Level.EDGE_QKV, mlps: Mlps = "recompute") -> None:
        self.engine = engine.local
        model = engine.model
        if engine.universe.spans:
            raise CircuitError("Edges are between whole components, and this engine has components at positions. Leave positions out.")
        if not model.architecture.additive:
            raise ModelError(
                f"Edges need a model whose heads and MLPs add to the residual stream as they are, but {model.architecture.family} puts a "
                "norm behind them, so that what a head adds depends on the others. Search nodes in it, or take another model."
            )
        circuit.check_fits(model.n_layers, model.n_heads, model.name)
        if mlps not in ("recompute", "freeze"):
            raise ConfigError(unknown_choice("way to treat MLPs (mlps)", mlps, ("recompute", "freeze")))
        if level not in (Level.EDGE, Level.EDGE_QKV):
            raise ConfigError(unknown_choice("level of edges", level, (Level.EDGE, Level.EDGE_QKV)))
        self.mask: Bool[Tensor, "node"] = circuit.mask(engine.universe)
        if not self.mask.any():
            raise CircuitError("The circuit is empty, so there are no edges in it. Take another one.")
        self.mlps = mlps
        self.universe = EdgeUniverse(circuit.nodes, Level(level), model.is_parallel)

    @abstractmethod
    def alone(self, edges: Sequence[Edge]) -> Float[Tensor, "edge prompt"]:
        """The metric with each of these edges patched alone."""

    @abstractmethod
    def score(self, masks: Bool[Tensor, "mask edge"]) -> Values:
        """The metric for each mask over the edges and each prompt. Removed edges are direct: whatever else is between recomputes."""

    @property
    @abstractmethod
    def oracle(self) -> EdgeEngine:
        """The naive path to the same numbers."""

    def certain_alone(self, edge: Edge) -> float:
        """The performance score with one edge patched, by the naive path: for decisions that rounding could turn."""
        return self.oracle.percent(self.oracle.alone([edge])).item()

    def certain(self, mask: Bool[Tensor, "edge"]) -> float:
        """The performance score of one mask, likewise."""
        return self.oracle.percent(self.oracle.score(mask[None])).item()

    @property
    def margin(self) -> float:
        """How far, in %, two exact paths may differ by rounding. Tighter than for nodes: most edges of a circuit change next to nothing, so
        that its score is theirs, and its score is close to the threshold where it was found."""
        return self.engine.margin / 10

    @property
    def batch(self) -> int:
        """How many masks fit one pass without cost."""
        return 1

    def percent(self, values: Values) -> Float[Tensor, "*mask"]:
        """Values as performance scores, in % of the untouched model."""
        return self.engine.baseline().percent(values)

    def checked(self, masks: Bool[Tensor, "mask edge"]) -> Bool[Tensor, "mask edge"]:
        """Refuses masks that are none over these edges.

        Raises:
            MeasurementError: No mask, or masks of another universe.
        """
        if masks.ndim != 2 or masks.shape[1] != len(self.universe) or masks.dtype != torch.bool or not len(masks):
            raise MeasurementError(
                f"Masks must be a boolean table of masks x {len(self.universe)} edges, at least one, found {tuple(masks.shape)} of "
                f"{masks.dtype}. Make them with the universe of the edge engine."
            )
        return masks
