"""Every engine gives the gradients over its own universe."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import planted_model, planted_prompts, random_masks

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError
from circuitkit.engine import PackedEngine, ReferenceEngine
from circuitkit.metrics import Accuracy, LogitDiff
from circuitkit.patchers import Mean, Resample


@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("over", ["nodes", "edges", "edges of a circuit"])
def test_the_differentiable_forward_is_the_engines_own_score(engine_class, over):
    """At masks of zeros and ones; with another patcher outside of the circuit than for edges."""
    engine = engine_class(planted_model(), planted_prompts(), Mean(), LogitDiff())
    if over != "nodes":
        circuit = Circuit.of(engine.universe, random_masks(1, len(engine.universe), seed=2)[0]) if over == "edges of a circuit" else None
        engine = engine.edges(circuit, patcher=Resample())
    masks = random_masks(3, len(engine.universe), seed=1)
    expected = engine.score(masks).mean(-1)
    torch.testing.assert_close(engine.gradients().loss(masks.float()).float(), expected, rtol=1e-4, atol=1e-4)


def test_a_metric_that_counts_has_no_gradient():
    with pytest.raises(MeasurementError, match="accuracy counts, so it has no gradient. Take a metric"):
        PackedEngine(planted_model(), planted_prompts(), Mean(), Accuracy()).gradients()
