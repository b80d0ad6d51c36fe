"""The residual stream at the last position: logit lens and direct attribution."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import FAMILIES, shared_model, tiny_model, tiny_prompts
from planted_roles import COPY, MOVER, NEXT, member_prompts, planted_roles

from circuitkit.analysis import LogitLens, direct_attribution, logit_lens
from circuitkit.analysis.logit_lens import most_common
from circuitkit.core.errors import MeasurementError, ModelError

POST_NORM = ("gemma2", "olmo2")
PRE_NORM = [family for family in FAMILIES if family not in POST_NORM]


def picked(logits, prompts):
    rows = torch.arange(len(prompts))
    return logits[rows, prompts.answers.tokens], logits[rows, prompts.wrongs.tokens]


# Logit lens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_site_is_the_model_itself(family):
    model, prompts = shared_model(family), tiny_prompts(n=8)
    lens, logits = logit_lens(model, prompts), model.hf(prompts.clean, logits_to_keep=1).logits[:, -1]
    assert lens.sites == ("input", "a0", "m0", "a1", "m1", "a2", "m2")
    answer, wrong = picked(logits, prompts)
    assert torch.equal(lens.answer[-1], answer) and torch.equal(lens.wrong[-1], wrong)
    assert torch.equal(lens.answer_is_top[-1], logits.argmax(-1) == prompts.answers.tokens)
    assert torch.equal(lens.wrong_is_top[-1], logits.argmax(-1) == prompts.wrongs.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_the_model_without_what_comes_later(family):
    """All later attentions and MLPs add nothing, so the model's own end, with its one final norm, does the rest."""
    model, prompts = shared_model(family), tiny_prompts()
    lens = logit_lens(model, prompts)
    for place in range(len(lens.sites)):

        def silence(layer, place=place):
            if 2 * layer.index + 1 > place:
                layer.skip_attention(torch.zeros_like(layer.resid))
            if 2 * layer.index + 2 > place:
                layer.mlp_out = torch.zeros_like(layer.mlp_out)

        logits = model.run(prompts.clean, silence)[:, -1]
        for found, expected in zip((lens.answer[place], lens.wrong[place]), picked(logits, prompts), strict=True):
            assert torch.allclose(found, expected, atol=1e-4), lens.sites[place]


def test_the_planted_model_switches_where_it_was_told_to():
    lens = logit_lens(planted_roles(), member_prompts())
    assert lens.switches() == lens.top1_switches() == {"a1": 12}
    assert torch.allclose(lens.wrong[:, 0], torch.tensor([0, 1.5, 1.5, 1.5 + 1 / 14, 1.5 + 1 / 14]), atol=1e-5)
    assert torch.allclose(lens.answer[:, 0], torch.tensor([0.0, 0, 0, 2, 2]), atol=1e-5)


def test_a_switch_is_the_last_one_and_only_if_it_holds():
    answer = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]]).T
    sites, no = ("input", "a0", "m0", "a1"), torch.zeros(4, 5, dtype=torch.bool)
    wrong_is_top = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool).T
    lens = LogitLens(sites, answer, torch.full((4, 5), 0.5), answer > 0.5, wrong_is_top)
    assert lens.switches() == {"a1": 2}
    assert lens.top1_switches() == {"a0": 2}
    nothing = LogitLens(sites, answer * 0, answer, no, no)
    assert nothing.switches() == nothing.top1_switches() == {} and most_common({}) is None
    assert most_common({"a0": 2, "m0": 3, "a1": 3}) == "m0"


# Direct attribution


def uncapped(family):
    """A model whose logits are as the unembedding gives them."""
    model = tiny_model(family)
    model.hf.config.final_logit_softcapping = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_sum_to_the_logit_difference(family):
    """To 1e-5 logits in float32, with logits of the size of 1."""
    model, prompts = uncapped(family), tiny_prompts(n=8)
    found = direct_attribution(model, prompts)
    answer, wrong = picked(model.hf(prompts.clean).logits[:, -1], prompts)
    assert torch.allclose(found.differences.float(), answer - wrong, atol=1e-6)
    assert torch.allclose(found.values.sum(-1), found.differences, atol=1e-5)
    assert found.parts == ("input", *map(str, model.universe.nodes), "bias")
    assert (found.values[:, :-1].abs().max(0).values > 1e-4).all(), "no part of a random model has nothing to say"


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_share_is_what_the_final_norm_makes_of_the_part(family):
    """By the norm's own formula, for an MLP, a head and the embedding."""
    model, prompts = shared_model(family), tiny_prompts(n=4)
    seen = {}

    def visit(layer):
        seen["entered", layer.index] = layer.resid[:, -1]
        seen["z", layer.index] = layer.z[:, -1]
        seen["attention"] = layer.attention_out[:, -1]
        seen["mlp", layer.index] = layer.mlp_out[:, -1]

    model.run(prompts.clean, visit)
    norm, unembed = model.final_norm, model.hf.get_output_embeddings().weight
    resid = seen["entered", 2] + seen["attention"] + seen["mlp", 2]
    z = torch.zeros_like(seen["z", 1])
    z[:, 1] = seen["z", 1][:, 1]
    head = model.project(1, z[:, None])[:, 0] - model.project(1, 0 * z[:, None])[:, 0]
    found = direct_attribution(model, prompts)
    for name, part in (("m0", seen["mlp", 0]), ("a1.h1", head), ("input", seen["entered", 0])):
        if isinstance(norm, torch.nn.LayerNorm):
            scale = (resid.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            read = (part - part.mean(-1, keepdim=True)) / scale * norm.weight
        else:
            read = part / (resid.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
        answer, wrong = picked(read @ unembed.T, prompts)
        assert torch.allclose(found.values[:, found.parts.index(name)].float(), answer - wrong, atol=1e-5), name


@pytest.mark.parametrize("family", POST_NORM)
def test_a_share_goes_through_the_norm_behind_its_part_with_the_scale_of_the_whole(family):
    """By the formula of RMSNorm, for an MLP and a head; a head's part is not what the norm would make of the head alone."""
    model, prompts, seen = uncapped(family), tiny_prompts(n=4), {}

    def visit(layer):
        seen["z", layer.index] = layer.z[:, -1]
        seen["attention", layer.index] = layer.attention_out[:, -1]
        seen["mlp", layer.index] = layer.mlp_out[:, -1]
        seen["out"] = layer.out[:, -1]

    def held(norm, part, whole):
        eps, weight = (norm.eps, 1 + norm.weight) if family == "gemma2" else (norm.variance_epsilon, norm.weight)
        return part / (whole.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    model.run(prompts.clean, visit)
    z = torch.zeros_like(seen["z", 1])
    z[:, 1] = seen["z", 1][:, 1]
    head = held(model.module(1, "attention_post_norm"), model.project(1, z[:, None])[:, 0], seen["attention", 1])
    mlp = held(model.module(0, "mlp_post_norm"), seen["mlp", 0], seen["mlp", 0])
    found = direct_attribution(model, prompts)
    for name, part in (("m0", mlp), ("a1.h1", head)):
        read = held(model.hf.model.norm, part, seen["out"])
        answer, wrong = picked(read @ model.hf.get_output_embeddings().weight.T, prompts)
        assert torch.allclose(found.values[:, found.parts.index(name)].float(), answer - wrong, atol=1e-5), name


def test_the_planted_shares():
    found = direct_attribution(planted_roles(), member_prompts())
    expected = {MOVER: -1.5, COPY: -1 / 14, NEXT: 2.0}
    assert {name: value for name, value in found.means.items() if abs(value) > 1e-6} == pytest.approx(expected, abs=1e-5)
    assert [name for name, _ in found.top(2)] == [NEXT, MOVER]


def test_bfloat16_sums_within_its_own_tolerance():
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = direct_attribution(model, tiny_prompts())
    assert 0 < (found.values.sum(-1) - found.differences).abs().max() < 0.25 * model.run(tiny_prompts().clean).float().std()


def test_models_whose_logits_are_no_sum_are_refused():
    with pytest.raises(ModelError, match="caps its logits"):
        direct_attribution(shared_model("gemma2"), tiny_prompts())
    strange = tiny_model("gpt2")
    strange.hf.transformer.ln_f = torch.nn.Identity()
    with pytest.raises(ModelError, match="is a Identity; expected a LayerNorm or an RMSNorm"):
        direct_attribution(strange, tiny_prompts())


def test_a_sum_that_is_off_is_refused():
    model = tiny_model("gpt2")
    model.hf.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(MeasurementError, match="do not sum to it: they are off by up to"):
        direct_attribution(model, tiny_prompts())
