"""Conditional means: of an MLP over the corrupt prompts, in the model whose currently removed heads are already replaced.

This is what the paper's published code computes: it installs the head ablation first and averages MLP outputs afterwards. A mean of
layer l depends on the heads removed at layers up to l, so it is kept under these, and the corrupt prompts are only run again from the
first layer in which the removed heads changed to the last layer whose MLP is out.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.shapes import Masks
from circuitkit.engine.packed.lane import Lane
from circuitkit.engine.packed.layout import Layout
from circuitkit.engine.packed.packed_pass import SeeMlp
from circuitkit.engine.packed.packing import Pack
from circuitkit.engine.packed.replacements import GroupMean, Replacements

Key = tuple[int, bytes]
_HELD = 4096


class ConditionalMeans:
    """Gives replacements whose MLP values fit the heads that a mask removes. Final.

    Args:
        lane: Of the corrupt prompts.
        layout: Of the units.
        plain: Replacements with plain means, for heads.
        groups: Over which prompts to average.
        dtype: Of the means.
    """

    def __init__(self, lane: Lane, layout: Layout, plain: Replacements, groups: Int[Tensor, " prompt"], dtype: torch.dtype) -> None:
        self._lane = lane
        self._layout = layout
        self._plain = plain
        self._groups = groups
        self._dtype = dtype
        self._held: dict[Key, Tensor] = {}

    def __call__(self, masks: Masks, base: Bool[Tensor, " node"]) -> Replacements:
        """Replacements for masks that were made from ``base``, computing what is missing."""
        wanted = self._wanted(masks)
        missing = {key: place for (place, _), key in wanted.items() if key not in self._held}
        if missing:
            self._compute(masks, base, missing)
        tables: dict[int, Tensor] = {}
        for layer in {layer for _, layer in wanted}:
            plain = self._plain.mlp_table(layer)
            rows = [self._held.get(wanted[place, layer], plain) if (place, layer) in wanted else plain for place in range(len(masks))]
            tables[layer] = torch.stack(rows)
        return self._plain.with_mlps(tables)

    def _wanted(self, masks: Masks) -> dict[tuple[int, int], Key]:
        """Which means differ from the plain ones: by mask and layer, the key under which they are held."""
        heads, mlps = self._split(masks)
        first_removed = (~heads).any(-1).int().argmax(-1)
        some_removed = (~heads).any(-1).any(-1)
        return {
            (place, layer): (layer, heads[place, : layer + 1].numpy().tobytes())
            for place in range(len(masks))
            if some_removed[place]
            for layer in range(int(first_removed[place]), heads.shape[1])
            if not mlps[place, layer].all()
        }

    def _compute(self, masks: Masks, base: Bool[Tensor, " node"], missing: dict[Key, int]) -> None:
        """Runs the corrupt prompts with heads replaced and MLPs left, as far as the deepest mean that is missing."""
        places = sorted(set(missing.values()))
        layers = {place: {layer for (layer, _), owner in missing.items() if owner == place} for place in places}
        deepest = max(layer for layer, _ in missing)
        heads_only = self._layout.with_all_mlps(masks[places])
        sums: dict[tuple[int, int], GroupMean] = {}
        seen: dict[tuple[int, int], Tensor] = {}

        def see(part: Pack) -> SeeMlp:
            seen.clear()  # what a pass left that did not fit the memory

            def see_mlp(layer: int, out: Tensor) -> None:
                for index, act in zip(part.masks.tolist(), out.unflatten(0, (len(part.masks), -1)), strict=True):
                    if layer in layers[places[index]]:
                        seen[index, layer] = act

            return see_mlp

        base = self._layout.with_all_mlps(base[None])[0]
        latest = torch.tensor([min(layers[place]) for place in places])
        for part, _ in self._lane.run(heads_only, lambda *_: self._plain, base, stop=deepest, latest=latest, see_mlp=see):
            for key, act in seen.items():
                sums.setdefault(key, GroupMean(self._groups)).add(act, part.rows)
        if len(self._held) > _HELD:
            self._held.clear()
        for (layer, heads), place in missing.items():
            self._held[layer, heads] = self._plain.mlp_from(layer, sums[places.index(place), layer].value(self._dtype))

    def _split(self, masks: Masks) -> tuple[Bool[Tensor, "mask layer head"], Bool[Tensor, "mask layer span"]]:
        units = self._layout.components(masks)
        return units[:, :, :-1].flatten(2), units[:, :, -1]
