"""The paper's second stage: which edges of a node circuit carry the behaviour; or, of the whole model, as ACDC searches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.node import Edge, Level
from circuitkit.core.records import Step
from circuitkit.engine.base import Engine
from circuitkit.engine.edges.base import Mlps
from circuitkit.methods.base import Method, OnStep
from circuitkit.methods.guessing import Decision, Guesser
from circuitkit.patchers.base import Patcher
from circuitkit.storage import load

_log = logging.getLogger(__name__)

RULES = ("single", "cumulative")


class EdgePruning(Method):
    """Path patching inside a node circuit or the whole model: an edge goes if the score without it stays above the threshold. Final.

    With ``rule=single`` each edge is patched alone, as in the paper. The graph of the edges that are left is run and scored too, which the
    paper leaves out. With ``rule=cumulative`` what was removed stays removed, receivers from the last to the first. Nodes from which no
    kept edge leads to the logits drop out.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), iterative edge pruning, T_e = 0.8 of the untouched model;
    direct paths as meant there, and heads to the MLP of their own layer and the embedding as a sender too.

    Args:
        circuit: The node circuit, or the path of its file; None for every edge of the whole model, which takes about as many evaluations
            as there are edges (GPT-2 small: 32,491 with ``split``, 11,611 without), and what is replaced is then the edges alone.
        threshold: Share of the untouched model's score that must be left, in (0, 1].
        rule: ``single`` or ``cumulative``.
        mlps: With ``single``, what MLPs between sender and receiver do: ``recompute`` as in the IOI paper, or ``freeze``. In whole graphs
            an edge is always the direct path alone.
        split: Whether edges into a head are split into those to its queries, keys and values.
        edge_patcher: By what a removed edge replaces what its sender gives; None for the run's patcher, which in any case stands for
            everything outside of the circuit. The paper takes means there and the corrupt run (``Resample``) for edges.
    """

    name = "edge_pruning"
    threshold: float
    reads_files = ("circuit",)

    def __init__(
        self,
        circuit: Circuit | str | Path | None,
        threshold: float = 0.8,
        rule: Literal["single", "cumulative"] = "single",
        mlps: Mlps = "recompute",
        split: bool = True,
        edge_patcher: Patcher | None = None,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"method.threshold must be in (0, 1], found {threshold}. It is the share of the untouched model's score; "
                              "the paper takes 0.8.")  # fmt: skip
        if rule not in RULES:
            raise ConfigError(unknown_choice("rule for edges (method.rule)", rule, RULES))
        self.circuit = circuit
        self.threshold = threshold
        self.rule = rule
        self.mlps = mlps
        self.split = split
        self.edge_patcher = edge_patcher
        self.level = Level.EDGE_QKV if split else Level.EDGE

    def over(self, engine: Engine) -> Engine:
        circuit = load(Circuit, self.circuit) if isinstance(self.circuit, str | Path) else self.circuit
        return engine.edges(circuit, level=self.level, mlps=self.mlps, patcher=self.edge_patcher)

    def discover(self, engine: Engine, *, on_step: OnStep, history: Sequence[Step] = ()) -> Circuit:
        edges, universe = engine, engine.universe.as_edges()
        node_score = edges.percent(universe.full()[None]).item()
        if not node_score > 100 * self.threshold:
            _log.warning(
                "On these prompts the circuit scores %.1f %% with all its edges, which is not above the threshold of %.1f %%: an edge goes "
                "only if the score rises without it. Use the prompts that the circuit was found on, or a lower method.threshold.",
                node_score, 100 * self.threshold,
            )  # fmt: skip
        decide = self._single if self.rule == "single" else self._cumulative
        mask, scores = decide(edges, on_step, history)
        nodes, kept = universe.live(mask)
        score = edges.percent(universe.mask(kept)[None]).item()
        provenance = {
            "rule": self.rule,
            "mlps": self.mlps,
            "threshold": 100 * self.threshold,
            "node_score": node_score,
            "edge_scores": scores,
            "dropped_nodes": [str(node) for node in universe.nodes if node not in nodes],
        }
        shape = engine.model.n_layers, engine.model.n_heads
        return Circuit(nodes, *shape, engine.model.name, score, self.level, provenance, kept, universe.nodes, universe.parallel)

    def _single(self, edges: Engine, on_step: OnStep, history: Sequence[Step]) -> tuple[Bool[Tensor, " edge"], dict[str, float]]:
        """Every edge alone; a layer of receivers at a time, so that steps are told on the way."""
        scores: dict[str, float] = {}
        n_edges = n_left = len(edges.universe)
        for _, part in groupby(edges.universe.as_edges().edges, lambda edge: (edge.dst.layer, edge.dst.kind)):
            these = list(part)
            known = history[len(scores) : len(scores) + len(these)]
            found = [step.score for step in known] if len(known) == len(these) else self._alone(edges, these)
            for edge, score in zip(these, found, strict=True):
                scores[str(edge)] = score
                kept = not score > 100 * self.threshold
                n_left -= not kept
                on_step(Step(0, len(scores) - 1, str(edge), score, kept, n_left, "edge", n_edges))
        return edges.universe.mask(name for name, score in scores.items() if not score > 100 * self.threshold), scores

    def _alone(self, edges: Engine, these: Sequence[Edge]) -> Iterator[float]:
        for edge, score in zip(these, edges.baseline().percent(edges.alone(these)).tolist(), strict=True):
            yield edges.certain_alone(edge) if abs(score - 100 * self.threshold) <= edges.margin else score

    def _cumulative(self, edges: Engine, on_step: OnStep, history: Sequence[Step]) -> tuple[Bool[Tensor, " edge"], dict[str, float]]:
        """One edge after the other from the last receiver to the first: states before the receiver stay those of the whole circuit."""
        mask, scores = edges.universe.full(), dict[str, float]()
        candidates: list[Edge] = list(reversed(edges.universe.as_edges().edges))
        guesser = Guesser(edges.batch, removing=False)
        while len(scores) < len(candidates):
            ahead = candidates[len(scores) : len(scores) + guesser.depth]
            for decision in guesser.recall(ahead, history[len(scores) :]) or self._decide(edges, mask, ahead, guesser):
                if not decision.kept:
                    mask = edges.universe.without(mask, [decision.candidate])
                scores[str(decision.candidate)] = decision.score
                step = Step(0, len(scores) - 1, str(decision.candidate), decision.score, decision.kept, int(mask.sum()), "edge", len(mask))
                on_step(step)
        return mask, scores

    def _decide(self, edges: Engine, mask: Bool[Tensor, " edge"], candidates: Sequence[Edge], guesser: Guesser) -> list[Decision]:
        masks = torch.stack(guesser.masks(edges.universe, mask, candidates))
        scores = zip(masks, edges.percent(masks).tolist(), strict=True)
        sure = (edges.certain(trial) if abs(score - 100 * self.threshold) <= edges.margin else score for trial, score in scores)
        return guesser.decide(candidates, sure, 100 * self.threshold)
