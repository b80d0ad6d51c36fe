"""What the senders of edges write into the residual stream in the place of what they would: kept in each one's own small space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.engine.dense.blend import accumulator
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import readers, writers

Members = Sequence[int]
"""Which heads of a layer."""


class HeadMatrices:
    """The matrices of some heads, as views of the model's weights where all heads are among them. Final.

    Args:
        model: The model.
        heads: Of each layer.
    """

    def __init__(self, model: HookedModel, heads: Sequence[Members]) -> None:
        self._model = model
        self._heads = heads
        self._writers: dict[int, Tensor] = {}
        self._readers: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def written(
        self, layer: int, z: Float[Tensor, "token head d_head"], out: Float[Tensor, "head token d_model"] | None = None
    ) -> Float[Tensor, "head token d_model"]:
        """What heads' outputs add to the residual stream, each alone; into ``out`` if it is given."""
        if layer not in self._writers:
            self._writers[layer] = self._chosen(writers(self._model, layer), layer)
        return _by_head(z.transpose(0, 1), self._writers[layer], out)

    def read(self, layer: int, port: int, normed: Float[Tensor, "head token d_model"]) -> Float[Tensor, "head token d_head"]:
        """What heads make of normed residual streams of their own: queries (0), keys (1) or values (2)."""
        matrix, bias = self._reader(layer, port)
        bias = bias.repeat_interleave(len(normed) // len(bias), 0)
        return _by_head(normed, matrix) + bias[:, None].to(normed.dtype)

    def backward(self, layer: int, grads: Sequence[Float[Tensor, "head token d_head"]]) -> Float[Tensor, "3 head token d_model"]:
        """The gradients at these streams, from those at queries, keys and values."""
        n_heads, n_tokens, _ = grads[0].shape
        out = grads[0].new_empty(3, n_heads, n_tokens, self._model.d_model, dtype=accumulator(grads[0].dtype))
        for port, grad in enumerate(grads):
            _by_head(grad.to(out.dtype), self._reader(layer, port)[0].transpose(1, 2), out[port])
        return out

    def _reader(self, layer: int, port: int) -> tuple[Tensor, Tensor]:
        if layer not in self._readers:
            self._readers[layer] = [
                (self._chosen(matrix, layer), self._chosen(bias, layer)) for matrix, bias in readers(self._model, layer)
            ]
        return self._readers[layer][port]

    def _chosen(self, table: Tensor, layer: int) -> Tensor:
        heads, group = list(self._heads[layer]), self._model.n_heads // len(table)
        return table if len(heads) == self._model.n_heads else table[[head // group for head in heads]]


def _by_head(
    rows: Float[Tensor, "head token a"], matrices: Float[Tensor, "some a b"], out: Float[Tensor, "head token b"] | None = None
) -> Float[Tensor, "head token b"]:
    """Each head's rows times its matrix; heads in a row that share one go through it together."""
    n_heads, n_tokens, _ = rows.shape
    rows, matrices = rows.reshape(len(matrices), -1, rows.shape[-1]), matrices.to(rows)
    if out is None:
        return torch.bmm(rows, matrices).view(n_heads, n_tokens, -1)
    torch.bmm(rows, matrices, out=out.view(len(matrices), -1, out.shape[-1]))
    return out


class Differences:
    """Value minus activation of every sender of a pass, in causal order: the input, then of each layer its heads (as z) and its MLP. Final.

    What they write is made for few tokens at a time: a table of all tokens x senders x d_model never exists.

    Args:
        matrices: Of the heads that send.

    Attributes:
        parts: The differences.
    """

    def __init__(self, matrices: HeadMatrices) -> None:
        self.parts: list[Float[Tensor, "row pos ..."]] = []
        self._matrices = matrices
        self._layers: list[int | None] = []

    def add(self, apart: Float[Tensor, "row pos ..."], heads_of: int | None = None) -> None:
        """The next senders: the heads of a layer, or for None one that writes into the residual stream itself."""
        self.parts.append(apart)
        self._layers.append(heads_of)

    def of(self, parts: Sequence[Float[Tensor, "row pos ..."]]) -> Differences:
        """The same senders with other differences."""
        other = Differences(self._matrices)
        other.parts, other._layers = list(parts), self._layers
        return other

    def written(self, parts: Sequence[Float[Tensor, "token ..."]]) -> Float[Tensor, "sender token d_model"]:
        """What the first senders write at few tokens: of as many as differences are given there."""
        counts = [1 if layer is None else part.shape[1] for part, layer in zip(parts, self._layers, strict=False)]
        dtype = accumulator(parts[0].dtype)
        if torch.is_grad_enabled():
            rows = [self._writes(part.to(dtype), layer) for part, layer in zip(parts, self._layers, strict=False)]
            return torch.cat(rows)
        out = parts[0].new_empty(sum(counts), *parts[0].shape, dtype=dtype)
        for part, layer, to in zip(parts, self._layers, out.split(counts), strict=False):
            self._writes(part.to(dtype), layer, to)
        return out

    def _writes(self, part: Tensor, layer: int | None, out: Tensor | None = None) -> Tensor:
        if layer is not None:
            return self._matrices.written(layer, part, out)
        return part[None] if out is None else out.copy_(part[None])
