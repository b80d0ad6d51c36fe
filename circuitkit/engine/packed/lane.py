"""Lane: one table of token ids with the states held for it, along which packed passes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.errors import noting
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks
from circuitkit.engine.base import pass_over
from circuitkit.engine.packed.layout import Edits, Layout
from circuitkit.engine.packed.memory import RowBudget, in_slices, within_memory
from circuitkit.engine.packed.packed_pass import PackedPass, SeeMlp
from circuitkit.engine.packed.packing import Pack, pack
from circuitkit.engine.packed.replacements import Replacements
from circuitkit.engine.packed.sliced import SlicedAttention, live_heads
from circuitkit.engine.packed.trunk import Trunk, Watch
from circuitkit.engine.packed.work import Work
from circuitkit.models.cache import keys_values, new_cache, prefix_cache, sliding_window
from circuitkit.models.hooked import HookedModel

ReplacementsFor = Callable[[Masks, Bool[Tensor, " node"]], Replacements]
"""Gives what removed components are replaced by for some masks, and the mask from which they were made."""


class Lane:
    """Runs masks over one table of prompts, each from where it first differs from the run that is held. Final.

    Args:
        model: The model.
        layout: Of the units.
        prompts: The prompts.
        budget: Rows per pass.
        work: Where passes are counted.
        skip: Whether replaced modules may be left uncomputed.
        corrupt: Whether to run the corrupt prompts.
        prefix: First position at which a replacement changes anything.
        sliced: Computes only the heads that are in; None to compute all heads of a layer that has one in.

    Attributes:
        trunk: The states.
        cone: Whether keys and values are held too, so that only positions from the first edit on need be computed.
    """

    def __init__(
        self,
        model: HookedModel,
        layout: Layout,
        prompts: PromptSet,
        budget: RowBudget,
        work: Work,
        *,
        skip: bool,
        corrupt: bool = False,
        prefix: int = 0,
        sliced: SlicedAttention | None = None,
    ) -> None:
        ids = prompts.corrupt if corrupt else prompts.clean
        self.trunk = Trunk(model, layout, *ids.shape)
        self._model = model
        self._layout = layout
        self._ids = ids
        self._prompts = prompts
        self._budget = budget
        self._work = work
        self._skip = skip
        self._corrupt = corrupt
        self._prefix = prefix
        window = sliding_window(model)
        # The causal cone: positions before the first edit are not computed again, only attended to.
        # Its keys and values are those of all heads, whichever masks come later.
        possible = model.map.causal and model.map.caches and (window is None or window > ids.shape[1])
        self.cone = skip and not corrupt and (prefix > 0 or bool(layout.universe.spans)) and possible
        self._sliced = None if self.cone else sliced

    def run(
        self,
        masks: Masks,
        replacements_for: ReplacementsFor,
        base: Bool[Tensor, " node"] | None = None,
        *,
        stop: int | None = None,
        latest: Int[Tensor, " mask"] | None = None,
        see_mlp: Callable[[Pack], SeeMlp] | None = None,
        tokens: Int[Tensor, " some"] | None = None,
    ) -> Iterator[tuple[Pack, Tensor | None]]:
        """Runs masks, packed.

        Args:
            masks: One row per mask.
            replacements_for: Gives what removed components are replaced by, for some of the masks.
            base: The mask from which these were made; what they share with it is computed once and held.
            stop: Last layer to compute; None for the logits.
            latest: For each mask a layer that has to be computed even if nothing changed up to there; None for the last one.
            see_mlp: Makes for each pack what is told of the MLPs' outputs.
            tokens: Of which logits are wanted; None for all.

        Yields:
            Each pack with the last position's logits of its rows in float32, or None if stopped before.
        """
        base = self.trunk.mask if base is None else base
        latest = torch.full((len(masks),), self._model.n_layers - 1) if latest is None else latest
        firsts = self._layout.first_difference(masks, base).minimum(latest)
        self.extend(base, self._worth_holding(masks, base, firsts), replacements_for)
        starts = self._layout.first_difference(masks, self.trunk.mask).minimum(latest)
        packs = pack(masks, starts, self._cuts(masks), self._layout, len(self._ids), self._budget.rows)

        universe = self._layout.universe

        def run(part: Pack) -> Tensor | None:
            chosen = masks[part.masks]
            # Looked up anew: another call may have moved the trunk since the last result was taken.
            entry = self.trunk.entry(min(part.start, int(self._layout.first_difference(chosen, self.trunk.mask).min())))
            cut = min(part.cut, int(self._cuts(chosen).min()))
            seen = None if see_mlp is None else see_mlp(part)
            with noting(lambda: f"in a pass from layer {entry} {pass_over(part.rows, chosen, universe, part.masks.tolist())}"):
                visit = self._visit(chosen, part.rows, entry, replacements_for(chosen, base), see_mlp=seen, narrow=stop is None, cut=cut)
                return self._forward(visit, part.rows, len(part.masks), entry=entry, stop=stop, cut=cut, tokens=tokens)

        yield from within_memory(packs, run, self._budget, lambda part: part.split(self._budget.rows))

    def extend(self, mask: Bool[Tensor, " node"], until: int, replacements_for: ReplacementsFor) -> list[Tensor]:
        """Holds the states under ``mask`` up to layer ``until``, if they are not held.

        Args:
            mask: Whose run to hold.
            until: A layer; the number of layers asks for the logits too.
            replacements_for: As in ``run``.

        Returns:
            Logits of the last position, slice by slice, if they were asked for.
        """
        valid = self.trunk.valid_until(mask)
        to_logits = until == self._model.n_layers
        until = min(until, self._model.n_layers - 1)
        if until <= valid and not to_logits:
            return []
        entry = self.trunk.entry(valid)

        def run(rows: slice) -> tuple[Watch, Tensor | None]:
            watch = Watch.of(range(entry, until + 1), self.trunk.stride)
            cache = new_cache(self._model) if self.cone else None
            with noting(lambda: f"in the pass to hold, from layer {entry} {pass_over(rows, mask[None], self._layout.universe)}"):
                visit = self._visit(mask[None], rows, entry, replacements_for(mask[None], mask), watch=watch, narrow=to_logits)
                out = self._forward(visit, rows, 1, entry=entry, stop=None if to_logits else until, cache=cache)
            if entry in watch.layers and entry not in watch.z:
                self.trunk.carry(entry, rows, watch)
            if cache is not None:
                watch.kv.update(keys_values(cache))
            return watch, out

        seen = [result for _, result in in_slices(len(self._ids), run, self._budget)]
        self.trunk.replace(mask, entry, until, [watch for watch, _ in seen])
        return [out for _, out in seen if out is not None]

    def _visit(
        self,
        masks: Masks,
        rows: slice,
        entry: int,
        replacements: Replacements,
        *,
        narrow: bool,
        watch: Watch | None = None,
        see_mlp: SeeMlp | None = None,
        cut: int = 0,
    ) -> PackedPass:
        edits = Edits(self._layout, masks, rows, cut)
        z = self.trunk.z(entry, rows, live_heads(edits.heads(entry)))  # None for a mixer, whose inside nobody holds
        return PackedPass(
            self._model,
            edits,
            replacements,
            rows,
            skip=self._skip,
            entry=entry,
            entry_z=None if z is None else z[:, cut:],
            entry_out=lambda: self.trunk.out(entry, rows),
            sliced=self._sliced,
            # One position is added to the stream of all of them by broadcasting.
            narrow=narrow and self._prompts.n_kept == 1 and self._model.map.causal,
            watch=watch,
            see_mlp=see_mlp,
            cut=cut,
        )

    def _forward(
        self,
        visit: PackedPass,
        rows: slice,
        n_masks: int,
        *,
        entry: int,
        stop: int | None,
        cut: int = 0,
        cache: Any = None,
        tokens: Int[Tensor, " some"] | None = None,
    ) -> Tensor | None:
        if cut:
            cache = prefix_cache(self._model, self.trunk.kv, rows, n_masks, cut)
        inputs: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        inputs |= self._prompts.padding(rows, n_masks, cut)
        resid = self.trunk.resid(entry, rows)
        if resid is not None:
            resid = resid[:, cut:].repeat(n_masks, 1, 1)
        ids = self._ids[rows, cut:].repeat(n_masks, 1)
        keep = self._prompts.n_kept
        logits = self._model.run(ids, visit, start=entry, resid=resid, stop=stop, keep=keep, gather=stop is None, tokens=tokens, **inputs)
        last = self._model.n_layers if stop is None else stop + 1
        self._work.add(len(ids), last - entry, ids.shape[1], corrupt=self._corrupt)
        return None if logits is None else self._prompts.scored(logits, rows)

    def _cuts(self, masks: Masks) -> Int[Tensor, " mask"]:
        """For each mask the first position that has to be computed."""
        n_pos = self._ids.shape[1]
        if not (self.cone and self.trunk.has_all_keys_values):
            return torch.zeros(len(masks), dtype=torch.long)
        return self._layout.first_position(masks, self.trunk.mask).clamp(min=self._prefix, max=n_pos - self._prompts.n_kept)

    def _worth_holding(self, masks: Masks, base: Bool[Tensor, " node"], firsts: Int[Tensor, " mask"]) -> int:
        """The layer up to which it pays to hold the states under ``base``."""
        # As deep as two masks need it: to hold one more layer costs what it saves a single mask.
        shared = int(firsts.sort().values[-2:][0])
        if self.cone:
            n_pos, last = self._ids.shape[1], self._model.n_layers - 1
            cuts = self._layout.first_position(masks, base).clamp(min=self._prefix, max=n_pos - self._prompts.n_kept)
            saved = ((last + 1 - firsts) * cuts).sum().item() / n_pos
            if saved > last - max(shared, self.trunk.valid_until(base)):
                return last
        return shared
