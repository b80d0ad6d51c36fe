"""What removed components are replaced by in a pass: sources collected once a run, turned into values by the patcher."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.node import Kind, Node, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.featurizing import Featurizers, Place
from circuitkit.engine.packed.coordinates import CoordinateEdits, Seen, Source, read_by_mlp, read_site
from circuitkit.engine.packed.memory import RowBudget, in_slices
from circuitkit.engine.packed.work import Work
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.patchers.base import Needs, Patcher


@dataclass
class Collected:
    """Activations of the corrupt run, or their means, for every layer.

    Attributes:
        heads: A layer's head outputs.
        mixers: The output of a layer's mixer.
        mlps: A layer's MLP output.
        means: Means of the coordinates at each place of neurons or features.
        runs: The activation at each such place.
    """

    heads: dict[int, Float[Tensor, "entry pos head d_head"]] = field(default_factory=dict)
    mixers: dict[int, Float[Tensor, "entry pos d_model"]] = field(default_factory=dict)
    mlps: dict[int, Float[Tensor, "entry pos d_model"]] = field(default_factory=dict)
    means: dict[Place, Source] = field(default_factory=dict)
    runs: dict[Place, Seen] = field(default_factory=dict)


_COMPONENTS = ("heads", "mixers", "mlps")


def entries(needs: Needs, prompts: PromptSet) -> Int[Tensor, " prompt"]:
    """Which entry of the collected activations belongs to which prompt."""
    if needs.source == "run":
        return torch.arange(len(prompts))
    if needs.source == "mean" and needs.pool == "group":
        return prompts.groups
    return torch.zeros(len(prompts), dtype=torch.long)


def unchanged_prefix(prompts: PromptSet, patcher: Patcher) -> int:
    """How many first positions no replacement changes, because clean and corrupt tokens are the same up to there.

    Holds for patchers that give back their source. A mean equals the activation where all prompts that it is taken over share a prefix
    with the clean ones, an interchange where a prompt and its twin do.
    """
    if not patcher.gives_source or patcher.needs.source == "none":
        return 0
    same = prompts.clean == prompts.corrupt
    if patcher.needs.source == "mean":
        groups = entries(patcher.needs, prompts)
        first = torch.stack([prompts.clean[groups == group][0] for group in groups.tolist()])
        same = same & (prompts.clean == first)
    differs = ~same.all(0)
    return int(differs.int().argmax()) if differs.any() else prompts.n_pos - 1


class GroupMean:
    """A mean over rows, group by group, in float64 while it grows. Final."""

    def __init__(self, groups: Int[Tensor, " prompt"]) -> None:
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


class Collector:
    """Keeps of the corrupt run what a patcher needs, slice by slice. Final.

    Args:
        model: The model.
        prompts: The prompts.
        needs: What to keep.
        featurizers: Of the places at which to keep neurons or features too.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, needs: Needs, featurizers: Featurizers | None = None) -> None:
        self._model = model
        self._prompts = prompts
        self._needs = needs
        self._groups = entries(needs, prompts)
        self._featurizers = featurizers or {}
        self._sums: dict[tuple[str, Place], GroupMean] = {}
        self._parts: dict[tuple[str, Place], list[Tensor]] = {}

    def add(self, rows: slice) -> None:
        """Runs some corrupt prompts. Nothing is kept of a run that fails."""
        seen: dict[tuple[str, Place], Tensor] = {}

        def see(layer: Layer, site: Site, read: Tensor | None = None) -> None:
            place = site, layer.index
            if place in self._featurizers:
                seen.update(self._told(place, Seen(read_site(layer, site), read)))

        def visit(layer: Layer) -> None:
            if layer.block.heads is not None:
                seen["heads", (Site.Z, layer.index)] = layer.z
            elif layer.block.attention is not None:
                seen["mixers", (Site.ATTN_OUT, layer.index)] = layer.attention_out
            see(layer, Site.ATTN_OUT)
            if layer.block.mlp is not None:
                read = read_by_mlp(layer, self._featurizers)
                see(layer, Site.MLP_ACT)
                seen["mlps", (Site.MLP_OUT, layer.index)] = layer.mlp_out
                see(layer, Site.MLP_OUT, read)
            see(layer, Site.RESID_POST)

        self._model.run(self._prompts.corrupt[rows], visit, stop=self._model.n_layers - 1, **self._prompts.padding(rows))
        for key, act in seen.items():
            if self._needs.source == "mean":
                self._sums.setdefault(key, GroupMean(self._groups)).add(act, rows)
            else:
                self._parts.setdefault(key, []).append(act)

    def _told(self, place: Place, seen: Seen) -> dict[tuple[str, Place], Tensor]:
        """What is kept of a place: coordinates and error for means, else the activation, which takes less memory."""
        if self._needs.source == "mean":
            coordinates, error = self._featurizers[place].encode(seen.act, seen.read)
            return {("coordinates", place): coordinates, ("error", place): error}
        return {("act", place): seen.act, **({} if seen.read is None else {("read", place): seen.read})}

    def collected(self) -> Collected:
        """What was kept."""
        found = {key: torch.cat(pieces) for key, pieces in self._parts.items()}
        for (part, place), total in self._sums.items():
            found[part, place] = total.value(self._model.dtype if part in _COMPONENTS else torch.float32)
        places = {place for _, place in found if place in self._featurizers}
        return Collected(
            **{name: {layer: act for (part, (_, layer)), act in found.items() if part == name} for name in _COMPONENTS},
            means={at: Source(found["coordinates", at], found["error", at]) for at in places if ("error", at) in found},
            runs={at: Seen(found["act", at], found.get(("read", at))) for at in places if ("act", at) in found},
        )


def collected(
    model: HookedModel, prompts: PromptSet, needs: Needs, budget: RowBudget, work: Work, featurizers: Featurizers | None = None
) -> Collected:
    """What a patcher needs of the corrupt run: the one run over the corrupt prompts, where it needs any."""
    if needs.source == "none":
        return Collected()
    collector = Collector(model, prompts, needs, featurizers)
    for rows, _ in in_slices(len(prompts), collector.add, budget):
        work.add(rows.stop - rows.start, model.n_layers, prompts.n_pos, corrupt=True)
    return collector.collected()


class Replacements:
    """The values that a patcher gives, ready to be laid over activations of rows = masks x prompts. Final.

    Values of patchers that do not read the activation are made once a layer and kept.

    Attributes:
        coordinates: The same for neurons and features.
    """

    def __init__(
        self, model: HookedModel, prompts: PromptSet, patcher: Patcher, collected: Collected, featurizers: Featurizers | None = None
    ) -> None:
        self._model = model
        self._patcher = patcher
        self._collected = collected
        self._n_pos = prompts.n_pos
        self._entries = entries(patcher.needs, prompts)
        self._positions: Int[Tensor, " pos"] | None = None
        self._heads: dict[int, Tensor] = {}
        self._mixers: dict[int, Tensor] = {}
        self._mlps: dict[int, Tensor] = {}
        self._outs: dict[int, Tensor] = {}
        means, runs = collected.means, collected.runs
        self.coordinates = CoordinateEdits(featurizers or {}, patcher, means, runs, self._entries, prompts.n_pos)

    def make(self, universe: NodeUniverse) -> None:
        """Makes the values of all heads, mixers and MLPs of a universe at once, for patchers that do not read the activation.

        A pass makes those that it lacks. Here they are made before all passes, where whoever runs them is still near on the stack.
        """
        if self._patcher.reads_activation:
            return
        for layer, block in enumerate(self._model.map.blocks):
            if block.attention is not None and universe.kinds & {Kind.HEAD, Kind.ATTENTION}:
                (self.mixer if block.is_mixer else self.heads)(layer, None, slice(0, 1))
            if block.mlp is not None and Kind.MLP in universe.kinds and layer not in self._mlps:
                self._mlps[layer] = self.mlp_from(layer, self._collected.mlps.get(layer))

    def heads(
        self, layer: int, z: Float[Tensor, "mask prompt pos head d_head"] | None, rows: slice
    ) -> Float[Tensor, "*any_mask #prompt all_pos head d_head"]:
        """Values for all heads of a layer. ``z`` is what they compute now; it may be left out if the patcher does not read it."""
        if layer in self._heads:
            return self._pick(self._heads[layer], rows)
        source, reads = self._collected.heads.get(layer), self._patcher.reads_activation
        if reads:
            assert z is not None
            acts, source = z, None if source is None else self._pick(source, rows).expand_as(z)
        else:
            heads = self._model.map.blocks[layer].heads
            assert heads is not None
            acts = self._blank(layer, source, (heads.n_heads, heads.d_value))
        made = []
        for head in range(self._model.n_heads):  # here and not in a function of its own: someone debugs a patcher from this stack
            of_head = None if source is None else source[..., head, :]
            made.append(self._patcher.value(acts[..., head, :], of_head, Node.of_head(layer, head)))
        values = torch.stack(made, -2)
        if reads:
            return values
        self._heads[layer] = values
        return self._pick(values, rows)

    def mlp(
        self, layer: int, out: Float[Tensor, "mask prompt pos d_model"] | None, rows: slice
    ) -> Float[Tensor, "*any_mask #prompt all_pos d_model"]:
        """Values for the MLP of a layer, likewise."""
        site = Node.of_mlp(layer)
        if self._patcher.reads_activation:
            assert out is not None
            source = self._collected.mlps.get(layer)
            return self._patcher.value(out, None if source is None else self._pick(source, rows).expand_as(out), site)
        if layer not in self._mlps:
            self._mlps[layer] = self.mlp_from(layer, self._collected.mlps.get(layer))
        return self._pick(self._mlps[layer], rows, axis=self._mlps[layer].ndim - 3)

    def mixer(
        self, layer: int, out: Float[Tensor, "mask prompt pos d_model"] | None, rows: slice
    ) -> Float[Tensor, "*any_mask #prompt all_pos d_model"]:
        """Values for the mixer of a layer, likewise."""
        site = Node.of_attention(layer)
        if self._patcher.reads_activation:
            assert out is not None
            source = self._collected.mixers.get(layer)
            return self._patcher.value(out, None if source is None else self._pick(source, rows).expand_as(out), site)
        if layer not in self._mixers:
            source = self._collected.mixers.get(layer)
            self._mixers[layer] = self._patcher.value(self._blank(layer, source, (self._model.d_model,)), source, site)
        return self._pick(self._mixers[layer], rows)

    def attention_out(self, layer: int, rows: slice) -> Float[Tensor, "prompt pos d_model"]:
        """What an attention gives when all its heads are replaced, or a mixer that is, for patchers that do not read the activation."""
        if self._model.map.blocks[layer].is_mixer:
            return self.mixer(layer, None, rows)
        if layer not in self._outs:
            self.heads(layer, None, rows)
            self._outs[layer] = self._model.project(layer, self._heads[layer])
        return self._pick(self._outs[layer], rows)

    def heads_table(self, layer: int) -> Float[Tensor, "entry pos head d_head"]:
        """The values for the heads of a layer, before they are dealt out to prompts."""
        self.heads(layer, None, slice(0, 1))
        return self._heads[layer]

    def dealt(self, table: Float[Tensor, " entry *rest"], rows: slice) -> Float[Tensor, " prompt *rest"]:
        """The entry of a table that belongs to each prompt; a single entry stays one."""
        return self._pick(table, rows)

    def mlp_table(self, layer: int) -> Float[Tensor, "entry pos d_model"]:
        """The values for the MLP of a layer, before they are dealt out to prompts."""
        self.mlp(layer, None, slice(0, 1))
        return self._mlps[layer]

    def mlp_from(self, layer: int, source: Float[Tensor, "entry pos d_model"] | None) -> Float[Tensor, "entry pos d_model"]:
        """The values for the MLP of a layer that the patcher makes of a source, for patchers that do not read the activation."""
        return self._patcher.value(self._blank(layer, source, (self._model.d_model,)), source, Node.of_mlp(layer))

    def with_mlps(self, tables: dict[int, Float[Tensor, "mask entry pos d_model"]]) -> Replacements:
        """The same replacements, but with other MLP values for each mask in some layers."""
        other = copy(self)
        other._mlps = {**self._mlps, **tables}
        return other

    def at(self, prompts: Int[Tensor, " row"], positions: Int[Tensor, " pos"]) -> Replacements:
        """The same values for a pass with a row for each of these prompts, which computes these of their positions, in any order."""
        other = copy(self)
        other._entries, other._positions = self._entries[prompts], positions
        return other

    def _blank(self, layer: int, source: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """An activation that carries shape, dtype and device only."""
        if source is not None:
            return source.new_zeros(()).expand(source.shape)
        device = self._model.device_of(layer)
        return torch.zeros((), dtype=self._model.dtype, device=device).expand(1, self._n_pos, *shape)

    def _pick(self, table: Tensor, rows: slice, axis: int = 0) -> Tensor:
        if self._positions is not None:
            table = table.index_select(axis + 1, self._positions.to(table.device))
        if table.shape[axis] == 1:
            return table
        return table.index_select(axis, self._entries[rows].to(table.device))
