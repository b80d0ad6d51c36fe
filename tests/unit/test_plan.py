"""The plan is what runs: a dry run makes the very passes that the real one makes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from circuitkit.core.circuit import Circuit
from circuitkit.core.prompts import PromptSet
from circuitkit.engine import PackedEngine
from circuitkit.engine.cost import Cost, DryEngine, cost, measured_rates, memory
from circuitkit.methods import EdgePruning, IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models import HookedModel, load_shape
from circuitkit.patchers import Mean, Zero

CONFIGS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=60, bos_token_id=0, eos_token_id=0)),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=60),
    ),
}


def models(family: str) -> tuple[HookedModel, HookedModel]:
    kind, config = CONFIGS[family]
    torch.manual_seed(0)
    real = HookedModel(kind(copy.deepcopy(config)), name=family)
    with torch.device("meta"):
        return real, HookedModel(kind(copy.deepcopy(config)), name=family)


def prompt_set(model: HookedModel) -> PromptSet:
    clean, corrupt = torch.randint(0, 60, (2, 6, 8), generator=torch.Generator().manual_seed(1))
    logits = model.run(clean)[:, -1]
    return PromptSet(clean, corrupt, logits.argmax(-1), logits.argmin(-1), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("patcher", [Mean(), Mean("conditional"), Zero()], ids=["plain", "conditional", "zero"])
@pytest.mark.parametrize("max_rows", [None, 4])
def test_dry_run_makes_the_passes_of_the_real_one(family, patcher, max_rows):
    real, shape = models(family)
    prompts = prompt_set(real)
    engine = PackedEngine(real, prompts, patcher, LogitDiff(), max_rows=max_rows or 1000)
    dry = DryEngine(shape, prompts, patcher, LogitDiff(), max_rows=max_rows or 1000)
    work = []
    for each in (engine, dry):
        each.baseline()
        Knockout().discover(each, on_step=lambda step: None)
        work.append(each.work)
    assert work[0] == work[1]
    assert work[0].passes > 0


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("max_rows", [1000, 4])
def test_dry_run_makes_the_passes_of_a_real_edge_stage(family, max_rows):
    real, shape = models(family)
    prompts = prompt_set(real)
    circuit = Circuit.of(real.universe, torch.arange(len(real.universe)) % 3 > 0, model=family)
    method = EdgePruning(circuit, threshold=1e-6)  # far from any score, so that the real run asks no oracle
    work, steps = [], []
    for kind, model in ((PackedEngine, real), (DryEngine, shape)):
        engine, told = kind(model, prompts, Mean(), LogitDiff(), max_rows=max_rows), []
        engine.baseline()
        method.discover(method.over(engine), on_step=told.append)
        work.append(engine.work)
        steps.append([step.node for step in told])
    assert work[0] == work[1] and steps[0] == steps[1]


@pytest.mark.parametrize(("assume", "n_kept"), [(100.0, 0), (0.0, 15)])
def test_assumed_scores_decide_a_dry_search(assume, n_kept):
    real, shape = models("gpt2")
    dry = DryEngine(shape, prompt_set(real), Mean(), LogitDiff(), assume=assume)
    assert len(IterativePruning().discover(dry, on_step=lambda step: None)) == n_kept


def test_flops_of_a_dry_run_are_those_of_a_real_one_up_to_uncounted_attention():
    real, shape = models("gpt2")
    prompts, counts = prompt_set(real), []
    for engine in (
        PackedEngine(real, prompts, Zero(), LogitDiff(), max_rows=1000),
        DryEngine(shape, prompts, Zero(), LogitDiff(), max_rows=1000),
    ):
        with FlopCounterMode(display=False) as counter:
            engine.baseline()
            Knockout().discover(engine, on_step=lambda step: None)
        counts.append(counter.get_total_flops())
    # The CPU's fused attention kernel is not in torch's table of FLOPs; its products are a few per cent here.
    assert counts[0] <= counts[1] <= 1.25 * counts[0]


def test_cost_sums_up_and_time_is_bound_by_the_slower_of_arithmetic_and_memory():
    real, shape = models("gpt2")
    dry = DryEngine(shape, prompt_set(real), Zero(), LogitDiff(), max_rows=1000)
    dry.baseline()
    total = cost(dry, evaluations=2, flops=10**9)
    weights = sum(parameter.numel() * 4 for parameter in real.hf.parameters())
    assert (total.evaluations, total.passes, total.flops) == (2, dry.work.passes, 10**9)
    assert total.memory.peak > total.memory.weights == weights
    assert Cost(1, 1, 1, 100, 1, 0).seconds(10, 10) == 10
    assert Cost(1, 1, 1, 1, 100, 0).seconds(10, 5) == 20


def test_memory_counts_the_weights_that_are_copied_for_single_heads(monkeypatch):
    """By hand, 3 layers of d_model 32: GPT-2's projections are 32 x 96 and 32 x 32; and a row of 8 x 32 that the other heads add."""
    _, shape = models("gpt2")
    prompts = prompt_set(models("gpt2")[0])
    assert memory(DryEngine(shape, prompts, Zero(), LogitDiff(), max_rows=1)).slices == 0, "narrow models are not sliced"
    monkeypatch.setattr("circuitkit.models.slices.WORTH_FROM", 32)
    dry = DryEngine(shape, prompts, Zero(), LogitDiff(), max_rows=1)
    found = memory(dry)
    assert found.slices == 3 * (32 * 96 + 32 * 32) * 4 + 3 * 8 * 32 * 4
    assert found.peak == found.weights + found.slices + found.states + found.rows * found.a_row + found.logits
    Knockout().discover(dry, on_step=lambda step: None)
    held = dry._sliced._slices._held.values()
    assert 0 < sum(weight.nbytes for _, weight, _ in held) <= found.slices, "what is really held stays below"


def test_shape_of_a_zoo_model_has_no_weights_and_rates_are_positive():
    shape = load_shape("tiny_llama")
    assert all(parameter.device.type == "meta" for parameter in shape.hf.parameters())
    assert (shape.n_layers, shape.n_heads) == (4, 8)
    assert all(rate > 0 for rate in measured_rates(torch.device("cpu"), torch.float32, size=64))
