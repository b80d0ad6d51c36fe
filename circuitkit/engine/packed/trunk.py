"""Trunk: what enters each layer under one mask, kept so that other masks can start where they first differ from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.engine.packed.layout import Layout
from circuitkit.engine.packed.memory import free_room
from circuitkit.models.cache import KeysValues
from circuitkit.models.hooked import HookedModel, Layer


@dataclass
class Watch:
    """Keeps what enters the layers of a pass, and their heads' outputs.

    Attributes:
        layers: Layers to keep.
        resid: What entered them.
        z: Outputs of their heads before any replacement; missing where the attention was not computed.
        kv: Keys and values of every attention that was computed, if they were asked for.
        known: Of which heads the outputs mean something.
    """

    layers: frozenset[int]
    resid: dict[int, Tensor]
    z: dict[int, Tensor]
    kv: dict[int, KeysValues]
    known: dict[int, Bool[Tensor, " head"]]

    @classmethod
    def of(cls, layers: range, stride: int) -> Watch:
        """Keeps every ``stride``-th layer of a range."""
        return cls(frozenset(layer for layer in layers if layer % stride == 0), {}, {}, {}, {})

    def see(self, layer: Layer) -> None:
        """To be called before the attention of a layer runs."""
        if layer.index in self.layers:
            self.resid[layer.index] = layer.resid

    def see_z(self, layer: int, z: Tensor, known: Bool[Tensor, " head"]) -> None:
        """To be called with the heads' outputs as computed, and of which heads they mean something."""
        if layer in self.layers:
            self.z[layer], self.known[layer] = z, known


class Trunk:
    """States of a run under ``mask``, valid below and at layer ``depth``. Final.

    A state at layer l is valid for every mask that agrees with the trunk's on all layers below l.

    Attributes:
        mask: Whose run it is.
        kv: Keys and values of the layers' attention, where they were asked for.
        depth: Deepest layer whose state is held; -1 before the first run.
        stride: Every how many layers a state is kept, so that they fit the memory.
    """

    def __init__(self, model: HookedModel, layout: Layout, n_prompts: int, n_pos: int) -> None:
        self.layout = layout
        self.mask: Bool[Tensor, " node"] = layout.universe.full()
        self.depth = -1
        self._resid: dict[int, Float[Tensor, "prompt pos d_model"]] = {}
        self._z: dict[int, Float[Tensor, "prompt pos head d_head"]] = {}
        self._known: dict[int, Bool[Tensor, " head"]] = {}
        self._outs: dict[tuple[int, int, int], Float[Tensor, "prompt pos d_model"]] = {}
        self._model = model
        self._n_layers = model.n_layers
        self.kv: dict[int, KeysValues] = {}
        a_layer = n_prompts * n_pos * (model.d_model + model.d_heads) * model.dtype.itemsize
        fitting = max(1, int(0.3 * free_room(model) // a_layer))
        self.stride = -(-model.n_layers // fitting)

    def valid_until(self, mask: Bool[Tensor, " node"]) -> int:
        """Deepest layer whose state holds for this mask too; -1 if there is none."""
        return min(self.depth, int(self.layout.first_difference(mask[None], self.mask)))

    @property
    def has_all_keys_values(self) -> bool:
        """Whether later positions can be computed alone: the run reached the last layer and every attention in it was computed."""
        return self.depth == self._n_layers - 1 and len(self.kv) == self._n_layers

    def entry(self, layer: int) -> int:
        """The layer at or below this one from which a pass can start; 0 if there is none."""
        layer = min(layer, self.depth)
        return max(0, layer - layer % self.stride)

    def resid(self, layer: int, rows: slice) -> Tensor | None:
        """What enters the layer, for some prompts; None where it is not held."""
        held = self._resid.get(layer)
        return None if held is None else held[rows]

    def z(self, layer: int, rows: slice, live: Bool[Tensor, " head"]) -> Tensor | None:
        """The outputs of the layer's heads before replacement, likewise; None too where one of ``live`` was not computed.

        Those of other heads may mean nothing.
        """
        held = self._z.get(layer)
        return None if held is None or (live & ~self._known[layer]).any() else held[rows]

    def carry(self, layer: int, rows: slice, watch: Watch) -> None:
        """Keeps what is held of the layer's heads where a run that starts there did not compute them anew."""
        if layer in self._z:
            watch.z[layer], watch.known[layer] = self._z[layer][rows], self._known[layer]

    def out(self, layer: int, rows: slice) -> Float[Tensor, "prompt pos d_model"]:
        """The output projection of these. Held for the layer asked for last."""
        key = (layer, rows.start, rows.stop)
        if key not in self._outs:
            self._outs = {other: out for other, out in self._outs.items() if other[0] == layer}
            self._outs[key] = self._model.project(layer, self._z[layer][rows])
        return self._outs[key]

    def replace(self, mask: Bool[Tensor, " node"], start: int, depth: int, watches: list[Watch]) -> None:
        """Takes over the states of a run under ``mask`` that started at layer ``start`` and reached ``depth``.

        Args:
            mask: Of the run.
            start: States below this layer stay.
            depth: Deepest layer reached.
            watches: What was seen, one for each slice of the prompts, in order.
        """
        self._outs.clear()
        for held, part in ((self._resid, "resid"), (self._z, "z")):
            for layer in [layer for layer in held if layer > start]:
                del held[layer]
            seen = [getattr(watch, part) for watch in watches]
            for layer in seen[0] if seen else ():
                held[layer] = torch.cat([each[layer] for each in seen]) if len(seen) > 1 else seen[0][layer]
        self._known.update(watches[0].known if watches else {})
        for layer in [layer for layer in self.kv if layer > start]:
            del self.kv[layer]
        for layer in watches[0].kv if watches else ():
            keys, values = zip(*(watch.kv[layer] for watch in watches), strict=True)
            self.kv[layer] = torch.cat(keys), torch.cat(values)
        self.mask = mask.clone()
        self.depth = depth
