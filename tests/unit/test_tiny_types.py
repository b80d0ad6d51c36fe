"""Tiny models of any type: they run, repeat, and leave nothing at values that would hide a mistake."""

from __future__ import annotations

import pytest
import torch

from circuitkit.core.errors import ModelError
from circuitkit.models.tiny import causal_types, tiny_config, tiny_masked_model, tiny_model
from circuitkit.models.tiny.sizes import ADDITIONS, N_POS, SIZES

TYPES = ("gpt2", "gpt_oss", "gemma3_text", "deepseek_v3", "jamba", "bert")  # learned positions, sinks, kinds, latents, state space, encoder


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def some(n_pos, seed=0):
    return torch.randint(3, 101, (2, n_pos), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_runs_causally_and_repeats(model_type):
    state = torch.get_rng_state()
    model, again, other = tiny_model(model_type), tiny_model(model_type), tiny_model(model_type, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are used up"
    ids = some(9)
    found = logits(model, ids)
    assert not model.training and found.dtype == torch.float32 and found.shape == (2, 9, 101) and found.isfinite().all()
    assert torch.equal(logits(again, ids), found) and not torch.allclose(logits(other, ids), found, atol=0.1)
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 101
    moved = (logits(model, changed) - found).abs().amax(-1)
    assert moved[:, :5].max() < 1e-5 < 0.01 < moved[:, 8].min(), "later tokens see it, earlier ones do not"


@pytest.mark.parametrize("model_type", TYPES)
def test_no_weight_is_left_where_it_has_no_effect(model_type):
    for name, weight in tiny_model(model_type).named_parameters():
        assert weight.isfinite().all() and weight.numel() < 100_000, name
        assert weight.numel() == 1 or weight.std() > 0.02, f"{name} is constant"


def test_a_layer_of_each_kind_is_kept():
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention"]
    assert tiny_config("deepseek_v32").mlp_layer_types == ["dense", "sparse"]
    assert tiny_config("llama").num_hidden_layers == 2, "of one kind two"
    assert len(tiny_config("nemotron_h").layers_block_type) >= 3


def test_heads_are_grouped_and_wider_than_the_stream_divided_among_them():
    config = tiny_config("llama")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size) == (4, 2, 24, 64)
    assert tiny_config("llama", num_key_value_heads=1).num_key_value_heads == 1, "what is asked for goes first"


def test_a_window_bites_unless_it_is_wider_than_the_prompt():
    ids = some(9)
    narrow, wide = (logits(tiny_model("mistral", window=window), ids) for window in (5, N_POS))
    torch.testing.assert_close(narrow[:, :5], wide[:, :5])
    assert (narrow[:, 8] - wide[:, 8]).abs().max() > 0.01


def test_attention_can_be_chosen():
    eager, sdpa = (tiny_model("llama", attention=attention) for attention in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    torch.testing.assert_close(logits(eager, some(9)), logits(sdpa, some(9)), atol=1e-4, rtol=1e-4)


def test_attention_is_far_from_uniform():
    model = tiny_model("gpt_neox", attention="eager")
    with torch.no_grad():
        pattern = model(some(9), output_attentions=True).attentions[0][:, :, -1]
    assert pattern.amax(-1).mean() > 2 / 9


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_masked_models_see_both_ways(model_type):
    model, ids = tiny_masked_model(model_type), some(9)
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] + 1) % 101
    with torch.no_grad():
        found, moved = model(ids).logits, model(changed).logits
    assert found.isfinite().all() and (found[:, 0] - moved[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("lama", "no causal language model of type 'lama'.*llama"), ("gemma4_assistant", "keys and values it reads")],
)
def test_what_cannot_be_made_says_why(model_type, says):
    with pytest.raises(ModelError, match=says):
        tiny_model(model_type)


def test_every_name_in_the_tables_is_used():
    """A type or a field that transformers no longer has is to be taken out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parts = {"musicgen_decoder", "musicgen_melody_decoder"}  # configurations within others
    assert set(ADDITIONS) <= {*CONFIG_MAPPING_NAMES, *parts}
    assert set(causal_types()) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not {name for names in ADDITIONS.values() for name in names} & {"vocab_size", "hidden_size"}, "sizes belong to SIZES"
    assert all(value > 0 for value in SIZES.values())
