"""Norms (LayerNorm, RMSNorm of any make), found by value, and their derivative for many gradients at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.hooked import HookedModel


def norms(model: HookedModel) -> list[nn.Module]:
    """Every norm of a model, found by value: a module with vectors for weights whose output does not change with the size of its input."""
    return [module for module in model.hf.modules() if _is_norm(module)]


def gain_of(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, bool]]:
    """A function that gives what a norm multiplies an input by, and whether it takes the mean off before."""
    if isinstance(module, nn.LayerNorm):

        def of_layer_norm(read: Tensor) -> tuple[Tensor, bool]:
            centred = read - read.mean(-1, keepdim=True)
            spread = (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
            return (spread if module.weight is None else spread * module.weight), True

        return of_layer_norm

    def of_rms_norm(read: Tensor) -> tuple[Tensor, bool]:
        # A vector of equal entries with the same root mean square is multiplied by the same.
        size = read.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        return module.forward(size.expand_as(read)) / size, False

    return of_rms_norm


def back_through(
    module: nn.Module, read: Float[Tensor, "token d_model"], grads: Float[Tensor, "reader token d_model"]
) -> Float[Tensor, "reader token d_model"]:
    """The gradients at a norm's input from several at its output, computed in place of these.

    A norm is y = s * (x - mean) with the scale s a function of x, so its derivative takes g to centred(s * g) - k (x - mean) times the
    inner product of x - mean and s * g. The number k of each token is read off autograd, for one gradient, rules included.
    """
    with torch.no_grad():
        scale, is_centred = gain_of(module)(read)
        moved = (read - read.mean(-1, keepdim=True) if is_centred else read).to(grads.dtype)
        scale = scale.to(grads.dtype)
    with torch.enable_grad():
        leaf = read.detach().requires_grad_().view_as(read)
        probe = (moved * scale).to(read.dtype)
        known = torch.autograd.grad(module(leaf), leaf, probe)[0].to(grads.dtype)
    one = probe.to(grads.dtype) * scale
    inner = (moved * one).sum(-1, keepdim=True)
    lost = one - one.mean(-1, keepdim=True) - known if is_centred else one - known
    factor = ((lost * moved).sum(-1, keepdim=True) / (inner * moved.square().sum(-1, keepdim=True))).nan_to_num(0.0, 0.0, 0.0)
    grads.mul_(scale)
    inner = torch.einsum("rtd,td->rt", grads, moved * factor)
    if is_centred:
        grads.sub_(grads.mean(-1, keepdim=True))
    return grads.addcmul_(inner[..., None], moved, value=-1)


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters())
    if list(module.children()) or not own or any(parameter.ndim != 1 or len(parameter) != len(own[0]) for parameter in own):
        return False
    if isinstance(module, nn.LayerNorm):
        return True
    generator = torch.Generator().manual_seed(0)
    large = 2.0**30 if own[0].dtype != torch.float16 else 2.0**8
    probe = large * torch.randn(1, 1, len(own[0]), generator=generator).to(own[0])
    with torch.no_grad():
        one, two = module.forward(probe), module.forward(2 * probe)
        scale, _ = gain_of(module)(probe)
        close = 1e-3 * one.abs().max()
        return bool((one - two).abs().max() <= close and (scale * probe - one).abs().max() <= 10 * close)
