"""Columns of projections: queries, keys and values of every head in the output of a module, whichever way they lie there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Projection


def heads_in(out: Float[Tensor, "*row column"], projection: Projection) -> Float[Tensor, "*row head width"]:
    """What a projection's output has for each head: a view where heads lie at equal distances."""
    first, width = projection.starts[0], projection.width
    if projection.is_whole and out.shape[-1] == projection.n_heads * width:
        return out.unflatten(-1, (-1, width))
    step = _step(projection)
    if step is None:
        chosen = torch.tensor(columns_of(projection), device=out.device)
        return out.index_select(-1, chosen).unflatten(-1, (-1, width))
    if step == width:
        return out.narrow(-1, first, projection.n_heads * width).unflatten(-1, (-1, width))
    period = first // step * step  # in whole periods before the first head there is something else
    if first - period + width <= step and out.shape[-1] - period >= projection.n_heads * step:
        return out.narrow(-1, period, projection.n_heads * step).unflatten(-1, (-1, step)).narrow(-1, first - period, width)
    return out.narrow(-1, first, projection.starts[-1] + width - first).unfold(-1, width, step)


def together(
    projections: Sequence[Projection], values: Sequence[Float[Tensor, "*row head width"]]
) -> Float[Tensor, "*row column"]:
    """The output of one module that gives all of these.

    Args:
        projections: All that the module serves.
        values: Of each.

    Raises:
        ModelError: There are columns that none of them names.
    """
    parts = [value.flatten(-2) for value in values]
    if len(parts) == 1 and projections[0].is_whole:
        return parts[0]
    order = _order(tuple(projections))
    together = torch.cat(parts, -1)
    return together if order is None else together.index_select(-1, order.to(together.device))


def columns_of(projection: Projection, heads: Sequence[int] | None = None) -> list[int]:
    """The columns of some heads, or of all, head by head."""
    chosen = range(projection.n_heads) if heads is None else heads
    return [projection.starts[head] + column for head in chosen for column in range(projection.width)]


def by_module(projections: Sequence[Projection]) -> dict[str, tuple[int, ...]]:
    """For each module, in the order in which it is first named, which of the projections it serves."""
    paths = dict.fromkeys(projection.module for projection in projections)
    return {path: tuple(place for place, each in enumerate(projections) if each.module == path) for path in paths}


def _step(projection: Projection) -> int | None:
    """The distance from head to head; None where it varies."""
    apart = {after - before for before, after in zip(projection.starts, projection.starts[1:], strict=False)}
    if len(apart) > 1 or (apart and min(apart) < projection.width):
        return None
    return apart.pop() if apart else projection.width


@lru_cache(maxsize=256)
def _order(projections: tuple[Projection, ...]) -> Int[Tensor, " column"] | None:
    """Where each column of a module is among those of its projections, side by side; None where they are in that order."""
    columns = torch.tensor([column for projection in projections for column in columns_of(projection)], device="cpu")
    ordered, order = columns.sort()
    if not torch.equal(ordered, torch.arange(len(columns), device="cpu")):
        raise ModelError(
            f"{projections[0].module} gives more than the queries, keys and values that the map names (or one column twice): its output "
            "cannot be made of them. Expected heads that cover it column by column; take units that do not split the heads' inputs."
        )
    return None if torch.equal(order, ordered) else order
