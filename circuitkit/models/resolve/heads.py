"""The heads of an attention: its output projection, and in which columns queries, keys and values of each lie, matched by value."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Heads, Projection
from circuitkit.models.resolve.blocks import Added
from circuitkit.models.resolve.compare import alike, error, is_affine, parallel, tolerance
from circuitkit.models.resolve.probe import Attention, Call, Record, inside, watched_attention


def heads(record: Record, added: Added) -> Heads:
    """The heads of an attention that goes through transformers' attention interface.

    Raises:
        ModelError: The attention function ran several times, or its output reaches the addend in another way than through one projection.
    """
    seen = [attention for attention in record.attentions if inside(attention.path, added.owner.path)]
    if len(seen) != 1:
        raise ModelError(
            f"Expected {added.owner.path} to compute attention once, found {len(seen)} times. Heads that attend several times have no "
            "single output; give the map of the model by hand."
        )
    attention = seen[0]
    out_proj = _out_proj(record, added, attention)
    calls = [call for call in record.within(added.owner.path) if call is not out_proj]
    queries, keys, values = (_projection(record, calls, added.read, part) for part in (attention.q, attention.k, attention.v))
    n_heads, n_kv_heads = attention.q.shape[1], attention.v.shape[1]
    if keys is not None and values is not None and keys.n_heads == values.n_heads:
        n_kv_heads = values.n_heads  # less than attention sees, where they were repeated for the query heads
    keys = keys if keys is not None and keys.n_heads == n_kv_heads else None
    values = values if values is not None and values.n_heads == n_kv_heads else None
    d_head, d_value, pattern = attention.q.shape[-1], attention.z.shape[-1], attention.pattern is not None
    gated = not alike(out_proj.inputs[0][1], attention.z)
    return Heads(out_proj.path, n_heads, n_kv_heads, d_head, d_value, queries, keys, values, pattern, gated)


def projections_out(record: Record, added: Added) -> list[Call]:
    """The linear maps whose output is what a part gives."""
    calls = list({id(call): call for call in [added.call, added.owner, *record.within(added.owner.path)]}.values())
    return [call for call in calls if gives(call, added.value) and is_affine(call)]


def gives(call: Call, value: Tensor) -> bool:
    """Whether a module gives a value, in whichever way its rows and positions lie."""
    return any(out.numel() == value.numel() and out.shape[-1] == value.shape[-1] and alike(out, value) for _, out in call.outputs)


def _out_proj(record: Record, added: Added, attention: Attention) -> Call:
    """The linear map whose input is z, as it is or behind a gate, and whose output is what the attention gives."""
    linear = projections_out(record, added)
    found = [call for call in linear if alike(call.inputs[0][1], attention.z)]
    same_size = [call for call in linear if call.inputs[0][1].numel() == attention.z.numel()]
    found = found or [call for call in same_size if _is_gated(record, added, attention, call)]
    if found:
        record.once(found[0].path)
        return found[0]
    names = ", ".join(call.path for call in linear)
    raise ModelError(
        f"The heads of {attention.path} cannot be told apart behind the attention function: expected a linear module whose input is their "
        f"outputs side by side (z) and whose output is what {added.call.path} gives, found "
        f"{names + ' with another input' if names else 'none'}. Something mixes heads behind z."
    )


def _is_gated(record: Record, added: Added, attention: Attention, out_proj: Call) -> bool:
    """Whether a gate is all that is between z and the projection: twice the output of some heads gives twice their slices, and no more."""
    n_heads = attention.q.shape[1]
    slices: list[Tensor] = []

    def before(_: object, args: tuple[Tensor, ...]) -> None:
        slices.append(args[0].detach().reshape(*added.value.shape[:2], n_heads, -1).double())

    def run(factors: Tensor) -> Tensor:
        def see(module: object, q: object, k: object, v: object, z: Tensor, pattern: object) -> Tensor:
            return z * factors.to(z)[:, None]

        with watched_attention(record.hf, see), torch.no_grad():
            added.owner.module.forward(*added.owner.args, **added.owner.kwargs)
        return slices.pop()

    if attention.z.shape[-2] != n_heads:
        return False
    handle = out_proj.module.register_forward_pre_hook(before)
    try:
        once, factors = run(torch.ones(n_heads)), 1 + torch.arange(n_heads) % 3
        several = run(factors)
    finally:
        handle.remove()
    return bool(error(several, once * factors.to(once)[:, None]) <= tolerance(attention.z.dtype))


def _projection(record: Record, calls: Iterable[Call], read: Tensor, part: Float[Tensor, "row head pos width"]) -> Projection | None:
    """The linear map in whose output each head's part lies, if one reads what the attention reads.

    At the first position no rotary embedding turns anything, so there queries and keys are compared; a norm of each head's and a factor
    change their length only. What a module inside (a norm over all heads) changes more is followed back through it.
    """
    ids, width = record.ids, part.shape[-1]
    calls = [call for call in calls if len(call.inputs) == 1 and call.outputs]
    first, norm = part[:, :, 0], None
    for _ in range(3):
        fitting = [(call, found) for call in calls if (found := columns(first_position(call.outputs[0][1], ids), first)) is not None]
        for call, found in fitting:
            if alike(call.inputs[0][1], read) and is_affine(call):
                return Projection(call.path, found, width, norm)
        if not fitting:
            return None
        behind = fitting[-1][0]  # the last to end is the last to change them
        if behind.inputs[0][1].ndim == 3:  # of all heads together, of which there may be one
            norm = behind.path
        first = first_position(behind.inputs[0][1], ids)
        if first.shape[-1] % width:
            return None
        first = first.unflatten(-1, (-1, width))
        calls = [call for call in calls if call is not behind]
    return None


def first_position(tensor: Tensor, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row width"]:
    """What lies at the first position, side by side."""
    rows, length = ids.shape
    if tensor.shape[:2] == ids.shape:
        return tensor[:, 0].flatten(1)
    if tensor.ndim == 4 and tensor.shape[0] == rows and tensor.shape[2] == length:
        return tensor[:, :, 0].flatten(1)
    return tensor.unflatten(0, (rows, -1))[:, 0].flatten(1)


def columns(out: Float[Tensor, "row width"], part: Float[Tensor, "row head d_head"]) -> tuple[int, ...] | None:
    """For each head at which column of a module's output its part begins; keys and values that were repeated for each query head once."""
    width = part.shape[-1]
    if out.shape[-1] < width:
        return None
    step = gcd(width, out.shape[-1])
    windows = out.unfold(-1, width, step)
    starts: list[int] = []
    for head in range(part.shape[1]):
        fits = parallel(windows, part[:, head, None].expand_as(windows)).all(0).nonzero().flatten().tolist()
        if len(fits) != 1:
            return None
        starts.append(fits[0] * step)
    once = list(dict.fromkeys(starts))
    if starts != [start for start in once for _ in range(len(starts) // len(once))]:
        return None
    return tuple(once)


def neurons(record: Record, added: Added) -> str | None:
    """The output projection of an MLP: the linear map whose output is what the MLP gives; None where it has none, as routed experts."""
    for call in projections_out(record, added):
        if call.inputs[0][1].shape[:-1] == call.outputs[0][1].shape[:-1]:
            return call.path
    return None
