"""Logits of the tokens that a metric reads, and of no others: the same scores, and less work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from circuitkit.core.token_sets import TokenSets
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.metrics import KL, LogitDiff, ProbDiff
from circuitkit.models.checks import random_prompts
from circuitkit.patchers import Mean


@given(st.lists(st.dictionaries(st.integers(0, 40), st.floats(0.5, 2), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_renumbered_sets_read_the_same_logits(sets):
    sets = TokenSets.of(sets)
    tokens = sets.ids[sets.weights > 0].unique()
    again = sets.renumbered(tokens)
    real = sets.weights > 0
    assert torch.equal(tokens[again.ids][real], sets.ids[real])
    assert torch.equal(again.weights, sets.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_naive_path(family):
    model = tiny_model(family, vocab=120)
    prompts = random_prompts(model, n=3, n_pos=6)
    engine = PackedEngine(model, prompts, Mean(), LogitDiff())
    assert engine._asked is not None and len(engine._asked) <= 6
    masks = torch.rand(8, len(model.universe), generator=torch.Generator().manual_seed(0)) < 0.7
    expected = ReferenceEngine(model, prompts, Mean(), LogitDiff()).score(masks)
    torch.testing.assert_close(engine.score(masks), expected, atol=2e-6 * expected.std().item() + 1e-6, rtol=1e-5)


def test_metrics_that_read_all_tokens_get_all():
    model = tiny_model("llama", vocab=120)
    prompts = random_prompts(model, n=3, n_pos=6)
    for metric in (ProbDiff(), KL()):
        assert PackedEngine(model, prompts, Mean(), metric)._asked is None


def test_where_many_tokens_are_asked_of_all_are_unembedded():
    model = tiny_model("llama", vocab=24)
    assert PackedEngine(model, random_prompts(model, n=4, n_pos=6), Mean(), LogitDiff())._asked is None


def test_fewer_products():
    model = tiny_model("llama", vocab=2000)
    prompts = random_prompts(model, n=2, n_pos=6)
    engine = PackedEngine(model, prompts, Mean(), LogitDiff())
    mask = model.universe.empty()[None]
    engine.score(mask)  # what is made once
    with FlopCounterMode(display=False) as few:
        engine.score(mask)
    with FlopCounterMode(display=False) as all_tokens:
        for _ in engine.passes(mask):
            pass
    assert all_tokens.get_total_flops() - few.get_total_flops() == 2 * 2 * model.d_model * (2000 - len(engine._asked))
