"""What a method takes from the steps of an earlier process instead of scoring it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.records import Step
from circuitkit.core.shapes import Masks
from circuitkit.engine.base import Engine


def scored_in_parts(
    engine: Engine, parts: Iterable[Masks], history: Sequence[Step], base: Bool[Tensor, " node"] | None = None
) -> Iterator[float]:
    """Performance scores of masks, part by part, so that steps are told while the others are still being scored.

    A part of which every score is known is not computed; one that was cut short is computed whole, as it was before, so that its scores
    are the same to the last bit.

    Args:
        engine: Scores masks.
        parts: The masks, a row each, as they are to be scored together.
        history: Steps of an earlier process, one for each mask from the first on.
        base: The mask from which all were made by small changes, if there is one.
    """
    done = 0
    for part in parts:
        known = history[done : done + len(part)]
        done += len(part)
        yield from [step.score for step in known] if len(known) == len(part) else engine.percent(part, base).tolist()
