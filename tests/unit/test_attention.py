"""Patterns of every family, held against attention computed here; and the implementation afterwards."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from models_for_tests import FAMILIES, failing, same_state, state_of, tiny_model

from circuitkit.core.errors import ModelError
from circuitkit.models import tiny
from circuitkit.models.attention import attention_patterns, attention_tensors, eager_attention
from circuitkit.models.hooked import HookedModel

IDS = torch.randint(0, 23, (3, 6), generator=torch.Generator().manual_seed(0))


def fused(family: str):
    return tiny_model(family, attention="eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_one_and_nobody_sees_what_comes_later(family):
    model = fused(family)
    patterns = attention_patterns(model, IDS)
    assert patterns.shape == (3, 3, 2, 6, 6) and patterns.dtype == torch.float32
    assert torch.allclose(patterns.sum(-1), torch.ones(3, 3, 2, 6), atol=1e-5)
    assert (patterns.triu(1) == 0).all() and (patterns >= 0).all()
    assert patterns.std() > 0.05, "uniform patterns would pass the rest"


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_patterns_that_transformers_gives(family):
    model = fused(family)
    eager = tiny_model(family, attention="eager")
    expected = torch.stack(eager.hf(IDS, output_attentions=True, use_cache=False).attentions)
    assert torch.equal(attention_patterns(model, IDS), expected)
    assert torch.equal(attention_patterns(model, IDS, [2, 0, -1]), expected[[2, 0, 2]])


def test_the_pattern_is_softmax_of_queries_and_keys():
    """By hand, for the first layer of GPT-2."""
    model = fused("gpt2")
    wte, wpe = model.hf.transformer.wte.weight, model.hf.transformer.wpe.weight
    block = model.hf.transformer.h[0]
    q, k, _ = block.attn.c_attn(block.ln_1(wte[IDS] + wpe[:6])).split(8, -1)
    q, k = (each.view(3, 6, 2, 4).transpose(1, 2) for each in (q, k))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    assert torch.allclose(attention_patterns(model, IDS, [0])[0], scores.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_the_model_is_afterwards_as_it_was_bit_for_bit(family, caplog):
    model = fused(family)
    before, logits = state_of(model), model.run(IDS, keep=0)
    with caplog.at_level(logging.INFO, logger="circuitkit"):
        attention_patterns(model, IDS)
    assert model.attention == "sdpa" == model.hf.config._attn_implementation
    assert torch.equal(model.run(IDS, keep=0), logits) and same_state(before, state_of(model))
    assert [record.getMessage() for record in caplog.records if "eagerly" in record.getMessage()] == [
        f"sdpa does not keep attention patterns: tiny-{family} computes attention eagerly while they are read."
    ]


def test_the_implementation_is_restored_after_an_error():
    model = fused("llama")
    logits = model.run(IDS, keep=0)
    with failing(model.module(1, "mlp"), ZeroDivisionError("half-way")), pytest.raises(ZeroDivisionError):
        attention_patterns(model, IDS)
    assert model.attention == "sdpa"
    assert torch.equal(model.run(IDS, keep=0), logits)
    with pytest.raises(KeyError), eager_attention(model):
        assert model.attention == "eager"
        raise KeyError
    assert model.attention == "sdpa"


def test_an_eager_model_is_left_alone(caplog):
    model = tiny_model("llama", attention="eager")
    with caplog.at_level(logging.INFO, logger="circuitkit"):
        attention_patterns(model, IDS)
    assert model.attention == "eager" and not caplog.records


def test_only_the_layers_that_are_needed_are_computed():
    model = fused("gpt2")
    with failing(model.module(2, "attention"), AssertionError("this layer was not asked for")):
        assert attention_patterns(model, IDS, [1]).shape == (1, 3, 2, 6, 6)


@pytest.mark.parametrize(("layers", "text"), [([3], "layers 0 to 2, found layer 3"), ([0, -4], "found layer -4"), ([], "is empty")])
def test_layers_that_are_not_there(layers, text):
    with pytest.raises(ModelError, match=text):
        attention_patterns(fused("gpt2"), IDS, layers)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_what_attention_sees_makes_the_pattern_and_what_the_heads_give(family):
    """By hand from queries, keys and values as attention sees them: softmax of their products, and its sums of values."""
    model = tiny_model(family)
    seen = attention_tensors(model, IDS)
    assert list(seen) == [0, 1, 2]
    kept = {}
    model.run(IDS, lambda layer: kept.update({layer.index: layer.z}))
    patterns = attention_patterns(model, IDS)
    for layer, one in seen.items():
        group = model.n_heads // one.k.shape[1]
        k, v = (part.repeat_interleave(group, 1) for part in (one.k, one.v))
        scale = model.hf.config.query_pre_attn_scalar**-0.5 if family == "gemma2" else model.d_head**-0.5
        scores = scale * one.q @ k.transpose(-1, -2)
        if family == "gemma2":
            scores = 50 * torch.tanh(scores / 50)
        n_pos = IDS.shape[1]
        scores = scores.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), one.pattern, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.pattern, patterns[layer], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close((one.pattern @ v).transpose(1, 2), one.z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.z, kept[layer], atol=1e-5, rtol=1e-5)


def test_attention_that_is_another_one_where_it_is_watched_is_refused():
    """DeepSeek's sparse attention drops what its index leaves out, but not where attention is watched."""
    model = HookedModel(tiny.tiny_model("deepseek_v32"))
    with pytest.raises(ModelError, match="gives other logits where its attention is watched"):
        attention_tensors(model, torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0)))


def test_attention_that_cannot_be_watched_is_refused():
    model = tiny_model("gpt2")
    model.map = replace(model.map, interface=False)
    with pytest.raises(ModelError, match="does not go through transformers' attention interface"):
        attention_tensors(model, IDS)
