"""The fast engine: many masks a forward pass, each started where it first differs from a run whose states are held.

Exact: it makes the same decisions as the naive path in ``reference.py``, which tests compare it with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.shapes import Logits, Masks
from circuitkit.engine.base import Engine
from circuitkit.engine.edits import Edits, Layout
from circuitkit.engine.memory import RowBudget, is_out_of_memory
from circuitkit.engine.passes import PackedPass
from circuitkit.engine.plan import Pack, pack
from circuitkit.engine.reference import ReferenceEngine
from circuitkit.engine.replacements import Collected, Replacements, collect
from circuitkit.engine.trunk import Trunk, Watch

_log = logging.getLogger(__name__)

# A pass with fewer tokens than this takes about as long as one with as many, so guessing ahead costs nothing.
SATURATION_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass
class Work:
    """What an engine has computed so far; the same on every machine.

    Attributes:
        passes: Forward passes, whole or partial.
        layer_rows: Layers x rows computed.
        corrupt_passes: Passes over corrupt prompts, among them.
    """

    passes: int = 0
    layer_rows: int = 0
    corrupt_passes: int = 0


class PackedEngine(Engine):
    """Scores many masks a pass. Final.

    Args:
        model, prompts, patcher, metric, graph: As for every engine.
        max_rows: Bound on the rows (masks x prompts) of a pass; None for what the free memory allows.
    """

    def __init__(self, *args: Any, max_rows: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.work = Work()
        self.budget = RowBudget(self.model, self.prompts.n_pos, max_rows)
        self._layout = Layout(self.graph, self.prompts)
        self._trunk = Trunk(self.model, self._layout, len(self.prompts), self.prompts.n_pos)
        self._skip = not self.patcher.reads_activation
        if not self._skip:
            _log.info("%s reads the activation that it replaces, so no module is skipped.", type(self.patcher).__name__)

    @property
    def batch(self) -> int:
        tokens = len(self.prompts) * self.prompts.n_pos
        useful = SATURATION_TOKENS.get(self.model.device.type, 512) // tokens
        return max(1, min(useful, self.budget.rows // len(self.prompts)))

    def certain(self, mask: Bool[Tensor, "node"]) -> float:
        return self.baseline().percent(self._oracle.score(mask[None])).item()

    def passes(self, masks: Masks, base: Bool[Tensor, "node"] | None = None) -> Iterator[tuple[Int[Tensor, "some"], slice, Logits]]:
        base = self._trunk.mask if base is None else base
        self._extend(base, int(self._layout.first_difference(masks, base).min()))
        starts = self._layout.first_difference(masks, self._trunk.mask)
        waiting = pack(masks, starts, self._layout, len(self.prompts), self.budget.rows)
        while waiting:
            part = waiting.pop(0)
            try:
                logits = self._run(part, masks)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.budget.halve(error)
                waiting = [*part.split(self.budget.rows), *(piece for other in waiting for piece in other.split(self.budget.rows))]
                continue
            yield part.masks, part.rows, logits.unflatten(0, (len(part.masks), -1))

    def clean_logits(self) -> Logits:
        return torch.cat(self._extend(self.graph.full(), self.model.n_layers))

    def _run(self, part: Pack, masks: Masks) -> Logits:
        """The last position's logits for the rows of one pack."""
        entry = self._trunk.entry(part.start)
        chosen, rows = masks[part.masks], part.rows
        visit = PackedPass(
            self.model,
            Edits(self._layout, chosen, rows),
            self._replacements,
            rows,
            skip=self._skip,
            entry=entry,
            entry_z=self._trunk.z(entry, rows),
        )
        n_masks = len(chosen)
        resid = self._trunk.resid(entry, rows)
        if resid is not None and n_masks > 1:
            resid = resid.repeat(n_masks, 1, 1)
        logits = self.model.run(self.prompts.clean[rows].repeat(n_masks, 1), visit, start=entry, resid=resid)
        self._count(n_masks * (rows.stop - rows.start), entry, self.model.n_layers)
        assert logits is not None
        return logits[:, -1].float()

    def _extend(self, mask: Bool[Tensor, "node"], until: int) -> list[Logits]:
        """Holds the states under ``mask`` up to layer ``until`` if it does not; the number of layers means up to the logits, which it returns."""
        valid = self._trunk.valid_until(mask)
        to_logits = until == self.model.n_layers
        until = min(until, self.model.n_layers - 1)
        if until <= valid and not to_logits:
            return []
        entry = self._trunk.entry(valid)
        waiting, watches, logits = list(self._slices()), [], []
        while waiting:
            rows = waiting.pop(0)
            watch = Watch.of(range(entry, until + 1), self._trunk.stride)
            edits = Edits(self._layout, mask[None], rows)
            z = self._trunk.z(entry, rows)
            visit = PackedPass(
                self.model, edits, self._replacements, rows, skip=self._skip, entry=entry, entry_z=z, narrow=to_logits, watch=watch
            )
            stop = None if to_logits else until
            try:
                out = self.model.run(self.prompts.clean[rows], visit, start=entry, resid=self._trunk.resid(entry, rows), stop=stop)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.budget.halve(error)
                waiting = [*self._slices(rows), *(piece for other in waiting for piece in self._slices(other))]
                continue
            if entry in watch.layers and z is not None:
                watch.z[entry] = z
            self._count(rows.stop - rows.start, entry, until + 1)
            watches.append(watch)
            logits += [] if out is None else [out[:, -1].float()]
        self._trunk.replace(mask, entry, until, watches)
        return logits

    def _slices(self, within: slice | None = None) -> Iterator[slice]:
        start, stop = (0, len(self.prompts)) if within is None else (within.start, within.stop)
        for first in range(start, stop, self.budget.rows):
            yield slice(first, min(first + self.budget.rows, stop))

    @cached_property
    def _collected(self) -> Collected:
        if self.patcher.needs.source == "none":
            return Collected()
        for rows in self._slices():
            self._count(rows.stop - rows.start, 0, self.model.n_layers, corrupt=True)
        return collect(self.model, self.prompts, self.patcher.needs, self._slices())

    @cached_property
    def _replacements(self) -> Replacements:
        return Replacements(self.model, self.prompts, self.patcher, self._collected)

    @cached_property
    def _oracle(self) -> ReferenceEngine:
        return ReferenceEngine(self.model, self.prompts, self.patcher, self.metric, self.graph, max_rows=self.budget.rows)

    def _count(self, rows: int, start: int, stop: int, *, corrupt: bool = False) -> None:
        self.work.passes += 1
        self.work.layer_rows += rows * (stop - start)
        self.work.corrupt_passes += corrupt
