"""The fast engine: many masks per forward pass, each started where it first differs from a run whose states are held.

Exact: it makes the same decisions as the naive path in ``engine/oracle/nodes.py``, which tests compare it with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Masks, StepLogits, Values
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.featurizing import Featurizers
from circuitkit.engine.nodes import NodeEngine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.conditional import ConditionalMeans
from circuitkit.engine.packed.lane import Lane, ReplacementsFor
from circuitkit.engine.packed.layout import Layout
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.engine.packed.packing import Pack
from circuitkit.engine.packed.replacements import Collected, Replacements, collected, entries, unchanged_prefix
from circuitkit.engine.packed.sliced import SlicedAttention
from circuitkit.engine.packed.work import Work
from circuitkit.metrics.base import Metric
from circuitkit.models.allocator import keep_freed_memory
from circuitkit.models.hooked import HookedModel
from circuitkit.models.slices import HeadSlices
from circuitkit.patchers.base import Patcher

if TYPE_CHECKING:
    from circuitkit.engine.edges.base import EdgeEngine

_log = logging.getLogger(__name__)

# A pass with fewer tokens x d_model than this takes about as long as one with as many, so guessing ahead costs nothing. Measured on a CPU
# with models of d_model 128 and 768 (scripts/bench/run.py packing); a guess on CUDA.
SATURATION = {"cpu": 2**16, "cuda": 2**22}
# To leave out fewer positions than this share of the prompt costs more in copied keys and values than it saves.
_PREFIX_WORTH = 8
# Single tokens are unembedded where the metric reads at most this share of the vocabulary.
_FEW = 8


class PackedEngine(NodeEngine):
    """Scores many masks per pass. Final, but for the dry run in ``engine/cost.py``, which makes its very passes.

    Args:
        model, prompts, patcher, metric, universe, featurizers: As for every engine over nodes.
        max_rows: Bound on the rows (masks x prompts) of a pass; None for what the free memory allows.

    Attributes:
        work: Passes and rows computed so far.
        budget: Rows that a pass may have now.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: PromptSet,
        patcher: Patcher,
        metric: Metric,
        universe: NodeUniverse | None = None,
        featurizers: Featurizers | None = None,
        *,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(model, prompts, patcher, metric, universe, featurizers)
        if self.model.device.type == "cpu":
            keep_freed_memory()
        self.work = Work()
        self.budget = RowBudget(self.model, self.prompts.n_pos, max_rows)
        self._layout = Layout(self.universe, self.prompts)
        self._skip = not self.patcher.reads_activation
        slices = self._skip and HeadSlices.worthwhile(self.model) and HeadSlices.possible(self.model)
        self._sliced = SlicedAttention(self.model) if slices else None
        self._clean_lane = self._lane()
        if not self._skip:
            _log.info("%s reads the activation that it replaces, so no module is skipped.", type(self.patcher).__name__)

    @property
    def batch(self) -> int:
        n_prompts = len(self.prompts)
        useful = SATURATION.get(self.model.device.type, 2**16) // (n_prompts * self.prompts.n_pos * self.model.d_model)
        return max(1, min(useful, self.budget.rows // n_prompts))

    @property
    def holds_keys_values(self) -> bool:
        """Whether keys and values are held, so that only positions from the first edit on are computed."""
        return self._clean_lane.cone

    def score(self, masks: Masks, base: Bool[Tensor, " node"] | None = None) -> Values:
        if self._asked is None:
            return super().score(masks, base)
        masks = self.checked(masks, base)
        clean = self.known_clean[:, self._asked]  # before the passes, whose held states it would replace
        values = torch.empty(len(masks), len(self.prompts))
        for part, logits in self._parts(masks, base):
            prompts = self._renumbered.take(range(part.rows.start, part.rows.stop))
            known = clean[part.rows].to(logits.device)
            values[part.masks, part.rows] = self.metric.score(logits, prompts, clean_logits=known).float().cpu()
        return values

    @cached_property
    def _asked(self) -> Int[Tensor, " some"] | None:
        """The tokens whose logits the metric reads, where it is worth unembedding these alone."""
        if self.metric.reads_others or self.prompts.targets.shape[1] or not self.model.unembeds_some:
            return None
        found = self.prompts.asked
        return found if 0 < len(found) * _FEW <= self.model.d_vocab else None

    @cached_property
    def _renumbered(self) -> PromptSet:
        assert self._asked is not None
        return self.prompts.renumbered(self._asked)

    def _parts(self, masks: Masks, base: Bool[Tensor, " node"] | None) -> Iterator[tuple[Pack, StepLogits]]:
        """The passes that a score takes."""
        for part, logits in self._clean_lane.run(masks, self._replacements_for, base, tokens=self._asked):
            assert logits is not None
            yield part, logits.unflatten(0, (len(part.masks), -1))

    @property
    def sliced_bytes(self) -> int:
        """What copies of the attentions' weights take at most, for heads that are computed alone; 0 where all heads of a layer are."""
        used = self._sliced is not None and (not self.holds_keys_values or self.patcher.needs.conditional)
        return self._sliced.most_bytes if self._sliced is not None and used else 0

    def passes(self, masks: Masks, base: Bool[Tensor, " node"] | None = None) -> Iterator[tuple[Int[Tensor, " some"], slice, StepLogits]]:
        for part, logits in self._clean_lane.run(masks, self._replacements_for, base):
            assert logits is not None
            yield part.masks, part.rows, logits.unflatten(0, (len(part.masks), -1))

    def on(self, prompts: PromptSet) -> PackedEngine:
        return type(self)(self.model, prompts, self.patcher, self.metric, self.universe, max_rows=self.budget.rows, **self.placed)

    def edges(self, circuit: Circuit | None = None, **options: Any) -> EdgeEngine:
        from circuitkit.engine.edges.engine import PackedEdges  # stands on this engine
        from circuitkit.engine.edges.possible import not_fast

        why = not_fast(self.model)
        if why:
            _log.info("Edges are scored by the naive path, one whole pass after the other: in %s %s.", self.model.name, why)
            return self.oracle.edges(circuit, **options)
        return PackedEdges(self, circuit, **options)

    def replacements(self, mask: Bool[Tensor, " node"]) -> Replacements:
        """What removed components are replaced by when this mask is what is left."""
        return self._replacements_for(mask[None], mask)

    @property
    def skips(self) -> bool:
        """Whether replaced modules are left uncomputed."""
        return self._skip

    def clean_logits(self) -> CleanLogits:
        return torch.cat(self._clean_lane.extend(self.universe.full(), self.model.n_layers, self._replacements_for))

    def _lane(self, *, corrupt: bool = False) -> Lane:
        prefix = unchanged_prefix(self.prompts, self.patcher)
        prefix = prefix if prefix * _PREFIX_WORTH >= self.prompts.n_pos else 0
        held = self.model, self._layout, self.prompts, self.budget, self.work
        return Lane(*held, skip=self._skip, corrupt=corrupt, prefix=prefix, sliced=self._sliced)

    def prepare(self) -> None:
        self.plain.make(self.universe)

    @cached_property
    def plain(self) -> Replacements:
        """What removed components are replaced by, whatever else is removed; with conditional means, what heads are replaced by."""
        return Replacements(self.model, self.prompts, self.patcher, self._collected, self.featurizers)

    @cached_property
    def _replacements_for(self) -> ReplacementsFor:
        plain, needs = self.plain, self.patcher.needs
        if not needs.conditional:
            return lambda *_: plain
        if self.patcher.reads_activation:
            raise MeasurementError(
                f"{type(self.patcher).__name__} wants conditional means and reads the activation that it replaces; "
                "the fast engine does not do "
                "both. Run with engine=reference, or set reads_activation = False if it does not read it."
            )
        lane = self._lane(corrupt=True)
        return ConditionalMeans(lane, self._layout, plain, entries(needs, self.prompts), self.model.dtype)

    @cached_property
    def _collected(self) -> Collected:
        """The one run over the corrupt prompts."""
        return collected(self.model, self.prompts, self.patcher.needs, self.budget, self.work, self.featurizers)

    @cached_property
    def oracle(self) -> ReferenceEngine:
        """The naive path, with as much memory a pass as this one."""
        # It unembeds every position, so as many rows would take so many times the memory for logits.
        max_rows = max(1, self.budget.rows // self.prompts.n_pos)
        return ReferenceEngine(self.model, self.prompts, self.patcher, self.metric, self.universe, max_rows=max_rows, **self.placed)
