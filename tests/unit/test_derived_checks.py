"""Checks of addends, edges and gradients: they pass where all is right, and each finds what is broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models_for_tests import tiny_model

from circuitkit.core.node import Node
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof import derived
from circuitkit.engine.proof.doctor import Patient
from circuitkit.metrics import LogitDiff
from circuitkit.models.checks import random_prompts
from circuitkit.models.hooked import Layer
from circuitkit.patchers import Mean, Resample, Zero


@pytest.fixture(scope="module")
def patient():
    model = tiny_model("llama", n_layers=2, n_heads=2)
    prompts = random_prompts(model, n=2, n_pos=5)
    return Patient(model, prompts, Zero(), Resample(), Mean(), Mean("conditional"), LogitDiff(), PackedEngine)


@pytest.mark.parametrize("check", derived.DERIVED_CHECKS, ids=lambda check: check.__name__)
def test_a_healthy_model_passes_by_far(patient, check):
    found = check(patient)
    assert found.passed and found.name == check.__name__
    assert 0 <= found.difference < found.tolerance / 5


def test_addends_that_do_not_sum_are_found(patient, monkeypatch):
    right = Layer.mlp_out
    monkeypatch.setattr(Layer, "mlp_out", property(lambda self: right.fget(self) * 0.7, right.fset))
    assert not derived.addends(patient).passed


class Doubled(PackedEngine):
    """Gradients twice as large as they are, and edges with another metric's sign."""

    def gradients(self):
        right = super().gradients()
        grad = right.grad
        right.grad = lambda *a, **k: 2 * grad(*a, **k)
        return right

    def edges(self, circuit=None, **options):
        found = super().edges(circuit, **options)
        alone = found.alone
        found.alone = lambda units, **k: -alone(units, **k)
        return found


@pytest.mark.parametrize("check", [derived.edges, derived.gradients], ids=lambda check: check.__name__)
def test_a_wrong_engine_is_found(patient, check):
    assert not check(replace(patient, engine=Doubled)).passed


def test_a_soft_mask_mixes_by_hand():
    node = Node.of_head(0, 1)
    act, source = torch.tensor([[4.0]]), torch.tensor([[8.0]])
    assert derived.Soft(Zero(), {node: 0.25}).value(act, None, node).item() == 1.0
    soft = derived.Soft(Resample(), {node: 0.25})
    assert soft.value(act, source, node).item() == 7.0 and soft.needs == Resample().needs and soft.reads_activation
