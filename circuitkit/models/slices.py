"""Slices of attention weights: queries, keys, values and the output projection of some heads of a layer alone, outside of its modules."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitkit.models.blocks import joint_norms
from circuitkit.models.hooked import HookedModel
from circuitkit.models.sharded import is_sharded

Heads = tuple[int, ...]
_PARTS = ("query", "key", "value")
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
        self._architecture = model.architecture
        self._held: dict[tuple[int, str], tuple[Heads, Tensor, Tensor | None]] = {}

    @staticmethod
    def possible(model: HookedModel) -> bool:
        """Whether every projection is a plain matrix in float32 that lies where it computes, and gives what heads take as it is.

        In half precision a sum of two partial outputs would be rounded once more than the model does; and a norm of all heads together
        behind a projection needs all of them.
        """
        if any(norm is not None for layer in range(model.n_layers) for norm in joint_norms(model, layer)):
            return False
        a = model.architecture
        blocks = [model.hf.get_submodule(f"{a.blocks}.{layer}") for layer in range(model.n_layers)]
        modules = [block.get_submodule(path) for block in blocks for path in (*a.query_key_value, a.out_proj)]
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
        a = self._architecture
        weights = (self._model.hf.get_submodule(f"{a.blocks}.{layer}").get_submodule(path).weight for layer in range(self._model.n_layers)
                   for path in (*a.query_key_value, a.out_proj))  # fmt: skip
        return sum(weight.numel() * weight.dtype.itemsize for weight in weights)

    def read_heads(self, heads: Heads) -> Heads:
        """The key/value heads that some heads read."""
        group = self._model.n_heads // self._model.n_kv_heads
        return tuple(sorted({head // group for head in heads}))

    def queries(self, layer: int, heads: Heads, read: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos some d_head"]:
        """Queries of some heads, of what the projections of a layer read."""
        return self._times(read, *self._columns(layer, ("query",), heads)).unflatten(-1, (len(heads), -1))

    def keys_values(
        self, layer: int, heads: Heads, read: Float[Tensor, "row pos d_model"]
    ) -> tuple[Float[Tensor, "row pos some d_head"], Float[Tensor, "row pos some d_head"]]:
        """Keys and values of some key/value heads, likewise."""
        keys, values = self._times(read, *self._columns(layer, ("key", "value"), heads)).chunk(2, -1)
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

    def _columns(self, layer: int, parts: tuple[str, ...], heads: Heads) -> tuple[Tensor, Tensor | None]:
        key = (layer, parts[0])
        if key not in self._held or self._held[key][0] != heads:
            block = self._model.hf.get_submodule(f"{self._architecture.blocks}.{layer}")
            modules = [block.get_submodule(path) for path in self._architecture.query_key_value]
            pieces = [self._slice(modules, _PARTS.index(part), heads) for part in parts]
            biases = [bias for _, bias in pieces if bias is not None]
            # A projection may have a bias where another has none, as in no family known; then zeros would be needed.
            assert len(biases) in (0, len(pieces))
            self._held[key] = heads, torch.cat([weight for weight, _ in pieces]).T, torch.cat(biases) if biases else None
        return self._held[key][1:]

    def _slice(self, modules: list[nn.Module], part: int, heads: Heads) -> tuple[Float[Tensor, "column d_model"], Tensor | None]:
        """The weight and bias of one of query, key and value for some heads."""
        d_head, chosen = self._model.d_head, torch.tensor(heads, device=modules[0].weight.device)  # type: ignore[arg-type]
        if len(modules) == 1:
            chosen = 3 * chosen + part if self._architecture.fused_by_head else part * self._model.n_heads + chosen
        module = modules[part if len(modules) > 1 else 0]
        matrix = _matrix(module).unflatten(0, (-1, d_head)).index_select(0, chosen).flatten(0, 1)
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return matrix, None if bias is None else bias.detach().unflatten(0, (-1, d_head)).index_select(0, chosen).flatten()

    def _rows(self, layer: int, heads: Heads) -> Float[Tensor, "some_d_head d_model"]:
        key = (layer, "out")
        if key not in self._held or self._held[key][0] != heads:
            weight = _matrix(self._model.module(layer, "out_proj")).T.unflatten(0, (self._model.n_heads, -1))
            chosen = torch.tensor(heads, device=weight.device)
            self._held[key] = heads, weight.index_select(0, chosen).flatten(0, 1), None
        return self._held[key][1]


def _matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if type(module) is Conv1D else weight
