"""What an attention or an MLP with a norm behind it adds to the residual stream when edges from it are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.node import Kind, Node
from circuitkit.engine.edges.layers import CircuitLayers
from circuitkit.models.blocks import Part
from circuitkit.models.hooked import Heads, Resid


@dataclass(frozen=True)
class NormedAddend:
    """One attention or MLP whose output passes a norm on its way to the stream (post-norm). Final.

    The norm is given the outputs themselves, some of them replaced, and not a sum to which differences were added: where everything is
    replaced by zeros, what such a sum leaves is rounding, and the norm would make it large.

    Attributes:
        layers: The circuit, layer by layer.
        layer: Of which layer.
        kind: Of its senders: heads for an attention.
        act: What the heads or the MLP give now. Rows are copies x prompts.
        values: What removed edges carry instead, for each sender.
    """

    layers: CircuitLayers
    layer: int
    kind: Kind
    act: Heads | Resid
    values: Mapping[Node, Tensor]

    def shift(self, removed: Mapping[Node, Bool[Tensor, " mask"]], n_prompts: int) -> Float[Tensor, "row pos d_model"]:
        """By how much what a receiver reads differs from the stream as it is, float32, when edges from some senders are removed.

        Args:
            removed: For these senders in which masks. Rows of what is given are masks x prompts.
            n_prompts: How many prompts.
        """
        n_masks = len(next(iter(removed.values())))
        copies = n_masks * n_prompts // len(self.act)

        def rows(value: Tensor) -> Tensor:
            return value.repeat(copies, *[1] * (value.ndim - 1)) if copies > 1 else value

        act = rows(self.act)
        for node, masks in removed.items():
            is_out = masks.to(act.device).repeat_interleave(n_prompts)[:, None, None]
            value = rows(self.values[node]).to(act)
            if self.kind is Kind.HEAD:
                act = act.clone()
                act[..., node.head, :] = torch.where(is_out, value, act[..., node.head, :])
            else:
                act = torch.where(is_out, value, act)
        return self._added(act) - rows(self._unchanged)

    @cached_property
    def _unchanged(self) -> Tensor:
        return self._added(self.act)

    def _added(self, act: Heads | Resid) -> Tensor:
        return self.layers.added(self.layer, part_of(self.kind), self.layers.given(self.layer, self.kind, act)).float()


def part_of(kind: Kind) -> Part:
    """The part of a layer through which heads or an MLP add to the residual stream."""
    return "mlp" if kind is Kind.MLP else "attention"
