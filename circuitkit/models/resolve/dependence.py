"""The heads of an attention that computes everything by itself, found by what its output projection's input depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitkit.models.model_map import Heads, Projection
from circuitkit.models.resolve.blocks import Added, Layer
from circuitkit.models.resolve.compare import alike, is_affine
from circuitkit.models.resolve.heads import columns, first_position, projections_out
from circuitkit.models.resolve.probe import Call, Record


@dataclass(frozen=True, eq=False)
class _Run:
    """A layer run again with gradients. Final.

    Attributes:
        z: What the output projection read: row x position x width.
        made: What each projection of the input gave, as a leaf of autograd.
    """

    z: Tensor
    made: list[Tensor]


def heads_by_dependence(record: Record, layer: Layer, added: Added, n_heads: int | None) -> Heads | None:
    """The heads, if there are some: slices of z that are the values at the first position, and depend on columns of their own.

    The first token sees itself only, so that there z is the value whatever queries and keys are. Of what the slice of a head at the last
    position depends on, queries are read at that position only, keys and values earlier too.

    Args:
        record: A pass.
        layer: The layer.
        added: What may be an attention.
        n_heads: As the configuration says; None to try.
    """
    for out_proj in projections_out(record, added):
        readers = [call for call in record.within(layer.call.path) if call is not out_proj and len(call.inputs) == 1]
        reading = [call for call in readers if alike(call.inputs[0][1], added.read) and is_affine(call)]
        width = out_proj.inputs[0][1].shape[-1]
        if not reading:
            continue
        run = _again(layer, out_proj, reading)
        if run is None:
            continue
        choices = [n_heads] if n_heads is not None else [number for number in range(width, 0, -1) if width % number == 0]
        for number in choices:
            found = _heads(record, run, reading, out_proj, number) if number and width % number == 0 else None
            if found is not None and (n_heads is not None or found.ports is not None):
                return found
    return None


def _again(layer: Layer, out_proj: Call, reading: list[Call]) -> _Run | None:
    """Runs a layer again, cut where its input was projected."""
    made: dict[int, Tensor] = {}
    read: list[Tensor] = []

    def cut(place: int, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        made[place] = out.detach().requires_grad_()
        return made[place] * 1.0  # some write into it

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])

    handles = [call.module.register_forward_hook(partial(cut, place)) for place, call in enumerate(reading)]
    handles.append(out_proj.module.register_forward_pre_hook(keep))
    try:
        with torch.enable_grad():
            layer.call.module.forward(*layer.call.args, **layer.call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if len(made) != len(reading) or len(read) != 1 or not read[0].requires_grad:
        return None
    return _Run(read[0].view(*layer.left.shape[:2], -1), [made[place] for place in range(len(reading))])


def _heads(record: Record, run: _Run, reading: list[Call], out_proj: Call, n_heads: int) -> Heads | None:
    first = run.z.detach()[:, 0].unflatten(-1, (n_heads, -1))
    values = None
    for call in reading:
        starts = columns(first_position(call.outputs[0][1], record.ids), first)
        if starts is not None:
            values = Projection(call.path, starts, first.shape[-1])
            break
    if values is None:
        return None
    place = next(place for place, call in enumerate(reading) if call.path == values.module)
    queries: list[tuple[int, int, int]] = []
    keys: list[tuple[int, int, int]] = []
    for head in range(n_heads):
        now, earlier = _depends(run, head, n_heads)
        own = values.starts[head // (n_heads // values.n_heads)]
        earlier[place][own : own + values.width] = False
        if any(bool(earlier[place][start : start + values.width].any()) for start in values.starts):
            return None  # a head that reads the values of another
        for found, masks in ((queries, [one & ~other for one, other in zip(now, earlier, strict=True)]), (keys, earlier)):
            masks[place][own : own + values.width] = False
            found.extend(_spans(masks))
    q, k = _projection(reading, queries, n_heads), _projection(reading, keys, n_heads)
    if q is not None and q.n_heads != n_heads or k is not None and k.n_heads != values.n_heads:
        return None
    d_head = q.width if q is not None else values.width
    return Heads(out_proj.path, n_heads, values.n_heads, d_head, values.width, q, k, values, pattern=False)


def _depends(run: _Run, head: int, n_heads: int) -> tuple[list[Bool[Tensor, " column"]], list[Bool[Tensor, " column"]]]:
    """On which columns of each projection a head's output at the last position depends: there, and at earlier positions."""
    weights: Float[Tensor, "row pos width"] = torch.zeros_like(run.z)
    size = run.z.shape[-1] // n_heads
    noise = torch.randn(size, generator=torch.Generator().manual_seed(head)).to(run.z)
    weights[:, -1, head * size : (head + 1) * size] = noise
    grads = torch.autograd.grad(run.z, run.made, weights, retain_graph=True, allow_unused=True)
    now: list[Tensor] = []
    earlier: list[Tensor] = []
    for grad, made in zip(grads, run.made, strict=True):
        full = (torch.zeros_like(made) if grad is None else grad).reshape(*run.z.shape[:2], -1)
        now.append((full[:, -1] != 0).any(0))
        earlier.append((full[:, :-1] != 0).any(0).any(0))
    return now, earlier


def _spans(masks: list[Tensor]) -> list[tuple[int, int, int]]:
    """The columns as (projection, first, number), if they lie side by side in one projection; else nothing."""
    places = [place for place, mask in enumerate(masks) if bool(mask.any())]
    if len(places) != 1:
        return []
    found = masks[places[0]].nonzero().flatten()
    first, last = int(found[0]), int(found[-1])
    return [(places[0], first, len(found))] if last - first + 1 == len(found) else []


def _projection(reading: list[Call], spans: list[tuple[int, int, int]], n_heads: int) -> Projection | None:
    """The columns of all heads, those that several share once."""
    if len(spans) != n_heads or len({(place, width) for place, _, width in spans}) != 1:
        return None
    starts = [start for _, start, _ in spans]
    once = list(dict.fromkeys(starts))
    if starts != [start for start in once for _ in range(n_heads // len(once))]:
        return None
    return Projection(reading[spans[0][0]].path, tuple(once), spans[0][2])
