"""Many named masks scored on the same prompts, with intervals from the same resamples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError, MeasurementError
from circuitkit.core.shapes import Values
from circuitkit.engine.base import Engine
from circuitkit.evaluation.bootstrap import Interval, Resampled, resampled

Measured = dict[Hashable, Float[Tensor, " prompt"]]
"""The metric for each prompt, by the key of the mask."""


@dataclass(frozen=True)
class NamedMasks:
    """Masks that were made from one by small changes, so that what they share is computed once.

    Attributes:
        masks: By any key.
        base: The mask that they were made from; None where there is none.
    """

    masks: Mapping[Hashable, Bool[Tensor, " node"]]
    base: Bool[Tensor, " node"] | None = None


@dataclass(frozen=True)
class NamedScores:
    """What masks score, by key.

    Attributes:
        rows: Place of each key in the tables.
        values: The metric for each mask and prompt.
        table: Performance scores in %, and their resamples.
    """

    rows: Mapping[Hashable, int]
    values: Values
    table: Resampled

    def percent(self, key: Hashable) -> float:
        """Performance score in %."""
        return self.table.percents[self.rows[key]].item()

    def interval(self, key: Hashable) -> Interval:
        """Performance score in %, with its interval."""
        return self.table.interval(self.rows[key])

    def drop(self, key: Hashable, reference: Hashable | None = None) -> Interval:
        """Points below another mask, or below the untouched model."""
        return self.table.drop(self.rows[key], None if reference is None else self.rows[reference])

    def prompts(self, key: Hashable) -> Float[Tensor, " prompt"]:
        """The metric for each prompt."""
        return self.values[self.rows[key]]


def measured(engine: Engine, groups: Sequence[NamedMasks]) -> Measured:
    """The metric of every mask on every prompt; a call of the engine for each group.

    Raises:
        MeasurementError: A number is NaN or infinite, or a percentage of this baseline would mean nothing.
    """
    engine.baseline()
    found: Measured = {}
    for group in groups:
        if group.masks:
            found.update(zip(group.masks, engine.score(torch.stack(list(group.masks.values())), group.base), strict=True))
    broken = [key for key, values in found.items() if not values.isfinite().all()]
    if broken:
        raise MeasurementError(
            f"{len(broken)} of {len(found)} sets of components give NaN or infinite {engine.metric.name}. Load the model in float32 or "
            "bfloat16 (model.dtype), or take another patcher or metric."
        )
    return found


def scored(engine: Engine, found: Measured, *, resamples: int, confidence: float, seed: int) -> NamedScores:
    """What ``measured`` returned, as percentages with intervals. Raises as ``resampled``."""
    values = torch.stack(list(found.values()))
    table = resampled(engine.baseline(), values, resamples=resamples, confidence=confidence, seed=seed)
    return NamedScores({key: row for row, key in enumerate(found)}, values, table)


def member_mask(engine: Engine, circuit: Circuit, label: str) -> Bool[Tensor, " node"]:
    """The mask of a circuit that is to be evaluated.

    Raises:
        CircuitError: It is empty, of another level than the masks of the engine, or of another model.
    """
    circuit.check_fits(engine.model.n_layers, engine.model.n_heads, engine.model.name)
    mask = circuit.mask(engine.universe)
    if not circuit.members:
        least = "edge" if circuit.level.of_edges else "head or MLP"
        raise CircuitError(f"The circuit {label} is empty, so there is nothing to evaluate. Take one with at least one {least}.")
    return mask
