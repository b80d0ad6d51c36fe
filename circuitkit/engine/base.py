"""Engine: turns masks into scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Logits, Masks, Values
from circuitkit.core.universe import NodeUniverse
from circuitkit.metrics.base import Floor, Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher


@dataclass(frozen=True)
class Baseline:
    """The two runs that every score is held against.

    Attributes:
        clean: Metric of the untouched model, a prompt.
        patched: Metric with every unit replaced, a prompt.
        floor: What counts as 0 %.
        unit: Of the metric.
    """

    clean: Float[Tensor, "prompt"]
    patched: Float[Tensor, "prompt"]
    floor: Floor
    unit: str

    @property
    def zero(self) -> float:
        """The mean metric that counts as 0 %."""
        return self.patched.mean().item() if self.floor is Floor.PATCHED else 0.0

    def percent(self, values: Values) -> Float[Tensor, "*mask"]:
        """Performance score: 100 x (mean under the mask - zero) / (mean untouched - zero), a ratio of means."""
        span = self.clean.double().mean() - self.zero
        return 100 * (values.double().mean(-1) - self.zero) / span

    def check(self, metric: Metric) -> None:
        """Refuses a baseline against which a percentage would mean nothing.

        Raises:
            MeasurementError: NaN, or the untouched model is no better than the zero point.
        """
        if not (self.clean.isfinite().all() and self.patched.isfinite().all()):
            raise MeasurementError(
                "The logits hold NaN or infinity, so no score can be given. Load the model in float32 or bfloat16 "
                "(model.dtype) and check its "
                "weights with `circuitkit job=doctor`."
            )
        clean, zero = self.clean.double().mean().item(), self.zero
        gap = clean - zero if metric.higher_is_better else zero - clean
        spread = max(self.clean.double().abs().mean().item(), self.patched.double().abs().mean().item(), 1e-12)
        if gap <= 1e-3 * spread:
            raise MeasurementError(
                f"The untouched model's mean {metric.name} is {clean:.4g} {metric.unit}, and 0 % is at {zero:.4g}: a "
                "performance score would be "
                "meaningless. The model cannot do this task on these prompts; take another model or task, or keep the filter on "
                "(task.filter=true)."
            )


class Engine(Part):
    """Scores masks on one model, prompt set, patcher and metric.

    Attributes:
        model: The model.
        prompts: The prompts.
        patcher: What removed components are replaced by.
        metric: What that costs.
        universe: The units that a mask has.
    """

    # What a run is made of is hashed on its own. How many rows share a pass moves a score by rounding alone, as free memory does, which
    # decides it where nothing is given; decisions that rounding could turn are taken by ``certain``.
    unhashed: ClassVar[tuple[str, ...]] = ("model", "prompts", "patcher", "metric", "universe", "max_rows")

    def __init__(
        self, model: HookedModel, prompts: PromptSet, patcher: Patcher, metric: Metric, universe: NodeUniverse | None = None
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.patcher = patcher
        self.metric = metric
        self.universe = universe or model.universe
        self._baseline: Baseline | None = None

    @property
    def local(self) -> Engine:
        """The engine of this process alone."""
        return self

    @property
    def batch(self) -> int:
        """How many masks fit one pass without cost: what a method that guesses ahead should offer at a time."""
        return 1

    @property
    def margin(self) -> float:
        """How far, in %, two exact paths may differ by rounding: closer decisions are taken by ``certain``."""
        return 0.01 if self.model.dtype == torch.float32 else 0.5

    @abstractmethod
    def passes(self, masks: Masks, base: Bool[Tensor, "node"] | None = None) -> Iterator[tuple[Int[Tensor, "some"], slice, Logits]]:
        """Runs the masks, part by part.

        Args:
            masks: One row a mask.
            base: The mask from which these were made by small changes, if there is one: what they share is computed once.

        Yields:
            Which masks, which prompts, and their logits at the last position in float32.
        """

    @abstractmethod
    def clean_logits(self) -> Logits:
        """Logits of the untouched model at the last position, float32."""

    def all_logits(self, masks: Masks) -> Logits:
        """Logits of every mask and prompt at once. Large: masks x prompts x vocabulary."""
        logits = torch.empty(len(masks), len(self.prompts), self.model.d_vocab)
        for chosen, rows, part in self.passes(self._checked(masks), None):
            logits[chosen, rows] = part.cpu()
        return logits

    def score(self, masks: Masks, base: Bool[Tensor, "node"] | None = None) -> Values:
        """The metric for each mask and prompt.

        Args:
            masks: One row a mask.
            base: The mask from which these were made by small changes, if there is one.

        Raises:
            MeasurementError: No mask, or masks of another universe.
        """
        masks = self._checked(masks)
        if base is not None and (base.shape != masks.shape[1:] or base.dtype != torch.bool):
            raise MeasurementError(
                f"The base must be one mask of {len(self.universe)} units, found {tuple(base.shape)} of {base.dtype}. "
                "Make it with engine.universe."
            )
        clean = self._clean  # before the passes, whose held states it would replace
        values = torch.empty(len(masks), len(self.prompts))
        for chosen, rows, logits in self.passes(masks, base):
            values[chosen, rows] = self._measured(logits, rows, clean)
        return values

    def percent(self, masks: Masks, base: Bool[Tensor, "node"] | None = None) -> Float[Tensor, "mask"]:
        """The performance score of each mask, in % of the untouched model. Arguments as in ``score``."""
        return self.baseline().percent(self.score(masks, base))

    def certain(self, mask: Bool[Tensor, "node"]) -> float:
        """The performance score of one mask by the slow, naive path: for decisions that rounding could turn."""
        return self.percent(mask[None]).item()

    def baseline(self) -> Baseline:
        """Scores of the untouched and of the fully patched model, computed once.

        Raises:
            MeasurementError: A percentage of this baseline would mean nothing.
        """
        if self._baseline is None:
            clean = self.measure(self._clean[None], slice(0, len(self.prompts)))[0]
            patched = self.score(self.universe.empty()[None])[0]
            baseline = Baseline(clean, patched, self.metric.floor, self.metric.unit)
            baseline.check(self.metric)
            self._baseline = baseline
        return self._baseline

    @cached_property
    def _clean(self) -> Logits:
        return self.clean_logits()

    def measure(self, logits: Logits, rows: slice) -> Values:
        """The metric on logits of some prompts."""
        return self._measured(logits, rows, self._clean)

    def _measured(self, logits: Logits, rows: slice, clean: Logits) -> Values:
        prompts = self.prompts.take(range(rows.start, rows.stop))
        return self.metric.score(logits, prompts, clean_logits=clean[rows].to(logits.device)).float().cpu()

    def _checked(self, masks: Masks) -> Masks:
        if masks.ndim != 2 or masks.shape[1] != len(self.universe) or masks.dtype != torch.bool:
            raise MeasurementError(
                f"Masks must be a boolean table of masks x {len(self.universe)} units, found {tuple(masks.shape)} of {masks.dtype}. "
                "Make them with engine.universe."
            )
        if len(masks) == 0:
            raise MeasurementError("The list of masks is empty, so there is nothing to score. Give at least one mask.")
        return masks
