"""What a removed edge carries: the patcher's value of its sender, in the place of what the sender gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuitkit.core.node import INPUT, Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.edges.layers import CircuitLayers, States
from circuitkit.engine.packed.replacements import GroupMean, entries
from circuitkit.models.hooked import Heads, Resid
from circuitkit.patchers.base import Patcher


@dataclass
class Sources:
    """What the patcher is given for some prompts: the circuit's outputs on their corrupt twins, or means of these; empty if it wants none.

    Attributes:
        embedding: What enters the first layer.
        z: Outputs of a layer's heads, a layer each.
        mlp: What the MLPs give, a layer each, before any norm behind them.
    """

    embedding: Resid | None = None
    z: list[Heads] = field(default_factory=list)
    mlp: list[Resid] = field(default_factory=list)

    @classmethod
    def of(cls, states: States) -> Sources:
        """The outputs of one run of the circuit."""
        return cls(states.resid[0], states.z, states.mlp)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*([] if self.embedding is None else [self.embedding]), *self.z, *self.mlp]


class Sent:
    """Gives the values of removed edges. Final.

    Args:
        patcher: Of the edges.
        prompts: The prompts.
        layers: The circuit, layer by layer.
    """

    def __init__(self, patcher: Patcher, prompts: PromptSet, layers: CircuitLayers) -> None:
        self._patcher = patcher
        self._prompts = prompts
        self._layers = layers
        self._entries = entries(patcher.needs, prompts)
        self._sums: list[GroupMean] = []
        self._means: Sources | None = None

    @property
    def lacks_means(self) -> bool:
        """Whether means are needed that were not taken yet: ``add`` every prompt first."""
        return self._patcher.needs.source == "mean" and self._means is None

    def add(self, rows: slice) -> None:
        """Takes some prompts into the means. Nothing is kept of a run that fails."""
        tensors = Sources.of(self._layers.states(self._prompts.corrupt[rows], rows)).tensors()
        if not self._sums:
            self._sums = [GroupMean(self._entries) for _ in tensors]
        for total, act in zip(self._sums, tensors, strict=True):
            total.add(act, rows)

    def close(self) -> None:
        """To be called when every prompt was added."""
        values = [total.value(self._layers.model.dtype) for total in self._sums]
        n_layers = self._layers.model.n_layers
        self._means = Sources(values[0], values[1 : 1 + n_layers], values[1 + n_layers :])
        self._sums = []

    def sources(self, rows: slice) -> Sources:
        """What the patcher is given for some prompts."""
        match self._patcher.needs.source:
            case "none":
                return Sources()
            case "run":
                return Sources.of(self._layers.states(self._prompts.corrupt[rows], rows))
        assert self._means is not None and self._means.embedding is not None
        which = self._entries[rows]
        picked = [each[which.to(each.device)] for each in self._means.tensors()]
        n_layers = self._layers.model.n_layers
        return Sources(picked[0], picked[1 : 1 + n_layers], picked[1 + n_layers :])

    def value(self, node: Node, act: Tensor, sources: Sources) -> Tensor:
        """What a sender is taken to give.

        Args:
            node: The sender; the input for the embedding.
            act: What it gives now: a head's output before the output projection, or what an MLP gives, before a norm behind it. Rows are
                copies x prompts.
            sources: For these prompts.
        """
        source = self._source(node, sources)
        if source is not None:
            source = source.repeat(len(act) // len(source), *[1] * (source.ndim - 1)) if len(act) != len(source) else source
        return self._patcher.value(act, source, node)

    def _source(self, node: Node, sources: Sources) -> Tensor | None:
        if sources.embedding is None:
            return None
        if node == INPUT:
            return sources.embedding
        return sources.z[node.layer][..., node.head, :] if node.kind is Kind.HEAD else sources.mlp[node.layer]


def apart(value: Tensor, act: Tensor) -> Tensor:
    """By how much a value differs from what is there, float32."""
    return value.to(act.device, torch.float32) - act.float()
