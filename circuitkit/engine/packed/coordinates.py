"""Neurons and features in a pass: the activation at a place is encoded, what is removed is replaced, and the rest stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.core.node import Node, Site
from circuitkit.engine.featurizing import Featurizers, Place, all_of
from circuitkit.engine.packed.layout import Removed
from circuitkit.models.hooked import Layer
from circuitkit.patchers.base import Patcher


@dataclass(frozen=True)
class Seen:
    """What passed a place in a run.

    Attributes:
        act: The activation at the site.
        read: What the module there read, for transcoders.
    """

    act: Float[Tensor, "row pos width"]
    read: Float[Tensor, "row pos width"] | None = None

    def of(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Activation and what was read, of some prompts."""
        return self.act[rows], None if self.read is None else self.read[rows]


@dataclass(frozen=True)
class Source:
    """Coordinates and errors of the corrupt prompts, an entry for each prompt or mean; one for all prompts where they share it."""

    coordinates: Float[Tensor, "entry pos feature"]
    error: Float[Tensor, "entry pos width"]

    def of(self, entries: Int[Tensor, " prompt"]) -> Source:
        """The entry of each prompt."""
        if len(self.coordinates) == 1:
            return self
        entries = entries.to(self.coordinates.device)
        return Source(self.coordinates[entries], self.error[entries])


def read_site(layer: Layer, site: Site) -> Tensor:
    """The activation at a site that has neurons or features. Those of what attention or MLP give lie behind the norm that may be there, as
    published dictionaries do (Gemma Scope; ``hook_attn_out`` and ``hook_mlp_out`` of TransformerLens)."""
    match site:
        case Site.ATTN_OUT:
            return layer.attention_added
        case Site.MLP_ACT:
            return layer.mlp_act
        case Site.MLP_OUT:
            return layer.mlp_added
    return layer.out


def read_by_mlp(layer: Layer, featurizers: Featurizers) -> Tensor | None:
    """What the MLP of a layer reads, where a transcoder lies on it: to be asked for before the MLP's other sites."""
    featurizer = featurizers.get((Site.MLP_OUT, layer.index))
    return layer.mlp_in if featurizer is not None and featurizer.reads_input else None


class CoordinateEdits:
    """Replaces neurons and features by what the patcher makes of their sources. Final.

    Args:
        featurizers: Of all places.
        patcher: Gives the values.
        means: For each place the means over the corrupt prompts, where the patcher needs them.
        runs: For each place what the corrupt run had there, likewise. Encoded anew for each pass: features take more memory than this.
        entries: Which mean belongs to which prompt.
        n_pos: Tokens per prompt.
    """

    def __init__(
        self,
        featurizers: Featurizers,
        patcher: Patcher,
        means: dict[Place, Source],
        runs: dict[Place, Seen],
        entries: Int[Tensor, " prompt"],
        n_pos: int,
    ) -> None:
        self._featurizers = featurizers
        self._patcher = patcher
        self._means = means
        self._runs = runs
        self._entries = entries
        self._n_pos = n_pos

    def read_by_mlp(self, layer: Layer) -> Tensor | None:
        """What the MLP of a layer reads, where a transcoder lies on it."""
        return read_by_mlp(layer, self._featurizers)

    def edited(self, place: Place, seen: Seen, removed: Removed, rows: slice) -> Float[Tensor, "row pos width"]:
        """The activation at a place with some of its coordinates replaced.

        Args:
            place: Site and layer.
            seen: What passes there, for rows = masks x prompts.
            removed: What is removed, at the positions that ``seen`` has, which may be some last ones.
            rows: The prompts.
        """
        featurizer, act = self._featurizers[place], seen.act
        device = act.device
        n_prompts = rows.stop - rows.start
        with torch.no_grad():
            coordinates, error = (part.unflatten(0, (-1, n_prompts)) for part in featurizer.encode(act, seen.read))
            source = self._source(place, rows)
            slots, kept = removed.slots.to(device), removed.keep_error.to(device)
            if len(slots):
                chosen = coordinates[..., slots]
                # One coordinate per row, so that a patcher sees of each just its own values.
                table = None if source is None else _as_rows(source.coordinates[..., slots])
                rows_of = _as_rows(chosen)
                values = self._patcher.value(*self._asked(rows_of, table), all_of(place))
                values = self._trimmed(values, rows_of).squeeze(-1).movedim(0, -1)
                coordinates = coordinates.index_copy(-1, slots, torch.where(removed.keep.to(device), chosen, values.to(chosen.dtype)))
            if not removed.keep_error.all():
                site, layer = place
                asked = self._asked(error, None if source is None else source.error)
                values = self._patcher.value(*asked, Node.of_feature(layer, None, site))
                error = torch.where(kept[..., None], error, self._trimmed(values, error).to(error.dtype))
            out = featurizer.decode(coordinates, error).to(act.dtype)
        # Where nothing is removed the activation is left as it is, to the last bit.
        return torch.where(removed.untouched.to(device)[..., None], act.unflatten(0, (-1, n_prompts)), out).flatten(0, 1)

    def _source(self, place: Place, rows: slice) -> Source | None:
        if place in self._means:
            return self._means[place].of(self._entries[rows])
        if place not in self._runs:
            return None
        return Source(*self._featurizers[place].encode(*self._runs[place].of(rows)))

    def _asked(
        self, act: Float[Tensor, "*unit mask prompt pos d"], source: Float[Tensor, "*unit entry all_pos d"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The activation and source that the patcher is given."""
        source = None if source is None else source.to(act.device, act.dtype)
        if self._patcher.reads_activation:
            return act, None if source is None else source.unsqueeze(-4).expand_as(act)
        shape = source.shape if source is not None else (*act.shape[:-4], 1, self._n_pos, act.shape[-1])
        return act.new_zeros(()).expand(shape), source

    def _trimmed(self, value: Tensor, act: Float[Tensor, "*unit mask prompt pos d"]) -> Float[Tensor, "*unit #mask #prompt pos d"]:
        """The patcher's values at the positions that the activation has.

        A pass may leave out first ones, or in its last layer all but one.
        """
        return value if self._patcher.reads_activation else value[..., -act.shape[-2] :, :].unsqueeze(-4)


def _as_rows(coordinates: Float[Tensor, "*row some"]) -> Float[Tensor, "some *row 1"]:
    return coordinates.movedim(-1, 0).unsqueeze(-1)
