"""Copy and next scores: the planted heads, every family's value projections, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models_for_tests import FAMILIES, shared_model, tiny_model, tiny_prompts
from planted_roles import COPY, MOVER, NEXT, member_prompts, planted_roles

from circuitkit.analysis import ov_scores
from circuitkit.analysis.ov_scores import _head_outputs
from circuitkit.core.errors import MeasurementError, ModelError, PromptError


def percentages(table):
    return {f"a{layer}.h{head}": value for layer, row in enumerate(table.tolist()) for head, value in enumerate(row) if value}


def test_the_planted_heads_copy_and_increment():
    found = ov_scores(planted_roles(), member_prompts())
    assert percentages(found.copy) == {MOVER: 100.0, COPY: 100.0}
    assert percentages(found.next) == {NEXT: 100.0}
    assert found.n == 12 * 4 and found.k == 5 and "top 5 tokens" in found.definition


def test_what_comes_next_can_be_said():
    """Members 2, 4, 6, 8 follow themselves here: the copying heads are now the ones that continue, for those."""
    successors = {str(member): str(member if member % 2 == 0 else 0) for member in range(1, 9)}
    found = ov_scores(planted_roles(), member_prompts(), successors=successors)
    assert percentages(found.next) == {MOVER: 50.0, COPY: 50.0}
    with pytest.raises(PromptError, match="names no next member for '1'. Named are: 2."):
        ov_scores(planted_roles(), member_prompts(), successors={"2": "3"})


def test_what_could_never_be_said_is_refused():
    class Splits:
        """Numbers are tokens, words are two."""

        def __call__(self, texts, *, add_special_tokens):
            return {"input_ids": [[1] if text.strip().isdigit() else [1, 2] for text in texts]}

        def decode(self, ids):
            return str(ids[0])

    model, prompts = planted_roles(), member_prompts()
    model.tokenizer = Splits()
    numbers = {str(member): str(member + 1) for member in range(1, 9)}
    assert percentages(ov_scores(model, prompts, successors=numbers).next) == {NEXT: 100.0}
    with pytest.raises(PromptError, match="'second' comes after '1', but that is several tokens"):
        ov_scores(model, prompts, successors={**numbers, "1": "second"})


def test_a_space_before_a_word_makes_no_difference():
    class Spaced:
        """Token 15 is member 5 behind a space."""

        def decode(self, ids):
            return " 5" if ids == [15] else str(ids[0])

    model, prompts = planted_roles(), member_prompts()
    model.tokenizer = Spaced()
    model.hf.lm_head.weight[[5, 15]] = model.hf.lm_head.weight[[15, 5]]  # what was 5 is now said as 15
    assert percentages(ov_scores(model, prompts).copy) == {MOVER: 100.0, COPY: 100.0}
    model.tokenizer = None
    assert percentages(ov_scores(model, prompts).copy)[COPY] < 100.0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gemma2", "olmo2")])
def test_head_outputs_are_what_heads_write_when_they_see_one_position(family):
    """On a prompt of one token every head looks at that token alone."""
    model, seen = shared_model(family, n_heads=4), {}
    ids = torch.arange(5)[:, None]

    def visit(layer):
        seen["resid"], seen["z"], seen["out"] = layer.resid, layer.z, layer.attention_out

    for place in range(model.n_layers):
        model.run(ids, visit, stop=place)
        outs = _head_outputs(model, place, seen["resid"][:, 0])
        bias = model.project(place, torch.zeros_like(seen["z"]))[:, 0]
        assert torch.allclose(outs.sum(0) + bias, seen["out"][:, 0], atol=1e-5)
        for head in range(4):
            alone = torch.zeros_like(seen["z"])
            alone[:, :, head] = seen["z"][:, :, head]
            assert torch.allclose(outs[head] + bias, model.project(place, alone)[:, 0], atol=1e-5)
            assert outs[head].abs().max() > 0.01


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_head_outputs_go_through_the_weights_of_a_norm_behind_them(family):
    model = shared_model(family, n_heads=4)
    norm = model.module(1, "attention_post_norm")
    for out in _head_outputs(model, 1, torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))):
        weight = 1 + norm.weight if family == "gemma2" else norm.weight
        assert torch.allclose((out / weight).square().mean(-1), torch.ones(5), atol=1e-3)  # held at what the head alone has


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family_against_one_prompt_at_a_time(family):
    model, prompts = shared_model(family, n_heads=4), tiny_prompts()
    found = ov_scores(model, prompts, k=3)
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 3), (2, 2)):
            hits = [0, 0]
            for ids, group, answer in zip(prompts.clean, prompts.groups.tolist(), prompts.answers.tokens.tolist(), strict=True):
                entered = []
                model.run(ids[None], lambda each, entered=entered: entered.append(each.resid), stop=1)
                values = model.queries_keys_values(layer, entered[1])[2][0, group]
                z = torch.zeros(1, 1, 4, values.shape[-1])
                z[0, 0, head] = values[head // (4 // model.n_kv_heads)]
                out = model.project(layer, z) - model.project(layer, torch.zeros_like(z))
                out = model.module(layer, "attention_post_norm")(out) if family in ("gemma2", "olmo2") else out
                top = model.unembed(out)[0, 0].topk(3).indices.tolist()
                hits[0] += int(ids[group]) in top
                hits[1] += answer in top
            assert [found.copy[layer, head].item(), found.next[layer, head].item()] == pytest.approx([100 * hit / 6 for hit in hits])


def test_what_is_refused():
    model, prompts = planted_roles(), member_prompts()
    with pytest.raises(PromptError, match="labelled S1, S2"):
        ov_scores(model, replace(prompts, spans={}))
    with pytest.raises(ModelError, match="has one layer"):
        ov_scores(tiny_model("gpt2", n_layers=1), tiny_prompts())
    with pytest.raises(MeasurementError, match="k must be from 1 to 15"):
        ov_scores(model, prompts, k=16)
