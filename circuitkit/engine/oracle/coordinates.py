"""Neurons and features by the naive path: hooks that encode what passes a place, replace one unit after the other, and decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.core.node import Kind, Node, Site
from circuitkit.engine.featurizing import Featurizers, Place
from circuitkit.models.blocks import Part, norm_behind
from circuitkit.models.hooked import HookedModel
from circuitkit.models.model_map import put, taken
from circuitkit.patchers.base import Patcher

Encoded = tuple[Tensor, Tensor]
"""Coordinates and error, a row per prompt."""
Change = Callable[[Tensor, Tensor | None], Tensor]
"""Makes of an activation, and of what the module read, another activation."""
Lay = Callable[[Node, Tensor, Tensor], Tensor]
"""Given a unit, its new value and a tensor: the tensor with the value at those positions that the unit covers."""

KINDS = frozenset((Kind.NEURON, Kind.FEATURE, Kind.ERROR))


@contextmanager
def changed(model: HookedModel, place: Place, change: Change) -> Iterator[None]:
    """Within this context what passes a place is what ``change`` makes of it: of attention or MLP, what is added to the residual stream."""
    site, layer = place

    def at_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return change(args[0], None), *args[1:]

    def at_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return put(out, item, change(taken(out, item), args[0] if args else None))

    def at_norm_of_mlp(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return change(out, read[-1])

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[:] = args

    read: list[Tensor] = []
    block = model.map.blocks[layer]
    parts: dict[Site, Part] = {Site.ATTN_OUT: "attention", Site.MLP_OUT: "mlp"}
    norm = norm_behind(model, layer, parts[site]) if site in parts else None
    addend = block.part(parts[site]) if site in parts else None
    item = None if norm is not None else block.item if addend is None else addend.item
    if site is Site.MLP_ACT:
        handles = [model.module(layer, "mlp_out_proj").register_forward_pre_hook(at_input)]
    elif norm is not None and site is Site.ATTN_OUT:
        handles = [norm.register_forward_hook(at_output)]
    elif norm is not None:
        handles = [model.module(layer, "mlp").register_forward_pre_hook(keep), norm.register_forward_hook(at_norm_of_mlp)]
    elif site in parts:
        handles = [model.module(layer, parts[site]).register_forward_hook(at_output)]
    else:
        handles = [model.module(layer, "block").register_forward_hook(at_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(featurizers: Featurizers, place: Place, seen: dict[Place, list[Encoded]]) -> Change:
    """A change that changes nothing, and keeps coordinates and error."""
    featurizer = featurizers[place]

    def change(act: Tensor, read: Tensor | None) -> Tensor:
        seen.setdefault(place, []).append(featurizer.encode(act, read if featurizer.reads_input else None))
        return act

    return change


def replaced(featurizers: Featurizers, patcher: Patcher, place: Place, nodes: Sequence[Node], source: Encoded | None, lay: Lay) -> Change:
    """A change that replaces some units.

    Args:
        featurizers: Of all places.
        patcher: Gives the values.
        place: Site and layer.
        nodes: Units there.
        source: Coordinates and error that the patcher needs, of the prompts of the pass.
        lay: Lays values over what is there.
    """
    featurizer = featurizers[place]

    def change(act: Tensor, read: Tensor | None) -> Tensor:
        before, error_before = featurizer.encode(act, read if featurizer.reads_input else None)
        coordinates, error, touched = before.clone(), error_before, torch.zeros_like(act[..., :1])
        of_error, of_features = (None, None) if source is None else (source[1][:, -act.shape[1] :], source[0][:, -act.shape[1] :])
        for node in nodes:
            told = replace(node.component, index=None)
            touched = lay(node, torch.ones_like(touched), touched)
            if node.kind is Kind.ERROR:
                error = lay(node, patcher.value(error_before, of_error, told), error)
            else:
                assert node.index is not None
                at = slice(node.index, node.index + 1)
                value = patcher.value(before[..., at], None if of_features is None else of_features[..., at], told)
                coordinates[..., at] = lay(node, value, coordinates[..., at])
        return torch.where(touched > 0, featurizer.decode(coordinates, error).to(act.dtype), act)

    return change
