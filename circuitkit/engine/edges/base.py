"""EdgeEngine: turns edges, of a circuit or of the whole model, into scores.

An edge src->dst is removed by giving dst a residual stream in which src's output is replaced, as the patcher says, by what the circuit
computes on the corrupt prompt, by the mean of that, by zeros, ... Everything outside of the circuit stays replaced throughout, in the clean
and in the corrupt run, by the patcher of the engine for nodes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError, ConfigError, unknown_choice
from circuitkit.core.node import Edge, Level
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits
from circuitkit.engine.base import WHOLE, Baseline, Engine, Share
from circuitkit.engine.edges.possible import check_streams
from circuitkit.engine.nodes import NodeEngine
from circuitkit.patchers.base import Patcher

if TYPE_CHECKING:
    from circuitkit.engine.dense.gradients import Gradients

Mlps = Literal["recompute", "freeze"]
"""What MLPs between sender and receiver do while a single edge is patched: compute anew from what they read, as in the path patching of the
IOI paper, or stay as they were, which leaves the direct path alone. Those outside of the circuit stay replaced."""


class EdgeEngine(Engine):
    """Scores edges between the members of a circuit, or of the whole model, on the model, prompts and metric of an engine for nodes.

    ``score`` removes all edges of a mask at once; a removed edge is the direct path alone, and whatever else lies between recomputes.
    ``alone`` is path patching of one edge at a time, in which MLPs do as ``mlps`` says.

    Where a norm lies behind attention (post-norm), the stream takes up the norm of the sum of its heads' outputs and the bias. A receiver
    into which edges from some of these heads are removed reads the norm of the sum in which just these are replaced: the norm is computed
    anew for each receiver. Likewise a removed edge from an MLP replaces what the norm behind the MLP reads.

    Source: path patching of "Interpretability in the Wild" (arXiv 2211.00593) inside the node circuit, as in "Towards Interpretable
    Sequence Continuation" (arXiv 2311.04131); whole edge masks as in "Towards Automated Circuit Discovery" (arXiv 2304.14997).

    Args:
        engine: For nodes.
        circuit: The node circuit; None for the whole model.
        level: Whether edges into heads are split by queries, keys and values.
        mlps: What MLPs between sender and receiver do while a single edge is patched.
        patcher: By what a removed edge replaces its sender's output; None for the patcher of the engine for nodes.

    Attributes:
        engine: For nodes.
        circuit: The node circuit.
        mlps: As given.
        universe: The edges.
        mask: The circuit over the engine's universe.

    Raises:
        CircuitError: The circuit does not belong to this model, has edges already, or is empty.
        ConfigError: No such level or ``mlps``.
    """

    universe: EdgeUniverse
    # The method says all of this, and is hashed.
    unhashed = (*Engine.unhashed, "engine", "circuit", "level", "mlps", "options")

    def __init__(
        self,
        engine: NodeEngine,
        circuit: Circuit | None = None,
        *,
        level: Level | str = Level.EDGE_QKV,
        mlps: Mlps = "recompute",
        patcher: Patcher | None = None,
    ) -> None:
        model = engine.model
        if engine.universe.spans:
            raise CircuitError("Edges are between whole components, and this engine has components at positions. Leave positions out.")
        circuit = Circuit.of(model.universe, model.universe.full(), model=model.name) if circuit is None else circuit
        circuit.check_fits(model.n_layers, model.n_heads, model.name)
        if mlps not in ("recompute", "freeze"):
            raise ConfigError(unknown_choice("way to treat MLPs (mlps)", mlps, ("recompute", "freeze")))
        if level not in (Level.EDGE, Level.EDGE_QKV):
            raise ConfigError(unknown_choice("level of edges", level, (Level.EDGE, Level.EDGE_QKV)))
        check_streams(model, Level(level))
        self.mask: Bool[Tensor, " node"] = circuit.mask(engine.universe)
        if not self.mask.any():
            raise CircuitError("The circuit is empty, so there are no edges in it. Take another one.")
        universe = EdgeUniverse(circuit.nodes, Level(level), model.map.is_parallel)
        super().__init__(model, engine.prompts, patcher or engine.patcher, engine.metric, universe)
        self.engine = engine
        self.circuit = circuit
        self.mlps = mlps

    @abstractmethod
    def alone(self, units: Sequence[Edge | str], share: Share = WHOLE) -> Float[Tensor, "edge prompt"]:  # type: ignore[override]
        """The metric with each of these edges patched alone. Arguments as in ``Engine.alone``."""

    @property
    def margin(self) -> float:
        """How far, in %, two exact paths may differ by rounding. Tighter than for nodes: most edges of a circuit change next to nothing, so
        that its score is theirs, and its score is close to the threshold where it was found."""
        return self.engine.margin / 10

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with besides engine and circuit."""
        return {"level": self.universe.level, "mlps": self.mlps, "patcher": self.patcher}

    def baseline(self) -> Baseline:
        return self.engine.baseline()

    def clean_logits(self) -> CleanLogits:
        return self.engine.known_clean

    def on(self, prompts: PromptSet) -> Engine:
        return self.engine.on(prompts).edges(self.circuit, **self.options)

    def gradients(self) -> Gradients:
        from circuitkit.engine.dense.gradients import Gradients  # stands beside this room, and loads nothing that a search needs

        return Gradients(self.model, self.prompts, self.patcher, self.metric, self.universe, outside=self.engine.patcher)

    def check(self) -> None:
        from circuitkit.engine.proof.edges import check_edges  # stands on this room

        self.engine.check()
        check_edges(self)

    def places_of(self, edges: Sequence[Edge | str]) -> list[int]:
        """The places of some edges in a mask. Raises as ``Universe.index``."""
        return self.universe.places(edges).tolist()
