"""The planner: from masks to packed forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.core.shapes import Masks
from circuitkit.engine.packed.layout import Layout


@dataclass(frozen=True)
class Pack:
    """One forward pass: some masks on some prompts, started at the shallowest layer in which a mask differs from the trunk.

    Attributes:
        masks: Which masks, by their place in the list that was asked for.
        rows: Which prompts.
        start: The layer.
        cut: First position that is computed; before it no mask differs from the trunk.
    """

    masks: Int[Tensor, " some"]
    rows: slice
    start: int
    cut: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of the pass."""
        return len(self.masks) * int(self.rows.stop - self.rows.start)

    def split(self, max_rows: int) -> list[Pack]:
        """The same work in passes of at most so many rows."""
        n_prompts = self.rows.stop - self.rows.start
        if n_prompts > max_rows:
            starts = range(self.rows.start, self.rows.stop, max_rows)
            slices = [slice(first, min(first + max_rows, self.rows.stop)) for first in starts]
            return [Pack(self.masks[i : i + 1], rows, self.start, self.cut) for rows in slices for i in range(len(self.masks))]
        n_masks = max(1, max_rows // n_prompts)
        return [Pack(part, self.rows, self.start, self.cut) for part in self.masks.split(n_masks)]


def pack(
    masks: Masks, starts: Int[Tensor, " mask"], cuts: Int[Tensor, " mask"], layout: Layout, n_prompts: int, max_rows: int
) -> list[Pack]:
    """Groups masks that start at the same layer and position and leave the same modules uncomputed, and fills passes with them.

    Args:
        masks: One row per mask.
        starts: For each mask the first layer in which it differs from the trunk.
        cuts: For each mask the first position at which it differs from the trunk.
        layout: Of the units.
        n_prompts: Prompts each mask is scored on.
        max_rows: Rows that a pass may have.
    """
    n_layers = layout.universe.n_layers
    starts = starts.clamp(max=n_layers - 1)
    # Whether the entry layer's MLP is replaced everywhere decides whether a pass has to compute it.
    units = layout.components(masks)[:, :, -1]
    dead_mlp = ~units[torch.arange(len(masks)), starts].any(-1)
    keys = torch.stack([starts, dead_mlp.long(), cuts], -1)
    packs = []
    for key in keys.unique(dim=0).flip(0):
        start, _, cut = key.tolist()
        packs += Pack((keys == key).all(-1).nonzero().flatten(), slice(0, n_prompts), start, cut).split(max_rows)
    return packs
