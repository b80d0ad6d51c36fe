"""What the senders of edges write into the residual stream in the place of what they would: kept in each one's own small space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.engine.dense.blend import accumulator
from circuitkit.models import blocks
from circuitkit.models.columns import heads_in
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import readers, writers
from circuitkit.models.norms import Slope

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

    def members(self, layer: int, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token some d_head"]:
        """Of the outputs of all heads of a layer those of these heads."""
        return z if len(self._heads[layer]) == self._model.n_heads else z[:, list(self._heads[layer])]

    def rest(self, layer: int, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """What all other heads of a layer give together, with the bias."""
        return self.together(layer, z.index_fill(1, torch.tensor(self._heads[layer], device=z.device), 0)).to(z.dtype)

    def together(self, layer: int, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """What all heads of a layer give together, with the bias, in the model's dtype."""
        out: Tensor = self._model.module(layer, "out_proj").forward(z.flatten(-2).to(self._model.dtype))
        return out

    def read(self, layer: int, port: int, normed: Float[Tensor, "head token d_model"]) -> Float[Tensor, "head token d_head"]:
        """What heads make of normed residual streams of their own: queries (0), keys (1) or values (2)."""
        joint = self._joint(layer, port)
        if joint is not None:
            made = joint(normed)
            return torch.stack([own[:, slot] for own, slot in zip(made, self._slots(layer, made.shape[2]), strict=True)])
        matrix, bias = self._reader(layer, port)
        bias = bias.repeat_interleave(len(normed) // len(bias), 0)
        return _by_head(normed, matrix) + bias[:, None].to(normed.dtype)

    def backward(
        self, layer: int, grads: Sequence[Float[Tensor, "head token d_head"]], resid: Float[Tensor, "token d_model"]
    ) -> Float[Tensor, "3 head token d_model"]:
        """The gradients at these streams, from those at queries, keys and values, where all heads read the same ``resid``, normed."""
        n_heads, n_tokens, _ = grads[0].shape
        out = grads[0].new_empty(3, n_heads, n_tokens, self._model.d_model, dtype=accumulator(grads[0].dtype))
        for port, grad in enumerate(grads):
            joint = self._joint(layer, port)
            if joint is None:
                _by_head(grad.to(out.dtype), self._reader(layer, port)[0].transpose(1, 2), out[port])
                continue
            with torch.no_grad():
                read = blocks.read(self._model, layer, "attention", resid)
            with torch.enable_grad():
                leaf = read.detach().requires_grad_()
                made = joint(leaf)
            for place, slot in enumerate(self._slots(layer, made.shape[1])):
                out[port, place] = torch.autograd.grad(made[:, slot], leaf, grad[place].to(made.dtype), retain_graph=True)[0]
        return out

    def _joint(self, layer: int, port: int) -> Callable[[Tensor], Tensor] | None:
        """What makes the queries or keys of all heads where a norm of them together is behind the projection; None where none is."""
        norm, found = blocks.joint_norms(self._model, layer)[port], self._model.map.ports(layer)[port]
        if norm is None:
            return None
        projection = self._model.hf.get_submodule(found.module)
        return lambda read: heads_in(norm(projection(read)), found)

    def _slots(self, layer: int, n_slots: int) -> list[int]:
        """Which of so many slices of queries or keys each head has."""
        return [head * n_slots // self._model.n_heads for head in self._heads[layer]]

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
        norms: The norm between each part and the residual stream, or None. A part is an attention, an MLP or the input.

    Attributes:
        parts: The differences.
        acts: What flows in parts with a norm behind them, by their place: outputs of all heads of a layer, or of an MLP.
    """

    def __init__(self, matrices: HeadMatrices, norms: Sequence[nn.Module | None]) -> None:
        self.parts: list[Float[Tensor, "row pos ..."]] = []
        self.acts: dict[int, Float[Tensor, "row pos ..."]] = {}
        self._norms = norms
        self._matrices = matrices
        self._layers: list[int | None] = []

    def add(self, apart: Float[Tensor, "row pos ..."], act: Float[Tensor, "row pos ..."], heads_of: int | None = None) -> None:
        """The next senders.

        Args:
            apart: Their differences.
            act: What flows there, of all heads of the layer where they are heads. Held only if a norm lies behind.
            heads_of: The layer whose heads they are; None for one sender that writes into the residual stream itself.
        """
        if self._norms[len(self.parts)] is not None:
            self.acts[len(self.parts)] = act
        self.parts.append(apart)
        self._layers.append(heads_of)

    def map(self, change: Callable[[Tensor], Tensor]) -> Differences:
        """The same senders with every tensor changed."""
        other = Differences(self._matrices, self._norms)
        other.parts, other._layers = [change(part) for part in self.parts], self._layers
        other.acts = {part: change(act) for part, act in self.acts.items()}
        return other

    def tensors(self, n_parts: int) -> list[Float[Tensor, "row pos ..."]]:
        """All that streams of receivers behind so many parts are made of: for ``mixed``, at few tokens."""
        return [*self.parts[:n_parts], *(self.acts[part] for part in self._normed(n_parts))]

    def width(self, n_parts: int, receivers: int, senders: int) -> int:
        """How many vectors ``mixed`` holds for a token."""
        return senders * (3 if self._normed(n_parts) else 1) + 4 * receivers * len(self._normed(n_parts))

    def mixed(
        self,
        n_parts: int,
        removed: Float[Tensor, "receiver sender"],
        resid: Float[Tensor, "token d_model"],
        tensors: Sequence[Float[Tensor, "token ..."]],
    ) -> Float[Tensor, "receiver token d_model"]:
        """The streams that receivers read when their senders are replaced to these extents."""
        if not self._normed(n_parts):
            written = self.written(tensors[:n_parts])
            mixed: Tensor = resid + (removed.to(written) @ written.flatten(1)).unflatten(1, resid.shape)
            return mixed
        dtype = accumulator(resid.dtype)
        removed = torch.cat([removed.to(dtype), removed.new_zeros(1, removed.shape[1], dtype=dtype)])  # nothing, last
        acts = dict(zip(self._normed(n_parts), tensors[n_parts:], strict=True))
        streams = resid.to(dtype).expand(len(removed) - 1, *resid.shape)
        for part, weights in enumerate(removed.split(self._counts(tensors[:n_parts]), 1)):
            norm = self._norms[part]
            if norm is None:
                written = self._writes(tensors[part].to(dtype), self._layers[part])
                streams = streams + (weights[:-1] @ written.flatten(1)).unflatten(1, resid.shape)
                continue
            own, value, rest = self._summands(part, acts[part].to(dtype), tensors[part].to(dtype))
            sums = ((1 - weights) @ own.flatten(1) + weights @ value.flatten(1)).unflatten(1, resid.shape) + rest
            normed = norm(sums.to(resid.dtype)).to(dtype)
            streams = streams + normed[:-1] - normed[-1:]
        return streams

    def _summands(
        self, part: int, act: Float[Tensor, "token ..."], apart: Float[Tensor, "token ..."]
    ) -> tuple[Float[Tensor, "sender token d_model"], Float[Tensor, "sender token d_model"], Float[Tensor, "token d_model"]]:
        """What the norm behind a part is given: what its senders give, what they give when they are removed, and the rest of the sum.

        Not by differences: where all of a sum is replaced by zeros, these would leave rounding, and the norm would make it large.
        """
        layer = self._layers[part]
        if layer is None:
            return act[None], (act + apart)[None], torch.zeros_like(act)
        own = self._matrices.members(layer, act)
        return self._writes(own, layer), self._writes(own + apart, layer), self._matrices.rest(layer, act)

    def written(self, parts: Sequence[Float[Tensor, "token ..."]]) -> Float[Tensor, "sender token d_model"]:
        """What the first senders give at few tokens: of as many as differences are given there."""
        counts = self._counts(parts)
        dtype = accumulator(parts[0].dtype)
        if torch.is_grad_enabled():
            rows = [self._writes(part.to(dtype), layer) for part, layer in zip(parts, self._layers, strict=False)]
            return torch.cat(rows)
        out = parts[0].new_empty(sum(counts), *parts[0].shape, dtype=dtype)
        for part, layer, to in zip(parts, self._layers, out.split(counts), strict=False):
            self._writes(part.to(dtype), layer, to)
        return out

    def added(self) -> Float[Tensor, "sender token d_model"]:
        """What all senders add to the residual stream to first order, through norms behind them; of tensors at few tokens."""
        written = self.written(self.parts)
        pieces = written.split(self._counts(self.parts))
        for part in self._normed(len(self.parts)):
            norm = self._norms[part]
            assert norm is not None
            layer, act = self._layers[part], self.acts[part]
            out = act if layer is None else self._matrices.together(layer, act)
            Slope.of(norm, out, written.dtype).forward_(pieces[part])
        return written

    def _normed(self, n_parts: int) -> list[int]:
        return [part for part, norm in enumerate(self._norms[:n_parts]) if norm is not None]

    def _counts(self, parts: Sequence[Tensor]) -> list[int]:
        return [1 if layer is None else part.shape[1] for part, layer in zip(parts, self._layers, strict=False)]

    def _writes(self, part: Tensor, layer: int | None, out: Tensor | None = None) -> Tensor:
        if layer is not None:
            return self._matrices.written(layer, part, out)
        return part[None] if out is None else out.copy_(part[None])
