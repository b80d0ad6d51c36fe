"""Work on few tokens at a time, forgotten and done again on the way back: what it holds meanwhile is bounded, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BYTES = 32 * 2**20
"""Of the largest tensor that is held for a few tokens."""


def token_slices(n_tokens: int, bytes_a_token: int, held: int = 0) -> Iterator[slice]:
    """Tokens in slices of equal size that stay within ``BYTES``, or within half of what is held for all tokens anyway."""
    fitting = max(1, max(BYTES, held // 2) // bytes_a_token)
    size = -(-n_tokens // -(-n_tokens // fitting))
    for first in range(0, n_tokens, size):
        yield slice(first, min(first + size, n_tokens))


Make = Callable[..., Float[Tensor, "token ..."]]
"""Of a row's weights and of tensors at some of its tokens makes a tensor at these tokens."""


def by_chunks(
    make: Make, weights: Float[Tensor, "#row ..."], tensors: Sequence[Float[Tensor, "row pos ..."]], shape: Sequence[int], width: int
) -> Float[Tensor, "row pos ..."]:
    """Applies a function of each token to rows x positions, differentiable by everything it is given.

    Args:
        make: The function. Everything that it depends on and that has a gradient must be among its arguments.
        weights: Given to it whole, of its row or of all rows.
        tensors: Given to it for some tokens of the row.
        shape: Of its value for one token.
        width: How many vectors as wide as the first tensor it holds for one token.
    """
    made: Tensor = _ByChunks.apply(make, tuple(shape), width, weights, *tensors)
    return made


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, shape: tuple[int, ...], width: int, weights: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *tensors)
        ctx.make, ctx.width = make, width
        out = tensors[0].new_empty(*tensors[0].shape[:2], *shape)
        rows = [each.flatten(0, 1) for each in (out, *tensors)]
        for row, chunk in _places(tensors[0], len(weights), width):
            rows[0][chunk] = make(weights[row], *(tensor[chunk] for tensor in rows[1:]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        found = [torch.zeros_like(given) if want else None for given, want in zip((weights, *tensors), wanted, strict=True)]
        flat = [each if each is None or place == 0 else each.flatten(0, 1) for place, each in enumerate(found)]
        rows, grad = [tensor.flatten(0, 1) for tensor in tensors], grad.flatten(0, 1)
        for row, chunk in _places(tensors[0], len(weights), ctx.width):
            with torch.enable_grad():
                parts = [weights[row], *(tensor[chunk] for tensor in rows)]
                parts = [part.detach().requires_grad_(want) for part, want in zip(parts, wanted, strict=True)]
                made = ctx.make(*parts)
            leaves = [part for part, want in zip(parts, wanted, strict=True) if want]
            grads = iter(torch.autograd.grad(made, leaves, grad[chunk].to(made.dtype)))
            for place, total in enumerate(flat):
                if total is not None:
                    total[row if place == 0 else chunk].add_(next(grads))
        return None, None, None, *found


def _places(tensor: Tensor, n_weights: int, width: int) -> Iterator[tuple[int, slice]]:
    """Which weights belong to which of the rows x positions."""
    bytes_a_token = width * tensor.shape[-1] * torch.promote_types(tensor.dtype, torch.float32).itemsize
    n_tokens = tensor.shape[0] * tensor.shape[1] // n_weights
    for row in range(n_weights):
        for chunk in token_slices(n_tokens, bytes_a_token):
            yield row, slice(row * n_tokens + chunk.start, row * n_tokens + chunk.stop)
