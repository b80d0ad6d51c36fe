"""Norms (LayerNorm, RMSNorm of any make), found by value, and their derivative for many gradients at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class HeldNorm:
    """A norm with its scale held at what it is for some inputs: linear but for an offset, so that a sum goes through term by term. Final.

    Attributes:
        scale: By what each input is multiplied.
        offset: The norm's bias; zeros where it has none.
        is_centred: Whether the norm takes the mean off before.
    """

    scale: Float[Tensor, "*row some"]
    offset: Float[Tensor, " d_model"]
    is_centred: bool

    @classmethod
    def at(cls, module: nn.Module, read: Float[Tensor, "*row d_model"]) -> HeldNorm:
        """The norm as it is where it reads ``read``."""
        with torch.no_grad():
            scale, is_centred = gain_of(module)(read)
            return cls(scale, module.forward(read.new_zeros(1, read.shape[-1], dtype=next(module.parameters()).dtype))[0], is_centred)

    def through(self, terms: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What the norm makes of a term of its input, without the offset."""
        return self.scale * (terms - terms.mean(-1, keepdim=True) if self.is_centred else terms)

    def back(self, directions: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Along what a term of the input lies whose image lies along a direction: the inner products are equal."""
        directions = self.scale * directions
        return directions - directions.mean(-1, keepdim=True) if self.is_centred else directions


@dataclass(frozen=True)
class Slope:
    """The derivative of a norm at some inputs, rules included. Final.

    A norm is y = s * (x - mean) with the scale s a function of x, so its derivative takes v to s * (centred(v) - k (x - mean) times the
    inner product of x - mean and v), with a number k for each input.

    Attributes:
        scale: By what each input is multiplied.
        moved: The inputs, less their mean where the norm takes it off.
        factor: The number k; 0 where a rule holds the scale constant.
        is_centred: Whether the norm takes the mean off.
    """

    scale: Float[Tensor, "token some"]
    moved: Float[Tensor, "token d_model"]
    factor: Float[Tensor, "token one"]
    is_centred: bool

    @classmethod
    def of(cls, module: nn.Module, read: Float[Tensor, "token d_model"], dtype: torch.dtype) -> Slope:
        """That of a norm which reads ``read``; k is read off autograd, for one gradient of each input."""
        with torch.no_grad():
            scale, is_centred = gain_of(module)(read)
            moved = (read - read.mean(-1, keepdim=True) if is_centred else read).to(dtype)
            scale = scale.to(dtype)
        with torch.enable_grad():
            leaf = read.detach().requires_grad_().view_as(read)
            probe = (moved * scale).to(read.dtype)
            known = torch.autograd.grad(module(leaf), leaf, probe)[0].to(dtype)
        one = probe.to(dtype) * scale
        inner = (moved * one).sum(-1, keepdim=True)
        lost = one - one.mean(-1, keepdim=True) - known if is_centred else one - known
        factor = ((lost * moved).sum(-1, keepdim=True) / (inner * moved.square().sum(-1, keepdim=True))).nan_to_num(0.0, 0.0, 0.0)
        return cls(scale, moved, factor, is_centred)

    def back_(self, grads: Float[Tensor, "some token d_model"]) -> Float[Tensor, "some token d_model"]:
        """The gradients at the norm's input from several at its output, computed in place of these."""
        return self._less_the_change_of_scale(grads.mul_(self.scale))

    def forward_(self, changes: Float[Tensor, "some token d_model"]) -> Float[Tensor, "some token d_model"]:
        """By how much the norm's output changes with several changes of its input, to first order; computed in place of these."""
        return self._less_the_change_of_scale(changes).mul_(self.scale)

    def _less_the_change_of_scale(self, vectors: Tensor) -> Tensor:
        inner = torch.einsum("rtd,td->rt", vectors, self.moved * self.factor)
        if self.is_centred:
            vectors.sub_(vectors.mean(-1, keepdim=True))
        return vectors.addcmul_(inner[..., None], self.moved, value=-1)


def back_through(
    module: nn.Module, read: Float[Tensor, "token d_model"], grads: Float[Tensor, "reader token d_model"]
) -> Float[Tensor, "reader token d_model"]:
    """The gradients at a norm's input from several at its output, computed in place of these."""
    return Slope.of(module, read, grads.dtype).back_(grads)


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
