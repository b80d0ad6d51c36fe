"""Really trained models and the real tasks: the fast engine and the naive one take every decision of a whole search alike."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from circuitkit.engine.filtering import Solves
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models.loading import load_model
from circuitkit.patchers import Mean
from circuitkit.tasks import Months, Numerals, Numwords

MODELS = ("tiny_gpt2", "tiny_llama")
TASKS = {"numerals": Numerals, "numwords": Numwords, "months": Months}


@lru_cache
def zoo(name: str):
    return load_model(name, device_map="cpu")


@lru_cache
def prompts_for(model: str, task: str, n: int = 8):
    return TASKS[task](n=n).prompts(zoo(model).tokenizer, accept=Solves(zoo(model)))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def searched(engine):
    steps = []
    circuit = IterativePruning(0.8).discover(engine, on_step=steps.append)
    return circuit, steps


@pytest.mark.parametrize("means", ["plain", "conditional"])
@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("model", MODELS)
def test_every_decision_of_a_search(model, task, means):
    parts = (zoo(model), prompts_for(model, task), Mean(means), LogitDiff())
    fast_circuit, fast = searched(PackedEngine(*parts))
    naive_circuit, naive = searched(ReferenceEngine(*parts))
    assert [(step.node, step.kept) for step in fast] == [(step.node, step.kept) for step in naive]
    assert [step.score for step in fast] == pytest.approx([step.score for step in naive], abs=1e-2)
    assert fast_circuit.names == naive_circuit.names
    assert 0 < len(fast_circuit) < len(parts[0].universe)
    assert fast_circuit.score > 80


@pytest.mark.parametrize("model", MODELS)
def test_a_knockout_map(model):
    parts = (zoo(model), prompts_for(model, "numerals"), Mean(pool="group"), LogitDiff())
    fast, naive = (Knockout().discover(engine, on_step=lambda step: None) for engine in (PackedEngine(*parts), ReferenceEngine(*parts)))
    assert fast.values == pytest.approx(naive.values, abs=1e-2)
    assert min(fast.values.values()) < 80 < max(fast.values.values())
