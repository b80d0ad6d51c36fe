"""A model of half precision computed in float32 for a while: every such weight is exactly a float32, so the way back loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel

HALF = (torch.bfloat16, torch.float16)


def is_half(model: HookedModel) -> bool:
    """Whether the model computes in bfloat16 or float16."""
    return model.dtype in HALF


def why_not_float32(model: HookedModel) -> str:
    """What stands in the way of ``as_float32``; empty if nothing does."""
    tensors = _tensors(model)
    if any(tensor.device.type == "meta" for tensor in tensors):
        return "some of its weights are offloaded"
    known = (*HALF, torch.float32, torch.float64)
    if getattr(model.hf, "is_quantized", False) or any(not parameter.dtype.is_floating_point or parameter.dtype not in known
                                                       for parameter in model.hf.parameters()):  # fmt: skip
        return "it is quantised"
    if any(tensor.grad is not None for tensor in tensors):
        return "its weights carry gradients"
    return ""


@contextmanager
def as_float32(model: HookedModel) -> Iterator[HookedModel]:
    """Within this context the model's weights and buffers of half precision are float32; then they are as before, bit for bit.

    States that were held of the model before belong to the other dtype: make a new engine inside.

    Raises:
        ModelError: The model is offloaded or quantised.
    """
    reason = why_not_float32(model)
    if reason:
        raise ModelError(f"{model.name} cannot be computed in float32: {reason}. Load it with model.dtype=float32 on one device instead.")
    changed: list[tuple[Tensor, torch.dtype]] = []
    try:
        for tensor in _tensors(model):
            if tensor.dtype in HALF:
                before = tensor.dtype
                tensor.data = tensor.data.float()  # in place, so that tied weights stay tied
                changed.append((tensor, before))
        yield model
    finally:
        for tensor, before in changed:
            tensor.data = tensor.data.to(before)


def _tensors(model: HookedModel) -> list[Tensor]:
    """Every weight and buffer once."""
    return [*model.hf.parameters(), *model.hf.buffers()]
