"""Lane: one table of token ids with the states held for it, along which packed passes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.shapes import Masks
from circuitkit.engine.edits import Edits, Layout
from circuitkit.engine.memory import RowBudget, is_out_of_memory
from circuitkit.engine.passes import PackedPass, SeeMlp
from circuitkit.engine.plan import Pack, pack
from circuitkit.engine.replacements import Replacements
from circuitkit.engine.trunk import Trunk, Watch
from circuitkit.models.hooked import HookedModel

ReplacementsFor = Callable[[Masks, Bool[Tensor, "node"]], Replacements]
"""Gives what removed components are replaced by for some masks, and the mask from which they were made."""


@dataclass
class Work:
    """What an engine has computed so far; the same on every machine.

    Attributes:
        passes: Forward passes, whole or partial.
        layer_rows: Layers x rows computed.
        corrupt_passes: Passes over corrupt prompts, among them.
        corrupt_layer_rows: Layers x rows of these.
    """

    passes: int = 0
    layer_rows: int = 0
    corrupt_passes: int = 0
    corrupt_layer_rows: int = 0

    def add(self, rows: int, layers: int, *, corrupt: bool) -> None:
        """Counts one pass."""
        self.passes += 1
        self.layer_rows += rows * layers
        self.corrupt_passes += corrupt
        self.corrupt_layer_rows += corrupt * rows * layers


class Lane:
    """Runs masks over one table of prompts, each from where it first differs from the run that is held. Final.

    Args:
        model: The model.
        layout: Of the units.
        ids: Token ids of the prompts.
        budget: Rows a pass.
        work: Where passes are counted.
        skip: Whether replaced modules may be left uncomputed.
        corrupt: Whether these are the corrupt prompts, for counting.
    """

    def __init__(
        self, model: HookedModel, layout: Layout, ids: Int[Tensor, "prompt pos"], budget: RowBudget, work: Work, *, skip: bool, corrupt: bool = False
    ) -> None:
        self.trunk = Trunk(model, layout, *ids.shape)
        self._model = model
        self._layout = layout
        self._ids = ids
        self._budget = budget
        self._work = work
        self._skip = skip
        self._corrupt = corrupt

    def run(
        self,
        masks: Masks,
        replacements_for: ReplacementsFor,
        base: Bool[Tensor, "node"] | None = None,
        *,
        stop: int | None = None,
        latest: Int[Tensor, "mask"] | None = None,
        see_mlp: Callable[[Pack], SeeMlp] | None = None,
    ) -> Iterator[tuple[Pack, Tensor | None]]:
        """Runs masks, packed.

        Args:
            masks: One row a mask.
            replacements_for: Gives what removed components are replaced by, for some of the masks.
            base: The mask from which these were made; what they share with it is computed once and held.
            stop: Last layer to compute; None for the logits.
            latest: For each mask a layer that has to be computed even if nothing changed up to there; None for the last one.
            see_mlp: Makes for each pack what is told of the MLPs' outputs.

        Yields:
            Each pack with the last position's logits of its rows in float32, or None if stopped before.
        """
        base = self.trunk.mask if base is None else base
        latest = torch.full((len(masks),), self._model.n_layers - 1) if latest is None else latest
        self.extend(base, int(self._layout.first_difference(masks, base).minimum(latest).min()), replacements_for)
        starts = self._layout.first_difference(masks, self.trunk.mask).minimum(latest)
        waiting = pack(masks, starts, self._layout, len(self._ids), self._budget.rows)
        while waiting:
            part = waiting.pop(0)
            try:
                entry = self.trunk.entry(part.start)
                chosen = masks[part.masks]
                seen = None if see_mlp is None else see_mlp(part)
                visit = self._visit(chosen, part.rows, entry, replacements_for(chosen, base), see_mlp=seen, narrow=stop is None)
                logits = self._forward(visit, len(part.masks), part.rows, entry, stop)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                waiting = [piece for other in (part, *waiting) for piece in other.split(self._budget.rows)]
                continue
            yield part, logits

    def extend(self, mask: Bool[Tensor, "node"], until: int, replacements_for: ReplacementsFor) -> list[Tensor]:
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
        waiting, watches, logits = list(self.slices()), [], []
        while waiting:
            rows = waiting.pop(0)
            watch = Watch.of(range(entry, until + 1), self.trunk.stride)
            try:
                visit = self._visit(mask[None], rows, entry, replacements_for(mask[None], mask), watch=watch, narrow=to_logits)
                out = self._forward(visit, 1, rows, entry, None if to_logits else until)
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                waiting = [piece for other in (rows, *waiting) for piece in self.slices(other)]
                continue
            z = self.trunk.z(entry, rows)
            if z is not None and entry in watch.layers:
                watch.z[entry] = z
            watches.append(watch)
            logits += [] if out is None else [out]
        self.trunk.replace(mask, entry, until, watches)
        return logits

    def slices(self, within: slice | None = None) -> Iterator[slice]:
        """The prompts, in passes that fit."""
        start, stop = (0, len(self._ids)) if within is None else (within.start, within.stop)
        rows = self._budget.rows
        for first in range(start, stop, rows):
            yield slice(first, min(first + rows, stop))

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
    ) -> PackedPass:
        return PackedPass(
            self._model,
            Edits(self._layout, masks, rows),
            replacements,
            rows,
            skip=self._skip,
            entry=entry,
            entry_z=self.trunk.z(entry, rows),
            narrow=narrow,
            watch=watch,
            see_mlp=see_mlp,
        )

    def _forward(self, visit: PackedPass, n_masks: int, rows: slice, entry: int, stop: int | None) -> Tensor | None:
        resid = self.trunk.resid(entry, rows)
        if resid is not None and n_masks > 1:
            resid = resid.repeat(n_masks, 1, 1)
        logits = self._model.run(self._ids[rows].repeat(n_masks, 1), visit, start=entry, resid=resid, stop=stop)
        last = self._model.n_layers if stop is None else stop + 1
        self._work.add(n_masks * (rows.stop - rows.start), last - entry, corrupt=self._corrupt)
        return None if logits is None else logits[:, -1].float()

    def _halve(self, error: RuntimeError | MemoryError) -> None:
        if not is_out_of_memory(error):
            raise error
        self._budget.halve(error)
