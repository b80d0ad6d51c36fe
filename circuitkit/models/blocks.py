"""How a layer reads the residual stream and adds to it: through norms before and behind its attention and its MLP, where it has them.

Pre-norm models (GPT-2, Llama) have the norms before alone, post-norm models (OLMo 2) those behind alone, and Gemma 2 has both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from circuitkit.models.hooked import HookedModel

Part = Literal["attention", "mlp"]


def norm_before(model: HookedModel, layer: int, part: Part) -> nn.Module | None:
    """The norm between the residual stream and what attention or MLP read; None where they read it as it is."""
    return model.optional(layer, f"{part}_norm")


def norm_behind(model: HookedModel, layer: int, part: Part) -> nn.Module | None:
    """The norm between what attention or MLP give and the residual stream (post-norm); None where that is added as it is."""
    return model.optional(layer, f"{part}_post_norm")


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


def projections(model: HookedModel, layer: int) -> list[nn.Module]:
    """The modules that make queries, keys and values of what the attention reads; one if they are fused."""
    block = model.hf.get_submodule(f"{model.architecture.blocks}.{layer}")
    return [block.get_submodule(path) for path in model.architecture.query_key_value]


def joint_norms(model: HookedModel, layer: int) -> list[nn.Module | None]:
    """For each projection the norm of all heads together behind it (OLMo 2), through which every head's output depends on all; or None."""
    norms = (model.optional(layer, "query_norm"), model.optional(layer, "key_norm"), None)
    return list(norms[: len(model.architecture.query_key_value)])
