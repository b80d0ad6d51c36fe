"""The matrices with which heads read and write the residual stream, split by head."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.columns import heads_in
from circuitkit.models.hooked import HookedModel
from circuitkit.models.sharded import is_sharded

_transposed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def matrix_of(module: nn.Module) -> Float[Tensor, "read written"]:
    """The matrix that a linear module multiplies its input by, as a view; how its weight lies is found by trying.

    Raises:
        ModelError: The module is not x @ matrix + bias with a matrix that is at hand.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.device.type == "meta":
        raise ModelError(_NO_MATRIX.format(type(module).__name__))
    if is_sharded(module):
        raise ModelError(_NO_MATRIX.format(type(module).__name__))
    if module not in _transposed:
        fitting = [transposed for transposed in (False, True) if _fits(module, weight.detach().T if transposed else weight.detach())]
        if not fitting:
            raise ModelError(_NO_MATRIX.format(type(module).__name__))
        _transposed[module] = fitting[0]
    return weight.detach().T if _transposed[module] else weight.detach()


_NO_MATRIX = (
    "Gradients of edges need the weights of {} as a matrix, and it is offloaded, quantised, split over processes or no plain linear map. "
    "Load the model unquantised on one device."
)


def check_sums(model: HookedModel, what: str) -> None:
    """Refuses a model in which what single heads add does not sum up to what the attention adds.

    Args:
        model: The model.
        what: What needs that, for the sentence.

    Raises:
        ModelError: Its output projections round what they read.
    """
    if (model.settings.get("quantization_config") or {}).get("load_in_8bit"):
        raise ModelError(
            f"{what} need what each head adds by itself, and in 8 bits the output projection rounds all heads of a position together. Take "
            "model.quantization=bnb_4bit, which rounds weights alone, or the plain weights."
        )


def _fits(module: nn.Module, matrix: Float[Tensor, "read written"]) -> bool:
    """Whether the module multiplies by this matrix, tried on a vector."""
    probe = torch.linspace(-1, 1, len(matrix)).to(matrix)
    with torch.no_grad():
        try:
            given = (module.forward(probe[None]) - module.forward(torch.zeros_like(probe)[None]))[0]
        except RuntimeError:  # shapes
            return False
        wanted = probe @ matrix
        return given.shape == wanted.shape and bool((given - wanted).abs().max() <= 0.02 * wanted.abs().max())


def writers(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """By what each head's output is multiplied to give what it adds to the residual stream; a view of the weight."""
    return matrix_of(model.module(layer, "out_proj")).unflatten(0, (model.n_heads, -1))


def readers(model: HookedModel, layer: int) -> list[tuple[Float[Tensor, "some d_model d_head"], Float[Tensor, "some d_head"]]]:
    """For queries, keys and values by what each head multiplies what the attention reads, and the bias; views of the weights.

    Keys and values have one for each key/value head. Norms of all heads together, which may lie behind, are left out.
    """
    found = []
    for port in model.map.ports(layer):
        module: Any = model.hf.get_submodule(port.module)
        matrix = matrix_of(module)
        bias = matrix.new_zeros(()).expand(matrix.shape[1]) if module.bias is None else module.bias.detach()
        found.append((heads_in(matrix, port).movedim(-2, 0), heads_in(bias, port)))
    return found


def shared(model: HookedModel, part: Float[Tensor, "*row kv_head d_head"]) -> Float[Tensor, "*row head d_head"]:
    """Keys or values with a slice for each query head."""
    group = model.n_heads // part.shape[-2]
    return part if group == 1 else part.repeat_interleave(group, -2)
