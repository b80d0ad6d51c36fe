"""How a layer reads the residual stream and adds to it: through norms before and behind its attention and its MLP, where it has them.

Pre-norm models (GPT-2, Llama) have the norms before alone, post-norm models (OLMo 2) those behind alone, and Gemma 2 has both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.model_map import Part

if TYPE_CHECKING:
    from circuitkit.models.hooked import HookedModel

__all__ = ["Part", "added", "joint_norms", "norm_before", "norm_behind", "read", "reader"]


def norm_before(model: HookedModel, layer: int, part: Part) -> nn.Module | None:
    """The norm between the residual stream and what attention or MLP read; None where they read it as it is."""
    addend = model.map.blocks[layer].part(part)
    return None if addend is None or addend.norm is None else model.hf.get_submodule(addend.norm)


def norm_behind(model: HookedModel, layer: int, part: Part) -> nn.Module | None:
    """The norm between what attention or MLP give and the residual stream (post-norm); None where that is added as it is."""
    addend = model.map.blocks[layer].part(part)
    return None if addend is None or addend.post_norm is None else model.hf.get_submodule(addend.post_norm)


def reader(model: HookedModel, layer: int, part: Part) -> nn.Module:
    """The module that is given the residual stream: the norm before attention or MLP, or where there is none that itself."""
    return norm_before(model, layer, part) or model.module(layer, part)


def read(model: HookedModel, layer: int, part: Part, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """What attention or MLP read of a residual stream."""
    norm = norm_before(model, layer, part)
    return resid if norm is None else norm(resid)


def added(model: HookedModel, layer: int, part: Part, out: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
    """What is added to the residual stream where attention or MLP give ``out``."""
    norm = norm_behind(model, layer, part)
    return out if norm is None else norm(out)


def joint_norms(model: HookedModel, layer: int) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """For queries, keys and values the norm of all heads together behind the projection (OLMo 2), through which every head's depend on all;
    or None."""
    queries, keys, values = (None if port.norm is None else model.hf.get_submodule(port.norm) for port in model.map.ports(layer))
    return queries, keys, values
