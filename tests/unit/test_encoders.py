"""Encoders: positions read later ones, and the scored position is that of the mask token."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models_for_tests import VOCAB, difference, engines, logits_of, random_masks
from transformers import AutoModelForMaskedLM, ModernBertConfig

from circuitkit.core.errors import ModelError
from circuitkit.core.prompts import PromptSet
from circuitkit.evaluation.generation import generate
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero

MASK = 3


@cache
def encoder() -> HookedModel:
    config = ModernBertConfig(
        vocab_size=VOCAB, hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    hf = AutoModelForMaskedLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in hf.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5) if weight.ndim > 1 else weight.add_(0.2 * noise)
    return HookedModel(hf.requires_grad_(False), name="tiny-modernbert")


def masked(n: int = 6, n_pos: int = 6) -> PromptSet:
    """Prompts with the mask token at different places."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(4, VOCAB, (2, n, n_pos), generator=generator)
    rows, behind = torch.arange(n), torch.arange(n) % 4
    clean[rows, n_pos - 1 - behind] = corrupt[rows, n_pos - 1 - behind] = MASK
    answers = torch.randint(4, VOCAB, (n,), generator=generator)
    return PromptSet(clean, corrupt, answers, (answers + 1) % VOCAB, rows % 2, ("a", "b"), behind=behind)


def test_what_its_map_says():
    found = encoder().map
    assert not found.causal and not found.caches and found.n_layers == 3
    assert [str(unit) for unit in encoder().universe][:4] == ["a0.h0", "a0.h1", "a0.h2", "m0"]


@pytest.mark.parametrize(
    "patcher", [Zero(), Resample(), Mean(pool="group"), Mean("conditional")], ids=["zero", "resample", "mean", "conditional"]
)
def test_packed_is_the_naive_path(patcher):
    model, prompts = encoder(), masked()
    packed, naive = engines(model, prompts, patcher)
    assert not packed.holds_keys_values
    masks = random_masks(6, len(model.universe))
    assert difference(logits_of(packed, masks), logits_of(naive, masks)) < 1e-4
    spans = model.universe.at(("1", "last"))
    fast, slow = engines(model, prompts, patcher, spans)
    masks = random_masks(4, len(spans))
    assert difference(logits_of(fast, masks), logits_of(slow, masks)) < 1e-4


def test_it_is_scored_where_the_mask_token_is():
    model, prompts = encoder(), masked()
    packed, _ = engines(model, prompts, Zero())
    expected = model.hf(prompts.clean).logits[prompts.clean == MASK]
    assert torch.allclose(packed.clean_logits(), expected, atol=1e-5)
    packed.check()


def test_it_does_not_generate():
    with pytest.raises(ModelError, match="cannot generate: its positions read later ones"):
        generate(encoder(), masked().clean, encoder().universe.full()[None], Zero(), max_new_tokens=1)
