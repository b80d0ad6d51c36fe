"""Sliced attention: in a layer, only heads that some row of a pass keeps are computed; the others add a constant to its output.

A head that every row replaces, by a patcher that does not read the activation, needs no query, key or value. What such heads add to the
residual stream through the output projection is the same in every pass, so it is computed once for the heads that are out.
Attention itself stays the model's own: it is given zeros for heads that are not computed, and what it makes of them is not looked at.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.engine.packed.replacements import Replacements
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.slices import Heads, HeadSlices


class SlicedAttention:
    """The products of the heads that are still in. Final; one an engine.

    Args:
        model: The model.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._slices = HeadSlices(model)
        self._constants: dict[int, tuple[Heads, Tensor]] = {}

    @property
    def most_bytes(self) -> int:
        """What slices of weights are held at most."""
        return self._slices.most_bytes

    def project(self, layer: Layer, live: Bool[Tensor, " head"], *, last: bool) -> None:
        """Computes queries, keys and values in a pass for some heads alone.

        Args:
            layer: In the middle of a pass.
            live: Which heads.
            last: Whether queries are needed at the last position only.
        """
        heads, read = places(live), layer.projections_in
        read_heads = self._slices.read_heads(heads)
        queries = self._slices.queries(layer.index, heads, read[:, -1:] if last else read)
        keys, values = self._slices.keys_values(layer.index, read_heads, read)
        rows, n_kv_heads = read.shape[:2], self._model.n_kv_heads
        queries = _spread(queries, heads, (*rows, self._model.n_heads, queries.shape[-1]))
        keys, values = (_spread(part, read_heads, (*rows, n_kv_heads, part.shape[-1])) for part in (keys, values))
        layer.skip_projections((queries, keys, values))

    def out(
        self, layer: int, live: Bool[Tensor, " head"], z: Float[Tensor, "row pos some d_head"]
    ) -> Float[Tensor, "row pos d_model"]:
        """What some heads add to the residual stream together, without the bias."""
        return self._slices.out(layer, places(live), z)

    def constant(self, layer: int, live: Bool[Tensor, " head"], replacements: Replacements) -> Float[Tensor, "entry pos d_model"]:
        """What all other heads add, with the bias: a table to pick prompts from. Held for the heads asked for last."""
        heads = places(live)
        if layer not in self._constants or self._constants[layer][0] != heads:
            dead = places(~live)
            table = self._slices.out(layer, dead, taken(replacements.heads_table(layer), ~live))
            bias = self._slices.bias(layer)
            self._constants[layer] = heads, table if bias is None else table + bias
        return self._constants[layer][1]


def live_heads(keep: Bool[Tensor, "mask prompt pos head"]) -> Bool[Tensor, " head"]:
    """Which heads some row keeps somewhere."""
    return keep.flatten(0, -2).any(0)


def places(live: Bool[Tensor, " head"]) -> Heads:
    """Their numbers."""
    return tuple(live.nonzero().flatten().tolist())


def taken(act: Float[Tensor, "*axes head d_head"], heads: Bool[Tensor, " head"]) -> Float[Tensor, "*axes some d_head"]:
    """The outputs of some heads. By number: a tensor without content, as in a dry run, cannot be read by a mask."""
    return act.index_select(-2, torch.tensor(places(heads), device=act.device, dtype=torch.long))


def _spread(act: Float[Tensor, "row some_pos some d_head"], heads: Heads, shape: tuple[int, ...]) -> Float[Tensor, "row pos head d_head"]:
    """The heads in their places, at the last positions, with zeros elsewhere."""
    if act.shape == shape:
        return act
    whole = act.new_zeros(shape)
    whole[:, shape[1] - act.shape[1] :].index_copy_(2, torch.tensor(heads, device=act.device), act)
    return whole
