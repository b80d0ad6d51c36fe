"""Slices of the attention's weights: the same products, fewer of them, and nothing else that changes."""

from __future__ import annotations

import copy

import pytest
import torch
from models_for_tests import FAMILIES, shared_model, solvable_prompts, tiny_model, tiny_prompts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from circuitkit.core.errors import MeasurementError
from circuitkit.engine.cost import DryEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.quick import quick_check
from circuitkit.metrics import LogitDiff
from circuitkit.models import HookedModel, slices
from circuitkit.models.slices import HeadSlices
from circuitkit.patchers import Mean, Zero

N, POS, LAYERS, HEADS, D_HEAD = 6, 5, 3, 2, 4
D = HEADS * D_HEAD


@pytest.fixture()
def always(monkeypatch):
    """Slices are used in models of any width."""
    monkeypatch.setattr(slices, "WORTH_FROM", 0)


def engine(**settings) -> PackedEngine:
    model = shared_model("gpt2", LAYERS, HEADS)
    return PackedEngine(model, solvable_prompts(model, N, POS), Mean(), LogitDiff(), **settings)


def test_a_norm_of_all_heads_together_needs_all_of_them():
    assert HeadSlices.possible(tiny_model("llama")) and not HeadSlices.possible(tiny_model("olmo2"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmo2"])
def test_slices_give_what_the_modules_give(family):
    model = tiny_model(family)
    sliced, resid = HeadSlices(model), torch.randn(3, 4, model.d_model)
    whole = model.queries_keys_values(1, resid)
    with torch.no_grad():
        read = model.module(1, "attention_norm")(resid)
    for heads in ((0,), (model.n_heads - 1,), tuple(range(model.n_heads))):
        of_kv = sliced.read_heads(heads)
        keys, values = sliced.keys_values(1, of_kv, read)
        if family != "qwen3":  # its queries and keys are normed behind the projection, here and there
            torch.testing.assert_close(sliced.queries(1, heads, read), whole[0][:, :, list(heads)])
        torch.testing.assert_close(keys, whole[1][:, :, list(of_kv)])
        torch.testing.assert_close(values, whole[2][:, :, list(of_kv)])
    z = torch.randn(3, 4, model.n_heads, model.d_head)
    parts = sum(sliced.out(1, (head,), z[:, :, [head]]) for head in range(model.n_heads))
    bias = sliced.bias(1)
    torch.testing.assert_close(parts if bias is None else parts + bias, model.project(1, z))


def test_flops_of_a_mask_are_those_of_the_heads_that_are_in(always, monkeypatch):
    """Layer 1 leaves one head out, and layer 2 asks its queries at the last position only; layer 0 is where the mask starts."""
    counted = []
    for width in (0, 10**6):
        monkeypatch.setattr(slices, "WORTH_FROM", width)
        fast = engine()
        graph = fast.universe
        first, second = (graph.without(graph.full(), [head, "a1.h1"]) for head in ("a0.h0", "a0.h1"))
        fast.score(first[None], graph.full())  # what a1.h1 adds instead is computed here, once
        with FlopCounterMode(display=False) as counter:
            fast.score(second[None], graph.full())
        counted.append(counter.get_total_flops())
    a_head = 2 * D * D_HEAD  # one of query, key, value and output, a token
    assert counted[1] - counted[0] == N * POS * 4 * a_head + N * (POS - 1) * HEADS * a_head


@pytest.mark.parametrize("patcher", [Mean(), Mean("conditional"), Zero()], ids=["plain", "conditional", "zero"])
def test_a_dry_run_counts_the_same(always, patcher):
    config = GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=60, bos_token_id=0, eos_token_id=0)
    real = HookedModel(GPT2LMHeadModel(copy.deepcopy(config)), name="gpt2")
    with torch.device("meta"):
        shape = HookedModel(GPT2LMHeadModel(copy.deepcopy(config)), name="gpt2")
    prompts = tiny_prompts(6, 8, 1, 0)
    masks = torch.rand(5, len(real.universe), generator=torch.Generator().manual_seed(0)) < 0.4
    counted = []
    for kind, model in ((PackedEngine, real), (DryEngine, shape)):
        each = kind(model, prompts, patcher, LogitDiff(), max_rows=1000)
        with FlopCounterMode(display=False) as counter:
            for mask in masks:
                for _ in each.passes(mask[None]):
                    pass
        products = counter.get_flop_counts()["Global"]
        # Attention is left out: without content it is computed by another kernel, which the counter sees.
        counted.append((products[torch.ops.aten.mm], products[torch.ops.aten.addmm], each.work))
    assert counted[0] == counted[1]


@pytest.mark.parametrize("part", ["queries", "out"])
def test_the_self_check_catches_wrong_slices(always, monkeypatch, part):
    quick_check(engine())
    right = getattr(HeadSlices, part)
    monkeypatch.setattr(HeadSlices, part, lambda self, layer, heads, act: 1.5 * right(self, layer, heads, act))
    with pytest.raises(MeasurementError, match="different logits"):
        quick_check(engine())


def test_narrow_models_compute_all_heads_as_before():
    assert engine()._sliced is None


class Lora(nn.Linear):
    """Not a plain matrix. Final."""


def test_only_plain_float32_matrices_are_sliced():
    assert HeadSlices.possible(tiny_model("llama"))
    model = tiny_model("llama")
    model.hf.bfloat16()
    assert not HeadSlices.possible(model)
    model = tiny_model("llama")
    model.module(1, "out_proj").__class__ = Lora
    assert not HeadSlices.possible(model)
