"""What half precision costs: scores in the model's dtype against float32, on a sample of a run's decisions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.errors import CircuitError, MeasurementError
from circuitkit.core.records import Step
from circuitkit.core.shapes import Masks
from circuitkit.core.universe import Universe
from circuitkit.engine.base import Engine
from circuitkit.engine.packed.memory import free_room, is_out_of_memory
from circuitkit.models.precision import as_float32, is_half, why_not_float32

_log = logging.getLogger(__name__)

N_MASKS, N_PROMPTS = 16, 64


@dataclass(frozen=True)
class Drift:
    """How far performance scores in half precision are from float32, in percentage points.

    Attributes:
        n_masks: Masks that were compared.
        n_prompts: On how many prompts.
        largest: The largest difference of a score.
        mean: The mean of the absolute differences.
        flipped: How many scores lie on the other side of the threshold in float32; 0 without a threshold.
    """

    n_masks: int
    n_prompts: int
    largest: float
    mean: float
    flipped: int

    @classmethod
    def between(cls, half: Float[Tensor, " mask"], single: Float[Tensor, " mask"], threshold: float | None, n_prompts: int) -> Drift:
        """Compares scores in %; ``threshold`` is a share, as methods have it."""
        apart = (half - single).abs()
        flipped = 0 if threshold is None else int(((half > 100 * threshold) != (single > 100 * threshold)).sum())
        return cls(len(half), n_prompts, apart.max().item(), apart.mean().item(), flipped)


def drift(engine: Engine, masks: Masks, *, threshold: float | None = None, n_prompts: int = N_PROMPTS) -> Drift:
    """Scores masks twice on the first prompts: in the model's dtype, and with its weights as float32 for as long as that takes.

    Args:
        engine: Of a run; it stays usable, and so does the model.
        masks: One row per mask.
        threshold: The share at which scores decide something, such as 0.8.
        n_prompts: Most prompts to score on.

    Raises:
        ModelError: The model is offloaded or quantised.
        MeasurementError: The model cannot do these few prompts, so that there is no score.
    """
    prompts = engine.prompts.take(range(min(n_prompts, len(engine.prompts))))
    half = engine.on(prompts).percent(masks)
    with as_float32(engine.model):
        single = engine.on(prompts).percent(masks)
    return Drift.between(half, single, threshold, len(prompts))


def drift_metrics(steps: Sequence[Step], engine: Engine, threshold: float | None = None) -> dict[str, float]:
    """The drift of a run, to log: on those of its decisions that were closest to the threshold, and on some from all over it.

    Args:
        steps: Of the run.
        engine: Of the run.
        threshold: Of its method, if it has one.

    Returns:
        Numbers under ``drift/``; none for a model that is no half precision or that cannot be converted, which the log says.
    """
    model = engine.model
    if not is_half(model):
        return {}
    reason = why_not_float32(model) or _too_large(engine)
    if reason:
        _log.info("Drift against float32 is not reported for %s: %s.", model.name, reason)
        return {}
    try:
        found = drift(engine, decisions(engine.universe, steps, threshold), threshold=threshold)
    except (MeasurementError, RuntimeError, MemoryError) as error:
        if not isinstance(error, MeasurementError) and not is_out_of_memory(error):
            raise
        _log.warning("Drift against float32 is not reported for %s: %s", model.name, error)
        return {}
    _log.info(
        "Drift: %d scores on %d prompts in %s differ from float32 by %.2g percentage points at most (mean %.2g). Decisions that flip: %d.",
        found.n_masks, found.n_prompts, model.dtype, found.largest, found.mean, found.flipped,
    )  # fmt: skip
    return {"drift/largest": found.largest, "drift/mean": found.mean, "drift/flipped": found.flipped, "drift/n": found.n_masks}


def decisions(universe: Universe, steps: Sequence[Step], threshold: float | None = None, n: int = N_MASKS) -> Masks:
    """Masks that a run scored: half of them those whose scores were closest to the threshold, half spread evenly over the others.

    Steps that name no node of the universe, such as draws of random circuits, cannot be taken up again; random masks stand in for them.
    """
    try:
        scored = replayed(universe, steps)
    except CircuitError:
        scored = []
    if not scored:
        keep = torch.linspace(0.5, 0.98, n)[:, None]
        return torch.rand(n, len(universe), generator=torch.Generator().manual_seed(0)) < keep
    order = list(range(len(scored)))
    if threshold is not None:
        order.sort(key=lambda place: abs(steps[place].score - 100 * threshold))
    closest, others = order[: n // 2], sorted(order[n // 2 :])
    wanted = min(n - n // 2, len(others))
    spread = [others[place * len(others) // wanted] for place in range(wanted)]
    return torch.stack([scored[place] for place in sorted({*closest, *spread})])


def replayed(universe: Universe, steps: Sequence[Step]) -> list[Tensor]:
    """The mask that each step scored: single removals from what all of them name, or removals that build on each other.

    Raises:
        CircuitError: A step names no node of the universe.
    """
    single = bool(steps) and steps[0].direction == "single"
    mask = universe.mask(step.node for step in steps) if single else universe.full()
    scored = []
    for step in steps:
        trial = universe.without(mask, [step.node])
        scored.append(trial)
        if not single and not step.kept:
            mask = trial
    return scored


def _too_large(engine: Engine) -> str:
    """Why the weights do not fit as float32, if they do not. They take twice what they take now."""
    more = sum(parameter.numel() * parameter.itemsize for parameter in engine.model.hf.parameters())
    free = free_room(engine.model)
    return f"its weights take {more / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free" if 1.2 * more > free else ""
