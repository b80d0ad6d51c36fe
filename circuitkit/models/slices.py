"""Slices of attention weights: queries, keys, values and the output projection of some heads of a layer alone, outside of its modules."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitkit.models.columns import columns_of
from circuitkit.models.hooked import HookedModel
from circuitkit.models.model_map import Projection
from circuitkit.models.sharded import is_sharded

Heads = tuple[int, ...]
# In narrower models a pass is bound by Python, and leaving heads out costs more time than it saves.
WORTH_FROM = 512


class HeadSlices:
    """Does the products of single heads with weights that are copied together once and held for the heads asked for last. Final.

    At most one slice of each projection of a layer is held, so never more than a second copy of the attentions' weights.

    Args:
        model: A model for which ``possible`` holds.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._held: dict[tuple[int, int], tuple[Heads, Tensor, Tensor | None]] = {}

    @staticmethod
    def possible(model: HookedModel) -> bool:
        """Whether every projection is a plain matrix in float32 that lies where it computes, and gives what heads take as it is.

        In half precision a sum of two partial outputs would be rounded once more than the model does; and a norm of all heads together
        behind a projection needs all of them.
        """
        heads = [block.heads for block in model.map.blocks if block.heads is not None]
        ports = [each.ports for each in heads]
        if not heads or any(found is None or any(port.norm is not None for port in found) for found in ports):
            return False
        if any(each.gated or each.d_value != each.d_head for each in heads):  # a gate may lie in the same projection
            return False
        if len({each.n_kv_heads for each in heads}) > 1:  # heads would read other keys and values in other layers
            return False
        modules = [model.hf.get_submodule(path) for path in _paths(model)]
        return all(type(module) in (nn.Linear, Conv1D) and not hasattr(module, "_hf_hook") for module in modules) and all(
            module.weight.dtype is torch.float32 and not is_sharded(module) for module in modules
        )

    @staticmethod
    def worthwhile(model: HookedModel) -> bool:
        """Whether leaving heads out saves time, as far as the model's width tells."""
        return model.d_model >= WORTH_FROM

    @property
    def most_bytes(self) -> int:
        """What is held at most: a copy of the weights of every projection."""
        modules: list[Any] = [self._model.hf.get_submodule(path) for path in _paths(self._model)]
        return sum(module.weight.numel() * module.weight.dtype.itemsize for module in modules)

    def read_heads(self, heads: Heads) -> Heads:
        """The key/value heads that some heads read."""
        group = self._model.n_heads // self._model.n_kv_heads
        return tuple(sorted({head // group for head in heads}))

    def queries(self, layer: int, heads: Heads, read: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos some d_head"]:
        """Queries of some heads, of what the projections of a layer read."""
        return self._times(read, *self._columns(layer, (0,), heads)).unflatten(-1, (len(heads), -1))

    def keys_values(
        self, layer: int, heads: Heads, read: Float[Tensor, "row pos d_model"]
    ) -> tuple[Float[Tensor, "row pos some d_head"], Float[Tensor, "row pos some d_head"]]:
        """Keys and values of some key/value heads, likewise."""
        _, *ports = self._model.map.ports(layer)
        keys, values = self._times(read, *self._columns(layer, (1, 2), heads)).split([len(heads) * port.width for port in ports], -1)
        return keys.unflatten(-1, (len(heads), -1)), values.unflatten(-1, (len(heads), -1))

    def out(self, layer: int, heads: Heads, z: Float[Tensor, "row pos some d_head"]) -> Float[Tensor, "row pos d_model"]:
        """What the outputs of some heads add to the residual stream together, without the bias."""
        return self._times(z.flatten(-2), self._rows(layer, heads), None)

    def bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Of the output projection."""
        bias = self._model.module(layer, "out_proj").bias
        return None if bias is None else bias.detach()  # type: ignore[operator]

    def _times(self, act: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = act.reshape(-1, act.shape[-1])
        return (flat @ weight if bias is None else torch.addmm(bias, flat, weight)).unflatten(0, act.shape[:-1])

    def _columns(self, layer: int, parts: tuple[int, ...], heads: Heads) -> tuple[Tensor, Tensor | None]:
        key = (layer, parts[0])
        if key not in self._held or self._held[key][0] != heads:
            ports = self._model.map.ports(layer)
            pieces = [self._slice(ports[part], heads) for part in parts]
            biases = [bias for _, bias in pieces if bias is not None]
            # A projection may have a bias where another has none, as in no family known; then zeros would be needed.
            assert len(biases) in (0, len(pieces))
            self._held[key] = heads, torch.cat([weight for weight, _ in pieces]).T, torch.cat(biases) if biases else None
        return self._held[key][1:]

    def _slice(self, port: Projection, heads: Heads) -> tuple[Float[Tensor, "column d_model"], Tensor | None]:
        """The weight and bias of the queries, keys or values of some heads."""
        module = self._model.hf.get_submodule(port.module)
        matrix = _matrix(module)
        chosen = torch.tensor(columns_of(port, heads), device=matrix.device)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return matrix.index_select(0, chosen), None if bias is None else bias.detach().index_select(0, chosen)

    def _rows(self, layer: int, heads: Heads) -> Float[Tensor, "some_d_head d_model"]:
        key = (layer, -1)
        if key not in self._held or self._held[key][0] != heads:
            weight = _matrix(self._model.module(layer, "out_proj")).T.unflatten(0, (self._model.n_heads, -1))
            chosen = torch.tensor(heads, device=weight.device)
            self._held[key] = heads, weight.index_select(0, chosen).flatten(0, 1), None
        return self._held[key][1]


def _paths(model: HookedModel) -> list[str]:
    """Every projection of queries, keys, values and outputs, once."""
    heads = [block.heads for block in model.map.blocks if block.heads is not None]
    return list(dict.fromkeys(path for each in heads for path in (*(port.module for port in each.ports or ()), each.out_proj)))


def _matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if type(module) is Conv1D else weight
