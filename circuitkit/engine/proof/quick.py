"""The cheap self-check at the start of every run: a number is only given if the engine agrees with the naive path.

All checks, with a table of what they found, are in ``doctor.py``.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Masks, StepLogits
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine
from circuitkit.engine.nodes import NodeEngine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.models.checks import called, relative, tolerance

_log = logging.getLogger(__name__)

N_PROMPTS = 2


def quick_check(engine: NodeEngine) -> None:
    """Compares the engine with the naive path on a few prompts and masks, and sees that patches change something.

    Raises:
        MeasurementError: They differ, a patch had no effect, or logits are not finite.
    """
    patcher = type(engine.patcher).__name__
    prompts = few(engine)
    fired = called(engine.model, prompts)
    if not fired.passed:
        raise MeasurementError(
            f"Patches would not fire where they should: {fired.detail}, expected once. This model is not built as the map of its "
            "parts says; report it with the output of `circuitkit job=doctor`."
        )
    oracle = ReferenceEngine(engine.model, prompts, engine.patcher, engine.metric, engine.universe, engine.featurizers)
    clean = oracle.clean_logits().cpu()
    if not clean.isfinite().all():
        raise MeasurementError(
            "The untouched model gives NaN or infinite logits, so no score can be given. Load it in float32 or bfloat16 (model.dtype) and "
            "check its weights."
        )
    masks = _masks(engine.universe)
    expected = oracle.all_logits(masks)
    if not expected.isfinite().all():
        raise MeasurementError(
            f"Components replaced by what {patcher} gives lead to NaN or infinite logits, so no score can be given. Expected finite values "
            "of the patcher; if it is right, load the model in float32 or bfloat16 (model.dtype)."
        )
    _check_effect(engine, expected, clean)
    difference = _difference(engine, prompts, masks, expected, clean)
    allowed = tolerance(engine.model)
    if not difference <= allowed:
        raise MeasurementError(
            f"The engine and the naive path give different logits (difference {difference:.2g} of their spread, {allowed:g} is allowed). "
            "Its numbers would be wrong. Run with engine=reference, and report this with the output of `circuitkit job=doctor`."
        )
    _log.info("Self-check: the engine agrees with the naive path to %.1e of the logits' spread.", difference)


def few(engine: Engine) -> PromptSet:
    """The first prompts whose corrupt twin differs.

    Raises:
        MeasurementError: None does, and the patcher takes something from them.
    """
    prompts = engine.prompts
    different = (prompts.clean != prompts.corrupt).any(-1)
    same = len(prompts) - int(different.sum())
    if engine.patcher.needs.source != "none" and same == len(prompts):
        raise MeasurementError(
            f"All {same} corrupt prompts are the same as their clean twins, so what {type(engine.patcher).__name__} takes from them still "
            "holds the answer. Expected corrupt prompts without it; take a task or a corruption that changes the prompts."
        )
    if engine.patcher.needs.source == "run" and same:
        _log.warning("%d of %d corrupt prompts are the same as their clean twins: patches change nothing there.", same, len(prompts))
    rows = different.nonzero().flatten() if different.any() else torch.arange(len(prompts))
    others = rows[prompts.lengths[rows] != prompts.lengths[rows[0]]]  # of another length, so that padding is looked at too
    return prompts.take(torch.cat([rows[:1], others[:1], rows[1:]])[:N_PROMPTS])


def _masks(universe: NodeUniverse) -> Masks:
    """Nothing kept, only MLPs, only heads, a random half, and one each without some unit late and half-way in the model."""
    is_mlp = universe.empty()
    is_mlp[universe.places_of(Kind.MLP)[0]] = True
    half = torch.rand(len(universe), generator=torch.Generator().manual_seed(0)) < 0.5
    late, midway = universe.full(), universe.full()
    late[-1], midway[len(universe) // 2] = False, False
    return torch.stack([universe.empty(), is_mlp, ~is_mlp, half, midway, late])


def _check_effect(engine: NodeEngine, expected: StepLogits, clean: CleanLogits) -> None:
    """A patch that changes nothing is an error, and not a null result. Rows of ``expected`` are those of ``_masks``."""
    patcher = type(engine.patcher).__name__
    if torch.equal(expected[0], clean):
        raise MeasurementError(
            f"Replacing every component with {patcher} changed nothing: it gives back what the components compute anyway. Expected other "
            "values of its `patch`; no circuit can be found like this."
        )
    for name, kind, logits in (("heads", Kind.HEAD, expected[1]), ("MLPs", Kind.MLP, expected[2])):
        if kind in engine.universe.kinds and torch.equal(logits, clean):
            _log.warning("Replacing all %s with %s changed nothing: a search will remove them without cost.", name, patcher)


def _difference(engine: NodeEngine, prompts: PromptSet, masks: Masks, expected: StepLogits, clean: CleanLogits) -> float:
    """The largest difference between engine and naive path: masks at once, then each from states that are held for the full model."""
    small: NodeEngine = engine.on(prompts)
    pairs: list[tuple[Tensor, Tensor]] = [(small.clean_logits().cpu(), clean)]
    pairs += zip(small.all_logits(masks), expected, strict=True)
    # Alone, since only then are heads left uncomputed that this mask removes and another keeps.
    pairs += zip(small.all_logits(masks[3:4]), expected[3:4], strict=True)
    for chosen, rows, logits in small.passes(masks[-2:], engine.universe.full()):
        pairs += [(one.cpu(), expected[4 + place, rows]) for place, one in zip(chosen.tolist(), logits, strict=True)]
    differences = torch.tensor([relative(found, wanted) for found, wanted in pairs], dtype=torch.float64)
    return differences.max().item()
