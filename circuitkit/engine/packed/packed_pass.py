"""One packed forward pass: rows are masks x prompts, and every layer is told what to replace, skip and narrow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.node import Site
from circuitkit.engine.featurizing import Place
from circuitkit.engine.packed.coordinates import Seen
from circuitkit.engine.packed.layout import Edits
from circuitkit.engine.packed.replacements import Replacements
from circuitkit.engine.packed.sliced import SlicedAttention, live_heads, taken
from circuitkit.engine.packed.trunk import Watch
from circuitkit.models.blocks import norm_behind
from circuitkit.models.hooked import HookedModel, Layer

SeeMlp = Callable[[int, Tensor], None]
"""Told of a layer and of its MLP's output for the rows of a pass."""


class PackedPass:
    """What happens at each layer of a packed pass. Final; called by ``HookedModel.run`` layer by layer.

    Args:
        model: The model.
        edits: Which outputs are kept.
        replacements: What the others are replaced by.
        rows: The prompts.
        skip: Whether modules that every row replaces may be left uncomputed (the patcher does not read the activation).
        entry: First layer of the pass.
        entry_z: Outputs of its heads where they are known, so that its attention need not be computed.
        entry_out: Gives what they add to the residual stream together, bias included.
        sliced: Computes only the heads that some row keeps; None to compute all heads of a layer in which one is kept.
        narrow: Whether the last layer may be computed for the last position only, which is all that the logits there depend on.
        watch: Keeps states on the way.
        see_mlp: Told of the output of every MLP that is computed, before any replacement.
        cut: First position that is computed; those before are as in the run whose keys and values are held. ``edits`` and ``entry_z``
            begin there too.
    """

    def __init__(
        self,
        model: HookedModel,
        edits: Edits,
        replacements: Replacements,
        rows: slice,
        *,
        skip: bool,
        entry: int = 0,
        entry_z: Float[Tensor, "prompt pos head d_head"] | None = None,
        entry_out: Callable[[], Float[Tensor, "prompt pos d_model"]] | None = None,
        sliced: SlicedAttention | None = None,
        narrow: bool = True,
        watch: Watch | None = None,
        see_mlp: SeeMlp | None = None,
        cut: int = 0,
    ) -> None:
        self._model = model
        self._edits = edits
        self._replacements = replacements
        self._rows = rows
        self._skip = skip
        self._sliced = sliced if skip else None
        self._entry = entry
        self._narrow_layer = model.n_layers - 1 if narrow and skip else -1
        self._watch = watch
        self._see_mlp = see_mlp
        self._cut = cut
        self._n_prompts = rows.stop - rows.start
        # Made before the pass: a module that is called by hand inside of one would be taken for the model's own call.
        self._dead_out = {
            index: self._narrowed(index, replacements.attention_out(index, rows)[:, cut:])
            for index in range(entry, model.n_layers)
            if skip and model.map.blocks[index].attention is not None and not edits.heads(index).any()
        }
        self._entry_out = None if entry_z is None or entry in self._dead_out else self._attention_from(entry_z, entry_out)

    def __call__(self, layer: Layer) -> None:
        if self._watch is not None:
            self._watch.see(layer)
        if layer.block.attention is not None:
            index = layer.index
            known = self._rows_of(self._dead_out[index]) if index in self._dead_out else self._entry_out if index == self._entry else None
            if known is None:
                self._mixer(layer) if layer.block.heads is None else self._heads(layer)
            self._attention(layer, known)
        if layer.block.mlp is not None:
            self._mlp(layer)
        self._stream(layer)

    def _attention(self, layer: Layer, known: Float[Tensor, "row some d_model"] | None) -> None:
        """What an attention adds as a whole; it is not computed where that is known."""
        if known is not None and norm_behind(self._model, layer.index, "attention") is not None:
            layer.skip_attention(known)
            known = None  # what is added is what the norm makes of it
        out = self._with_features((Site.ATTN_OUT, layer.index), lambda: Seen(layer.attention_added if known is None else known))
        if known is not None:
            layer.skip_attention(known if out is None else out)
        elif out is not None:
            layer.attention_added = out

    def _mixer(self, layer: Layer) -> None:
        """A mixer is one unit, kept or replaced as a whole. It reads all positions, so that nothing of it can be left out."""
        keep = self._edits.heads(layer.index)[..., 0]
        if not keep.all():
            out = layer.attention_out.unflatten(0, (self._edits.n_masks, self._n_prompts))
            value = self._replacements.mixer(layer.index, out, self._rows)[..., self._cut :, :].to(out.device)
            layer.attention_out = torch.where(keep.unsqueeze(-1).to(out.device), out, value).flatten(0, 1)

    def _heads(self, layer: Layer) -> None:
        index = layer.index
        keep = self._edits.heads(index)
        watched = self._watch is not None and index in self._watch.layers
        if keep.all() and not watched and index != self._narrow_layer:
            return
        live = live_heads(keep) if self._sliced is not None else torch.ones(keep.shape[-1], dtype=torch.bool)
        last = index == self._narrow_layer and not watched
        if self._sliced is not None and (last or not live.all()):
            self._sliced.project(layer, live, last=last)
        z = layer.z
        if self._watch is not None:
            self._watch.see_z(index, z, live)
        if self._sliced is not None and not live.all():
            layer.skip_out_proj(self._sliced_out(index, keep, live, z))
            return
        layer.z = self._narrowed(index, z if keep.all() else self._edited(index, keep, z))

    def _sliced_out(
        self, index: int, keep: Tensor, live: Bool[Tensor, " head"], z: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "row some d_model"]:
        """What an attention adds whose heads are only those that are live, and a constant."""
        assert self._sliced is not None
        z, keep = taken(z, live), keep[..., live]
        z = self._narrowed(index, z if keep.all() else self._edited(index, keep, z, live))
        constant = self._replacements.dealt(self._sliced.constant(index, live, self._replacements), self._rows)
        constant = self._narrowed(index, constant[:, self._cut :])
        out: Tensor = self._sliced.out(index, live, z).unflatten(0, (-1, self._n_prompts))
        return (out + constant).flatten(0, 1)

    def _mlp(self, layer: Layer) -> None:
        index = layer.index
        keep = self._edits.mlp(index)
        if self._skip and not keep.any():
            value = self._replacements.mlp(index, None, self._rows)[..., self._cut :, :]
            layer.skip_mlp(self._rows_of(value[..., -1:, :] if index == self._narrow_layer else value))
            return
        if index == self._narrow_layer:
            if layer.block.shares_norm:  # which ran before the attention
                layer.mlp_in = layer.mlp_in[:, -1:]
            else:
                layer.mlp_norm_in = layer.mlp_norm_in[:, -1:]
        read = self._replacements.coordinates.read_by_mlp(layer)
        act = self._with_features((Site.MLP_ACT, index), lambda: Seen(layer.mlp_act))
        if act is not None:
            layer.mlp_act = act
        if self._see_mlp is not None:
            self._see_mlp(index, layer.mlp_out)
        if not keep.all():
            out = layer.mlp_out.unflatten(0, (self._edits.n_masks, self._n_prompts))
            value = self._replacements.mlp(index, out, self._rows)[..., self._cut :, :].to(out.device)
            if index == self._narrow_layer:
                value, keep = value[..., -1:, :], keep[..., -1:]
            layer.mlp_out = torch.where(keep.unsqueeze(-1).to(out.device), out, value).flatten(0, 1)
        features = self._with_features((Site.MLP_OUT, index), lambda: Seen(layer.mlp_added, read))
        if features is not None:
            layer.mlp_added = features

    def _stream(self, layer: Layer) -> None:
        """The residual stream behind a layer. In the narrowed layer only its last position means anything."""
        last = layer.index == self._narrow_layer
        out = self._with_features((Site.RESID_POST, layer.index), lambda: Seen(layer.out[:, -1:] if last else layer.out))
        if out is not None:
            layer.out = torch.cat([layer.out[:, :-1], out], 1) if last else out

    def _with_features(self, place: Place, see: Callable[[], Seen]) -> Float[Tensor, "row pos width"] | None:
        """The activation at a place with what is removed of its neurons or features replaced; None, and unseen, where nothing is."""
        removed = self._edits.coordinates(*place)
        if removed is None:
            return None
        removed = removed.last() if place[1] == self._narrow_layer else removed
        return self._replacements.coordinates.edited(place, see(), removed, self._rows)

    def _attention_from(
        self, z: Float[Tensor, "prompt pos head d_head"], whole: Callable[[], Float[Tensor, "prompt pos d_model"]] | None
    ) -> Float[Tensor, "row some d_model"]:
        """The entry layer's attention output, from its heads' known outputs: of those that are in, or as a change, whichever is less."""
        index, n_masks = self._entry, self._edits.n_masks
        keep = self._edits.heads(index)
        if n_masks > 1 and (keep == keep[:1]).all():
            keep = keep[:1]
        live, changed = live_heads(keep), live_heads(~keep)
        if self._sliced is None or index == self._narrow_layer or min(live.sum(), changed.sum()) + 1 >= len(live):
            if not keep.all():
                z = self._edited(index, keep, z.repeat(len(keep), 1, 1, 1))
            return self._rows_of(self._model.project(index, self._narrowed(index, z)))
        if whole is None or live.sum() < changed.sum():
            return self._rows_of(self._sliced_out(index, keep, live, z.repeat(len(keep), 1, 1, 1)))
        out = whole()
        if changed.any():
            z, keep = taken(z, changed), keep[..., changed]
            change = self._edited(index, keep, z.repeat(len(keep), 1, 1, 1), changed).unflatten(0, (-1, len(z))) - z
            out = self._sliced.out(index, changed, change.flatten(0, 1)).unflatten(0, (-1, len(z))) + out
        return self._rows_of(out.flatten(0, -3))

    def _edited(
        self, index: int, keep: Tensor, z: Float[Tensor, "row pos some d_head"], some: Bool[Tensor, " head"] | None = None
    ) -> Float[Tensor, "row pos some d_head"]:
        """Heads' outputs with those replaced that are not kept: of all heads, or of some."""
        z = z.unflatten(0, (len(keep), self._n_prompts))
        whole = z if some is None else None  # some alone are only computed where the patcher does not read them
        values = self._replacements.heads(index, whole, self._rows)[..., self._cut :, :, :].to(z.device)
        values = values if some is None else taken(values, some)
        return torch.where(keep.unsqueeze(-1).to(z.device), z, values).flatten(0, 1)

    def _narrowed(self, index: int, act: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row some *rest"]:
        """The last position only, in the layer that is narrowed."""
        return act[:, -1:] if index == self._narrow_layer else act

    def _rows_of(self, value: Tensor) -> Float[Tensor, "row pos d_model"]:
        """A value for one row, for each prompt, for each mask, or for each mask x prompt, as rows."""
        n_masks, n_prompts = self._edits.n_masks, self._n_prompts
        if len(value) == n_masks * n_prompts and value.ndim == 3:
            return value
        return value.expand(n_masks, n_prompts, *value.shape[-2:]).flatten(0, 1)
