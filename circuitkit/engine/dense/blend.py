"""Soft masks: what goes on at a site is mask x activation + (1 - mask) x value."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which sums are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def blend(act: Float[Tensor, "..."], value: Float[Tensor, "..."], mask: Float[Tensor, "..."], *, whole: bool) -> Float[Tensor, "..."]:
    """mask x act + (1 - mask) x value; exactly one of the two where the mask is 1 or 0.

    Args:
        act: What was computed.
        value: What replaces it; broadcasts to ``act``.
        mask: Of the accumulator's dtype; broadcasts to ``act``.
        whole: Whether the mask is 1 throughout, so that nothing has to be computed until the way back.
    """
    blended: Tensor = _Blend.apply(act, value, mask, whole)
    return blended


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Tensor, value: Tensor, mask: Tensor, whole: bool) -> Tensor:
        ctx.save_for_backward(act, value, mask)
        ctx.whole = whole
        if whole:
            return act.view_as(act)
        return torch.lerp(value.to(mask.dtype), act.to(mask.dtype), mask).to(act.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        act, value, mask = ctx.saved_tensors
        of_act, of_value, of_mask = ctx.needs_input_grad[:3]
        by_act = (grad if ctx.whole else (grad * mask).to(act.dtype)) if of_act else None
        by_value = (grad * (1 - mask)).sum_to_size(value.shape).to(value.dtype) if of_value else None
        by_mask = None
        if of_mask:
            apart = act.to(mask.dtype) - value.to(mask.dtype)
            by_mask = apart.mul_(grad).sum_to_size(mask.shape)
        return by_act, by_value, by_mask, None
