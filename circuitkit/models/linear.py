"""The matrices with which heads read and write the residual stream, split by head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel


def matrix_of(module: nn.Module) -> Float[Tensor, "read written"]:
    """The matrix that a linear module multiplies its input by; which way its weight lies is told by trying it on a vector.

    Raises:
        ModelError: The module is not x @ matrix + bias with a matrix that is at hand.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and weight.device.type != "meta":
        with torch.no_grad():
            for matrix in (weight.detach(), weight.detach().T):
                probe = torch.linspace(-1, 1, len(matrix)).to(matrix)
                try:
                    given = module.forward(probe[None]) - module.forward(torch.zeros_like(probe)[None])
                except RuntimeError:
                    continue
                wanted = probe @ matrix
                if given[0].shape == wanted.shape and (given[0] - wanted).abs().max() <= 0.02 * wanted.abs().max():
                    return matrix
    raise ModelError(
        f"Gradients of edges need the weights of {type(module).__name__} as a matrix, and it is offloaded, quantised or no plain linear map. "
        "Load the model unquantised on one device."
    )


def writers(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """By what each head's output is multiplied to give what it adds to the residual stream; a view of the weight."""
    return matrix_of(model.module(layer, "out_proj")).unflatten(0, (model.n_heads, -1))


def readers(model: HookedModel, layer: int) -> list[tuple[Float[Tensor, "some d_model d_head"], Float[Tensor, "some d_head"]]]:
    """For queries, keys and values by what each head multiplies the normed residual stream, and the bias; views of the weights.

    Keys and values have one for each key/value head.
    """
    modules = [model.hf.get_submodule(f"{model.architecture.blocks}.{layer}.{path}") for path in model.architecture.query_key_value]
    matrices = [matrix_of(module) for module in modules]
    biases = [matrix.new_zeros(()).expand(matrix.shape[1]) if module.bias is None else module.bias.detach()
              for module, matrix in zip(modules, matrices, strict=True)]  # fmt: skip
    return list(zip((part.movedim(-2, 0) for part in split(model, matrices)), split(model, biases), strict=True))


def split(model: HookedModel, outs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of what the projections of a layer give, each ... x head x d_head; views."""
    if len(outs) == 1:
        if model.architecture.fused_by_head:
            return outs[0].unflatten(-1, (model.n_heads, 3, -1)).unbind(-2)  # type: ignore[return-value]
        outs = list(outs[0].chunk(3, -1))
    q, k, v = (outs[0].unflatten(-1, (model.n_heads, -1)), *(out.unflatten(-1, (model.n_kv_heads, -1)) for out in outs[1:]))
    return q, k, v


def shared(model: HookedModel, part: Float[Tensor, "*row kv_head d_head"]) -> Float[Tensor, "*row head d_head"]:
    """Keys or values with a slice for each query head."""
    group = model.n_heads // part.shape[-2]
    return part if group == 1 else part.repeat_interleave(group, -2)
