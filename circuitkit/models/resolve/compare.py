"""What is compared of tensors and of modules: sums up to rounding, directions, and what kind of function a module is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

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


def scales(change: Tensor, terms: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[tuple[int, ...], list[float]]]:
    """Which one or two terms sum to a tensor when each is multiplied by a number; the fewest first.

    Args:
        change: The tensor.
        terms: What may be in it.
        dtype: In which it was computed.

    Returns:
        The places of the terms and their numbers; the sum is to be checked entry by entry.
    """
    rows = torch.stack([term.double().flatten() for term in terms]).cpu()
    wanted = change.double().flatten().cpu()
    inner, onto, total = rows @ rows.T, rows @ wanted, wanted @ wanted
    found = []
    for count in (1, 2):
        for chosen in combinations(range(len(terms)), count):
            place = list(chosen)
            matrix = inner[place][:, place]
            if torch.linalg.det(matrix) <= 1e-9 * matrix.diag().prod():
                continue
            numbers = torch.linalg.solve(matrix, onto[place])
            left = total - numbers @ onto[place]
            if left <= 1e-3 * torch.finfo(dtype).eps * total and (numbers.abs() > 1e-3).all():
                found.append((chosen, numbers.tolist()))
    return found


def as_written(number: float) -> float:
    """The number with as few digits as it may have been written with."""
    for digits in range(1, 7):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= 2e-6 * abs(number):
            return short
    return float(f"{number:.7g}")


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
    row = read[:1]
    with torch.no_grad():
        out = call.module.forward(torch.cat([row * factor for factor in (0.0, 1.0, 2.0, -1.0)]))
    if not isinstance(out, Tensor) or len(out) != 4:
        return False
    zero, once, twice, other = out
    size = 10 * tolerance(read.dtype) * ((once - zero).abs().max() + zero.abs().max())
    linear = ((twice - zero) - 2 * (once - zero)).abs().max() <= size and ((other - zero) + (once - zero)).abs().max() <= size
    return bool(linear) and not same(once[None], row)


def is_norm(call: Call) -> bool:
    """Whether a module is a norm of any make: it has no matrices, keeps the shape, and takes off the size or has vectors for weights."""
    read = given(call)
    if read is None or not read.is_floating_point() or len(call.args) + len(call.kwargs) != 1 or len(call.outputs) != 1:
        return False
    out, weights = call.outputs[0][1], list(call.module.parameters())
    if out.shape != read.shape or same(out, read) or any(weight.ndim > 1 for weight in weights):
        return False
    return bool(weights) or _is_scale_free(call, read)


def _is_scale_free(call: Call, read: Tensor) -> bool:
    large = read * (2.0**10 if read.dtype == torch.float16 else 2.0**20) / read.float().abs().max().clamp(min=1e-6).to(read.dtype)
    with torch.no_grad():
        one, two = call.module.forward(large), call.module.forward(4 * large)
        return bool((one - two).abs().max() <= 20 * tolerance(read.dtype) * one.abs().max()) and bool(one.any())


def mixes(call: Call, shape: torch.Size) -> bool:
    """Whether what a module gives depends on what it reads at earlier positions: it runs again with another first position.

    Args:
        call: A run of the module.
        shape: Of the token ids: row x position.
    """
    if not call.outputs:
        return False
    shapes = [tensor.shape for _, tensor in call.inputs]

    def changed(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape not in shapes:
            return value
        other = value.clone()
        rows = other.view(*shape, -1) if other.shape[0] == shape.numel() else other
        rows[:, 0] = rows[:, 0].flip(-1) + rows[:, 0].roll(1, -1)
        return other

    place, before = call.outputs[0]
    with torch.no_grad():
        out = call.module.forward(*map(changed, call.args), **{key: changed(value) for key, value in call.kwargs.items()})
    now = out if place is None else out[place]
    return error(now.reshape(*shape, -1)[:, 1:], before.reshape(*shape, -1)[:, 1:]) > tolerance(before.dtype)
