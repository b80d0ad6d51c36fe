"""How far a performance score would vary with other prompts of the same kind: the bootstrap of a ratio of means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.bodies import Estimate
from circuitkit.core.errors import ConfigError
from circuitkit.core.shapes import Values
from circuitkit.engine.base import Baseline
from circuitkit.metrics.base import Floor

_AT_ONCE = 2**24  # counts held at a time: 128 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it.

    Attributes:
        value: The estimate from all prompts.
        low: Lower end; None where the prompts are too few or too noisy for an interval.
        high: Upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None

    def plain(self) -> Estimate:
        """As it is written into a finding."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Resampled:
    """Scores of masks, from all prompts and from each resample of the prompts.

    Attributes:
        percents: Performance scores in %.
        draws: The same from each resample; every mask sees the same resamples, so that differences can be taken.
        confidence: Share of the draws that an interval holds.
    """

    percents: Float[Tensor, " mask"]
    draws: Float[Tensor, "mask resample"]
    confidence: float

    def interval(self, mask: int) -> Interval:
        """The score of one mask, in %."""
        return self._interval(self.percents[mask], self.draws[mask])

    def drop(self, mask: int, reference: int | None = None) -> Interval:
        """How many points one mask scores below another, or below the untouched model's 100 %."""
        if reference is None:
            return self._interval(100 - self.percents[mask], 100 - self.draws[mask])
        return self._interval(self.percents[reference] - self.percents[mask], self.draws[reference] - self.draws[mask])

    def _interval(self, value: Float[Tensor, ""], draws: Float[Tensor, " resample"]) -> Interval:
        if not draws.isfinite().all():
            return Interval(value.item(), None, None)
        tail = (1 - self.confidence) / 2
        low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
        return Interval(value.item(), low, high)


def resampled(baseline: Baseline, values: Values, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Resampled:
    """Percentile bootstrap over prompts of the performance score, which is a ratio of means.

    Each resample draws as many prompts as there are, with replacement, and takes all means anew: of the masks, of the untouched model,
    and of the fully patched model where that is what counts as 0 %. No interval is given for fewer than two prompts, nor where a
    resample's untouched model is no better than its zero point, because the score of such a resample means nothing.

    Args:
        baseline: What scores are held against, on the same prompts.
        values: The metric for each mask and prompt.
        resamples: How many.
        confidence: Share of the resamples that an interval holds, in (0, 1).
        seed: Of the draws.

    Raises:
        ConfigError: No resamples, or a confidence outside of (0, 1).
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ConfigError(f"resamples must be at least 1 and confidence in (0, 1); found resamples={resamples}, confidence={confidence}.")
    n_masks, n_prompts = values.shape
    columns = torch.cat([baseline.clean[None], baseline.patched[None], values]).double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for part in torch.arange(resamples).split(max(1, _AT_ONCE // n_prompts)):
        chosen = torch.randint(n_prompts, (len(part), n_prompts), generator=generator)
        counts = torch.zeros(chosen.shape, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(counts))
        means.append(columns @ counts.T / n_prompts)
    clean, patched, masked = torch.cat(means, dim=1).split([1, 1, n_masks])
    zero = patched if baseline.floor is Floor.ABLATED else torch.zeros_like(patched)
    span = clean - zero
    is_sound = (span * (baseline.clean.double().mean() - baseline.zero) > 0) & (n_prompts > 1)
    draws = torch.where(is_sound, 100 * (masked - zero) / span, torch.nan)
    return Resampled(baseline.percent(values), draws, confidence)
