"""The cheap self-check at the start of every run: a number is only given if the engine agrees with the naive path."""

from __future__ import annotations

import logging

import torch

from circuitkit.core.errors import MeasurementError
from circuitkit.engine.base import Engine
from circuitkit.engine.reference import ReferenceEngine

_log = logging.getLogger(__name__)

N_PROMPTS, N_MASKS = 2, 3
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest difference of logits, relative to their spread. Half precision: 0.1, as kernels of other shapes round otherwise."""


def quick_check(engine: Engine) -> None:
    """Compares the engine with the naive path on a few prompts and random masks, and sees that patches change something.

    Raises:
        MeasurementError: They differ, or a patch had no effect.
    """
    prompts = engine.prompts.take(range(min(N_PROMPTS, len(engine.prompts))))
    small = type(engine)(engine.model, prompts, engine.patcher, engine.metric, engine.graph)
    oracle = ReferenceEngine(engine.model, prompts, engine.patcher, engine.metric, engine.graph)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(N_MASKS, len(engine.graph), generator=generator) < 0.8
    masks[0] = False
    expected = oracle.all_logits(masks)
    found = small.all_logits(masks)
    clean = oracle.clean_logits()
    if not clean.isfinite().all():
        raise MeasurementError(
            "The untouched model gives NaN or infinite logits, so no score can be given. Load it in float32 or bfloat16 (model.dtype) and "
            "check its weights."
        )
    if torch.equal(expected[0], clean):
        raise MeasurementError(
            f"Replacing every component with {type(engine.patcher).__name__} changed nothing: clean and corrupt prompts may be the same, or "
            "the patcher returns what it was given. No circuit can be found like this."
        )
    spread = clean.std().item()
    difference = max((found - expected).abs().max().item(), (small.clean_logits() - clean).abs().max().item()) / max(spread, 1e-12)
    tolerance = TOLERANCE.get(engine.model.dtype, 0.1)
    if not difference <= tolerance:
        raise MeasurementError(
            f"The engine and the naive path give different logits (difference {difference:.2g} of their spread, {tolerance:g} is allowed). "
            "Its numbers would be wrong. Run with engine=reference, and report this with the output of `circuitkit job=doctor`."
        )
    _log.info("Self-check: the engine agrees with the naive path to %.1e of the logits' spread.", difference)
