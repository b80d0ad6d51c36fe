"""What removed components are replaced by in a pass: sources collected once a run, turned into values by the patcher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.graph import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.patchers.base import Needs, Patcher


@dataclass
class Collected:
    """Activations of the corrupt run, or their means, for every layer.

    Attributes:
        heads: A layer's head outputs.
        mlps: A layer's MLP output.
    """

    heads: dict[int, Float[Tensor, "entry pos head d_head"]] = field(default_factory=dict)
    mlps: dict[int, Float[Tensor, "entry pos d_model"]] = field(default_factory=dict)


def entries(needs: Needs, prompts: PromptSet) -> Int[Tensor, "prompt"]:
    """Which entry of the collected activations belongs to which prompt."""
    if needs.source == "run":
        return torch.arange(len(prompts))
    if needs.source == "mean" and needs.pool == "group":
        return prompts.groups
    return torch.zeros(len(prompts), dtype=torch.long)


class GroupMean:
    """A mean over rows, group by group, in float64 while it grows. Final."""

    def __init__(self, groups: Int[Tensor, "prompt"]) -> None:
        self._groups = groups
        self._counts = torch.bincount(groups)
        self._sum: Tensor | None = None

    def add(self, act: Tensor, rows: slice) -> None:
        """Adds the activations of some prompts."""
        if self._sum is None:
            self._sum = torch.zeros(len(self._counts), *act.shape[1:], dtype=torch.float64, device=act.device)
        self._sum.index_add_(0, self._groups[rows].to(act.device), act.double())

    def value(self, dtype: torch.dtype) -> Tensor:
        """The mean of each group."""
        assert self._sum is not None
        counts = self._counts.to(self._sum.device).clamp(min=1)
        return (self._sum / counts.view(-1, *[1] * (self._sum.ndim - 1))).to(dtype)


def collect(model: HookedModel, prompts: PromptSet, needs: Needs, slices: Iterator[slice]) -> Collected:
    """Runs the corrupt prompts once and keeps what the patcher needs."""
    groups = entries(needs, prompts)
    sums: dict[tuple[str, int], GroupMean] = {}
    parts: dict[tuple[str, int], list[Tensor]] = {}
    for rows in slices:

        def visit(layer: Layer, rows: slice = rows) -> None:
            for part, act in (("heads", layer.z), ("mlps", layer.mlp_out)):
                if needs.source == "mean":
                    sums.setdefault((part, layer.index), GroupMean(groups)).add(act, rows)
                else:
                    parts.setdefault((part, layer.index), []).append(act)

        model.run(prompts.corrupt[rows], visit, stop=model.n_layers - 1)
    collected = Collected()
    for (part, layer), total in sums.items():
        getattr(collected, part)[layer] = total.value(model.dtype)
    for (part, layer), pieces in parts.items():
        getattr(collected, part)[layer] = torch.cat(pieces)
    return collected


class Replacements:
    """The values that a patcher gives, ready to be laid over activations of rows = masks x prompts. Final.

    Values of patchers that do not read the activation are made once a layer and kept.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, patcher: Patcher, collected: Collected) -> None:
        self._model = model
        self._patcher = patcher
        self._collected = collected
        self._n_pos = prompts.n_pos
        self._entries = entries(patcher.needs, prompts)
        self._heads: dict[int, Tensor] = {}
        self._mlps: dict[int, Tensor] = {}
        self._outs: dict[int, Tensor] = {}

    def heads(self, layer: int, z: Float[Tensor, "mask prompt pos head d_head"] | None, rows: slice) -> Float[Tensor, "*mask prompt pos head d_head"]:
        """Values for all heads of a layer. ``z`` is what they compute now; it may be left out if the patcher does not read it."""
        if self._patcher.reads_activation:
            assert z is not None
            source = self._source(self._collected.heads, layer, rows)
            return self._patch_heads(layer, z, source)
        if layer not in self._heads:
            source = self._collected.heads.get(layer)
            blank = self._blank(layer, source, (self._model.n_heads, self._model.d_head))
            self._heads[layer] = self._patch_heads(layer, blank, source)
        return self._pick(self._heads[layer], rows)

    def mlp(self, layer: int, out: Float[Tensor, "mask prompt pos d_model"] | None, rows: slice) -> Float[Tensor, "*mask prompt pos d_model"]:
        """Values for the MLP of a layer, likewise."""
        site = Node.of_mlp(layer)
        if self._patcher.reads_activation:
            assert out is not None
            source = self._source(self._collected.mlps, layer, rows)
            return self._patcher.patch(out, None if source is None else source.expand_as(out), site)
        if layer not in self._mlps:
            source = self._collected.mlps.get(layer)
            self._mlps[layer] = self._patcher.patch(self._blank(layer, source, (self._model.d_model,)), source, site)
        return self._pick(self._mlps[layer], rows)

    def attention_out(self, layer: int, rows: slice) -> Float[Tensor, "prompt pos d_model"]:
        """What an attention adds to the residual stream when all its heads are replaced, for patchers that do not read the activation."""
        if layer not in self._outs:
            self.heads(layer, None, rows)
            self._outs[layer] = self._model.project(layer, self._heads[layer])
        return self._pick(self._outs[layer], rows)

    def _patch_heads(self, layer: int, z: Tensor, source: Tensor | None) -> Tensor:
        values = []
        for head in range(self._model.n_heads):
            act = z[..., head, :]
            values.append(self._patcher.patch(act, None if source is None else source[..., head, :].expand_as(act), Node.of_head(layer, head)))
        return torch.stack(values, -2)

    def _blank(self, layer: int, source: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """An activation that carries shape, dtype and device only."""
        if source is not None:
            return source.new_zeros(()).expand(source.shape)
        device = self._model.device_of(layer)
        return torch.zeros((), dtype=self._model.dtype, device=device).expand(1, self._n_pos, *shape)

    def _source(self, table: dict[int, Tensor], layer: int, rows: slice) -> Tensor | None:
        return self._pick(table[layer], rows) if layer in table else None

    def _pick(self, table: Tensor, rows: slice) -> Tensor:
        if len(table) == 1:
            return table
        return table[self._entries[rows].to(table.device)]
