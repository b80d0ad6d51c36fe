"""The heads of an attention: its output projection, and the columns in which queries, keys and values of each head lie, matched by value."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd


from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Heads, Projection
from circuitkit.models.resolve.blocks import Added
from circuitkit.models.resolve.compare import alike, is_affine, parallel, same
from circuitkit.models.resolve.probe import Attention, Call, Record, inside


def heads(record: Record, added: Added) -> Heads:
    """The heads of an attention that goes through transformers' attention interface.

    Raises:
        ModelError: The attention function ran several times, or its output reaches the addend in another way than through one projection.
    """
    seen = [attention for attention in record.attentions if inside(attention.path, added.call.path)]
    if len(seen) != 1:
        raise ModelError(
            f"Expected {added.call.path} to compute attention once, found {len(seen)} times. Heads that attend several times have no "
            "single output; give the map of the model by hand."
        )
    attention = seen[0]
    out_proj = _out_proj(record, added, attention)
    calls = [call for call in record.within(added.call.path) if call is not out_proj]
    reads = _reads(record, added)
    queries, keys, values = (_projection(record, calls, reads, part) for part in (attention.q, attention.k, attention.v))
    n_heads, n_kv_heads = attention.q.shape[1], attention.v.shape[1]
    if keys is not None and values is not None and keys.n_heads == values.n_heads:
        n_kv_heads = values.n_heads
    else:
        keys = keys if keys is not None and keys.n_heads == n_kv_heads else None
        values = values if values is not None and values.n_heads == n_kv_heads else None
    return Heads(
        out_proj.path, n_heads, n_kv_heads, attention.q.shape[-1], attention.z.shape[-1], queries, keys, values, attention.pattern is not None
    )


def _out_proj(record: Record, added: Added, attention: Attention) -> Call:
    """The linear map whose input is z, and whose output is what the attention gives."""
    makers = [call for call in [added.call, *record.within(added.call.path)]
              if any(out.numel() == added.value.numel() and same(out.view(added.value.shape), added.value) for _, out in call.outputs)
              and not any(inside(attention.path, call.path) for attention in record.attentions)]  # fmt: skip
    linear = [call for call in makers if is_affine(call)]
    for call in linear:
        if alike(call.inputs[0][1], attention.z):
            record.once(call.path)
            return call
    raise ModelError(
        f"The heads of {attention.path} cannot be told apart behind the attention function: expected a linear module whose input is their "
        f"outputs side by side (z) and whose output is what {added.call.path} gives, found "
        f"{', '.join(call.path for call in linear) + ' with another input' if linear else 'none'}. Something mixes heads behind z."
    )


def _reads(record: Record, added: Added) -> list[Tensor]:
    """What the attention reads, as modules in it may be given it."""
    return [added.read]


def _projection(record: Record, calls: Iterable[Call], reads: list[Tensor], part: Float[Tensor, "row head pos width"]) -> Projection | None:
    """The linear map in whose output each head's part lies, if one reads what the attention reads.

    At the first position no rotary embedding turns anything, so there queries and keys are compared; a norm of each head's and a factor
    change their length only. What a module inside (a norm over all heads) changes more is followed back through it.
    """
    ids, width = record.ids, part.shape[-1]
    calls = [call for call in calls if len(call.inputs) == 1 and call.outputs]
    first = part[:, :, 0]
    for _ in range(3):
        fitting = [(call, found) for call in calls if (found := _columns(_first(call.outputs[0][1], ids), first)) is not None]
        for call, found in fitting:
            if any(alike(call.inputs[0][1], read) for read in reads) and is_affine(call):
                return Projection(call.path, found, width)
        if not fitting:
            return None
        behind = fitting[-1][0]  # the last to end is the last to change them
        first = _first(behind.inputs[0][1], ids)
        if first.shape[-1] % width:
            return None
        first = first.unflatten(-1, (-1, width))
        calls = [call for call in calls if call is not behind]
    return None


def _first(tensor: Tensor, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row width"]:
    """What lies at the first position, side by side."""
    rows, length = ids.shape
    if tensor.shape[:2] == ids.shape:
        return tensor[:, 0].flatten(1)
    if tensor.ndim == 4 and tensor.shape[0] == rows and tensor.shape[2] == length:
        return tensor[:, :, 0].flatten(1)
    return tensor.unflatten(0, (rows, -1))[:, 0].flatten(1)


def _columns(out: Float[Tensor, "row width"], part: Float[Tensor, "row head d_head"]) -> tuple[int, ...] | None:
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
    for call in [added.call, *record.within(added.call.path)]:
        gives = any(out.numel() == added.value.numel() and same(out.view(added.value.shape), added.value) for _, out in call.outputs)
        if gives and is_affine(call) and call.inputs[0][1].shape[:-1] == call.outputs[0][1].shape[:-1]:
            return call.path
    return None



