"""What is compared of tensors and of modules: sums up to rounding, directions, and what kind of function a module is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.resolve.probe import Call


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit; so it is where one module's output is handed to another."""
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return one.numel() == other.numel() and same(one.flatten(), other.flatten())


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference, relative to the spread, that rounding may make: of what is computed in another order."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the spread of what was expected; 0 where they are equal."""
    difference = (found.float() - expected.float().to(found.device)).abs().max().item()
    spread = expected.float().square().mean().sqrt().item()
    return 0.0 if difference == 0 else difference / max(spread, 1e-30)


def is_sum(total: Tensor, terms: Sequence[Tensor]) -> bool:
    """Whether a tensor is the sum of others, up to the rounding of every single entry."""
    size = sum(term.float().abs() for term in terms)
    difference = (total.float() - sum(term.float() for term in terms)).abs()
    unit = torch.finfo(total.dtype).eps
    return bool((difference <= 4 * unit * size + torch.finfo(torch.float32).tiny).all())


def scales(change: Tensor, terms: Sequence[Tensor]) -> list[float] | None:
    """By what the terms must be multiplied to sum to a tensor, if there are such numbers."""
    rows = torch.stack([term.double().flatten() for term in terms], 1).cpu()
    found = torch.linalg.lstsq(rows, change.double().flatten().cpu()).solution
    left = change.double().flatten().cpu() - rows @ found
    if left.abs().max() > 100 * torch.finfo(change.dtype).eps * (change.double().abs().max().cpu() + 1e-30):
        return None
    return [_round(number) for number in found.tolist()]


def _round(number: float) -> float:
    """The number with as few digits as it may have been written with."""
    for digits in range(1, 7):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= 2e-6 * abs(number):
            return short
    return number


def parallel(one: Float[Tensor, "*row width"], other: Float[Tensor, "*row width"]) -> Tensor:
    """For each row whether two vectors point in the same direction."""
    one, other = one.double(), other.double()
    inner = (one * other).sum(-1)
    return inner >= (1 - 1e-5) * one.norm(dim=-1) * other.norm(dim=-1)


def given(call: Call) -> Tensor | None:
    """What a module of a single input read; None where it read something else besides."""
    return call.inputs[0][1] if len(call.inputs) == 1 else None


def is_affine(call: Call) -> bool:
    """Whether a module multiplies its input by a matrix and adds a bias, tried on what it read."""
    read = given(call)
    if read is None or not read.is_floating_point() or len(call.args) + len(call.kwargs) != 1 or not call.outputs:
        return False
    with torch.no_grad():
        zero, once, twice, other = (call.module.forward(read * factor) for factor in (0.0, 1.0, 2.0, -1.0))
        if not isinstance(once, Tensor) or not isinstance(zero, Tensor):
            return False
        size = 10 * tolerance(read.dtype) * ((once - zero).abs().max() + zero.abs().max())
        linear = ((twice - zero) - 2 * (once - zero)).abs().max() <= size and ((other - zero) + (once - zero)).abs().max() <= size
        return bool(linear and not same(once, read))


def is_scale_free(call: Call) -> bool:
    """Whether a module takes off the size of what it reads: a norm of any make."""
    read = given(call)
    if read is None or not read.is_floating_point() or len(call.args) + len(call.kwargs) != 1:
        return False
    large = read * (2.0**10 if read.dtype == torch.float16 else 2.0**20) / read.float().abs().max().clamp(min=1e-6).to(read.dtype)
    with torch.no_grad():
        one, two = call.module.forward(large), call.module.forward(4 * large)
        return isinstance(one, Tensor) and bool((one - two).abs().max() <= 20 * tolerance(read.dtype) * one.abs().max()) and bool(one.any())


def mixes(call: Call) -> bool:
    """Whether what a module gives at the last position depends on what it reads at the first: it is run again with another first position."""
    def changed(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not any(value.shape == tensor.shape for _, tensor in call.inputs):
            return value
        other = value.clone()
        other[:, 0] = other[:, 0].flip(-1) + other[:, 0].roll(1, -1)
        return other

    place, before = call.outputs[0]
    with torch.no_grad():
        out = call.module.forward(*map(changed, call.args), **{key: changed(value) for key, value in call.kwargs.items()})
    now = out if place is None else out[place]
    return error(now[:, -1], before[:, -1]) > tolerance(before.dtype)
