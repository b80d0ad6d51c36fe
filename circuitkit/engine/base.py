"""Engine: turns masks into scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Unit
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Masks, StepLogits, Values
from circuitkit.core.universe import Universe
from circuitkit.metrics.base import Floor, Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

if TYPE_CHECKING:
    from circuitkit.engine.dense.gradients import Gradients
    from circuitkit.engine.edges.base import EdgeEngine


@dataclass(frozen=True)
class Baseline:
    """The two runs that every score is held against.

    Attributes:
        clean: Metric of the untouched model, per prompt.
        patched: Metric with every unit replaced, per prompt.
        floor: What counts as 0 %.
        unit: Of the metric.
    """

    clean: Float[Tensor, " prompt"]
    patched: Float[Tensor, " prompt"]
    floor: Floor
    unit: str

    @property
    def zero(self) -> float:
        """The mean metric that counts as 0 %."""
        return self.patched.mean().item() if self.floor is Floor.ABLATED else 0.0

    def percent(self, values: Values) -> Float[Tensor, "*mask"]:
        """Performance score (faithfulness): 100 x (mean under the mask - zero) / (mean untouched - zero), a ratio of means."""
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
                "meaningless. The model cannot do this task on these prompts; take another model or task, keep the filter on "
                "(task.filter=true), or another zero (score.zero: zero, ablated)."
            )


@dataclass(frozen=True)
class Share:
    """Which part of some passes one of several processes makes.

    Attributes:
        index: Which process, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def takes(self, place: int) -> bool:
        """Whether the pass of this number is among them."""
        return place % self.count == self.index


WHOLE = Share()
"""All passes."""


def removed_by(mask: Float[Tensor, " unit"] | Bool[Tensor, " unit"], universe: Universe, most: int = 6) -> str:
    """The first few units that a mask removes, wholly or in part, for people."""
    places = (mask < 1).nonzero().flatten().tolist()
    names = ", ".join(str(universe.unit(place)) for place in places[:most]) or "nothing"
    return names + (f" and {len(places) - most} more" if len(places) > most else "")


def pass_over(rows: slice, masks: Tensor, universe: Universe, places: Sequence[int] | None = None) -> str:
    """Which pass this is, for the note on an error in it.

    Args:
        rows: The prompts.
        masks: One row per mask.
        universe: Of the masks.
        places: Of the masks in the list that was asked for; None for the only one.
    """
    which = "the mask that" if places is None else f"the masks of places {list(places)[:8]}, the first of which"
    return f"over prompts {rows.start}-{rows.stop - 1} and {which} removes {removed_by(masks[0], universe)}"


class Engine(Part):
    """Scores masks over one universe, on one model, prompt set, patcher and metric.

    An engine of your own implements ``score`` and ``clean_logits``.

    Attributes:
        model: The model.
        prompts: The prompts.
        patcher: The ablation: by what removed units are replaced.
        metric: What that costs.
        universe: The units that a mask has.
    """

    # What a run is made of is hashed on its own. How many rows share a pass moves a score by rounding alone, as free memory does, which
    # decides it where nothing is given; decisions that rounding could turn are taken by ``certain``.
    unhashed: ClassVar[tuple[str, ...]] = ("model", "prompts", "patcher", "metric", "universe", "max_rows")

    def __init__(self, model: HookedModel, prompts: PromptSet, patcher: Patcher, metric: Metric, universe: Universe | None = None) -> None:
        self.model = model
        self.prompts = prompts
        self.patcher = patcher
        self.metric = metric
        self.universe = model.universe if universe is None else universe
        self._baseline: Baseline | None = None
        metric.check(prompts)
        patcher.check(prompts)

    @property
    def batch(self) -> int:
        """How many masks fit one pass without cost: what a method that guesses ahead should offer at a time."""
        return 1

    @property
    def margin(self) -> float:
        """How far, in %, two exact paths may differ by rounding: closer decisions are taken by ``certain``."""
        return 0.01 if self.model.dtype == torch.float32 else 0.5

    @property
    def local(self) -> Engine:
        """The engine of this process alone."""
        return self

    @property
    def oracle(self) -> Engine:
        """The naive path to the same numbers; an engine that takes no shortcut is its own."""
        return self

    @abstractmethod
    def score(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Values:
        """The metric for each mask and prompt.

        Args:
            masks: One row per mask.
            base: The mask from which these were made by small changes, if there is one: what they share is computed once.

        Raises:
            MeasurementError: No mask, or masks of another universe.
        """

    @abstractmethod
    def clean_logits(self) -> CleanLogits:
        """Logits of the untouched model at the last position, float32."""

    def alone(self, units: Sequence[Unit | str], share: Share = WHOLE) -> Float[Tensor, "unit prompt"]:
        """The metric with each of these units removed from the model, or from the circuit that edges are in, on its own.

        Args:
            units: Which.
            share: Which part of the passes to make, for work that several processes share; values of other passes are NaN.
        """
        full = self.universe.full()
        values = torch.full((len(units), len(self.prompts)), torch.nan)
        mine = [place for place in range(len(units)) if share.takes(place)]
        if mine:
            values[mine] = self.score(torch.stack([self.universe.without(full, [units[place]]) for place in mine]), full)
        return values

    def on(self, prompts: PromptSet) -> Engine:
        """The same engine on other prompts, with nothing held yet."""
        return type(self)(self.model, prompts, self.patcher, self.metric, self.universe)

    def edges(self, circuit: Circuit | None = None, **options: Any) -> EdgeEngine:
        """An engine over the direct paths between the members of a circuit of nodes, or of the whole model for None.

        Args:
            circuit: What is outside of it stays replaced.
            options: As for ``EdgeEngine``.

        Raises:
            MeasurementError: This engine has none.
        """
        raise MeasurementError(
            f"Edges are scored by the packed and by the reference engine, and this is a {type(self).__name__}. Run with engine=packed."
        )

    def gradients(self) -> Gradients:
        """Soft masks and derivatives over the same universe, prompts, patcher and metric, by the dense path.

        Raises:
            MeasurementError: The metric or the patcher has no gradient, or this engine offers none.
        """
        raise MeasurementError(f"Gradients are taken by the packed and by the reference engine, and this is a {type(self).__name__}. Run "
                               "with engine=packed.")  # fmt: skip

    def check(self) -> None:  # noqa: B027  an engine without a shortcut has nothing to do
        """Compares this engine with its oracle on a few prompts; nothing to do for an engine that is its own oracle.

        Raises:
            MeasurementError: They differ, or the patcher changes nothing.
        """

    def prepare(self) -> None:  # noqa: B027  an engine may have nothing to prepare
        """Makes what every pass needs and no mask changes: the corrupt run, and values of a patcher that does not read the activation.

        ``score`` does so itself; whoever calls this before has an error of the patcher at once, with a short stack.
        """

    def percent(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Float[Tensor, " mask"]:
        """The performance score of each mask, in % of the untouched model. Arguments as in ``score``."""
        return self.baseline().percent(self.score(masks, base))

    def certain(self, mask: Bool[Tensor, " unit"]) -> float:
        """The performance score of one mask by the slow, naive path: for decisions that rounding could turn."""
        return self.baseline().percent(self.oracle.score(mask[None])).item()

    def certain_alone(self, unit: Unit | str) -> float:
        """The performance score with one unit removed on its own, likewise."""
        return self.baseline().percent(self.oracle.alone([unit])).item()

    def baseline(self) -> Baseline:
        """Scores of the untouched and of the fully patched model, computed once.

        Raises:
            MeasurementError: A percentage of this baseline would mean nothing.
        """
        if self._baseline is None:
            clean = self.measure(self.known_clean[None], slice(0, len(self.prompts)))[0]
            patched = self.score(self.universe.empty()[None])[0]
            baseline = Baseline(clean, patched, self.metric.floor, self.metric.unit)
            baseline.check(self.metric)
            self._baseline = baseline
        return self._baseline

    @cached_property
    def known_clean(self) -> CleanLogits:
        """``clean_logits``, computed once."""
        return self.clean_logits()

    def measure(self, logits: StepLogits, rows: slice) -> Values:
        """The metric on logits of some prompts."""
        prompts = self.prompts.take(range(rows.start, rows.stop))
        clean = self.known_clean[rows].to(logits.device)
        return self.metric.score(logits, prompts, clean_logits=clean).float().cpu()

    def checked(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Masks:
        """Refuses what is no mask of this engine.

        Raises:
            MeasurementError: No mask, or masks of another universe.
        """
        if masks.ndim != 2 or masks.shape[1] != len(self.universe) or masks.dtype != torch.bool:
            raise MeasurementError(
                f"Masks must be a boolean table of masks x {len(self.universe)} units, found {tuple(masks.shape)} of {masks.dtype}. "
                "Make them with engine.universe."
            )
        if len(masks) == 0:
            raise MeasurementError("The list of masks is empty, so there is nothing to score. Give at least one mask.")
        if base is not None and (base.shape != masks.shape[1:] or base.dtype != torch.bool):
            raise MeasurementError(
                f"The base must be one mask of {len(self.universe)} units, found {tuple(base.shape)} of {base.dtype}. "
                "Make it with engine.universe."
            )
        return masks
