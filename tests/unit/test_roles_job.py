"""The job that looks at every part: its finding, its summary, what it skips and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from models_for_tests import tiny_model, tiny_prompts
from omegaconf import OmegaConf
from planted_roles import COPY, MOVER, NEXT, PREVIOUS, member_prompts, planted_roles

from circuitkit.analysis import mean_patterns
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.jobs import roles
from circuitkit.models.loading import load_model
from circuitkit.storage import load, save_finding
from circuitkit.tasks import MixedMonths, Months, Numerals, Numwords
from circuitkit.testing import TaskConformance

SETTINGS = {"circuit": None, "threshold": 0.1, "top": 5, "top_tokens": 5, "ov_prompts": 8, "successors": None}


@pytest.fixture(scope="module")
def planted():
    return roles.look(planted_roles(), member_prompts(), SETTINGS)


def test_the_finding_has_every_part(planted):
    assert set(planted) == {"model", "circuit", "groups", "patterns", "roles", "heads", "ov", "logit_lens", "attribution", "skipped"}
    assert planted["groups"]["odd"]["labels"] == {"S1": 2, "S2": 5, "S3": 8, "S4": 11, "last": 13}
    assert planted["roles"]["previous_member"]["found"] == [PREVIOUS]
    assert planted["roles"]["previous_member"]["scores"][PREVIOUS] == pytest.approx(1 - (1 / 6 + 1 / 9 + 1 / 12) / 3, abs=1e-5)
    assert "task's prompts" in planted["roles"]["previous_member"]["description"]
    assert "random tokens" in planted["roles"]["induction"]["description"]
    assert planted["ov"]["next"][NEXT] == 100 and planted["ov"]["mean_next"] == 100 / 8 and planted["ov"]["mean_copy"] == 2 * 100 / 8
    assert planted["logit_lens"]["switch_site"] == "a1" and planted["logit_lens"]["switch"] == {"a1": 12}
    assert planted["logit_lens"]["answer_top1"] == [0, 0, 0, 1, 1]
    nodes = planted["attribution"]["nodes"]
    assert nodes[NEXT] == pytest.approx(2, abs=1e-5)
    assert sum(nodes.values()) == pytest.approx(planted["attribution"]["total"], abs=1e-4)
    assert set(planted["skipped"]) == {"role last_to_repeats"}, "no prompt has the last token twice"


def test_patterns_are_kept_for_the_heads_that_were_found_or_for_those_of_the_circuit(planted):
    assert set(planted["patterns"]) == {head for role in planted["roles"].values() for head in role["found"]}
    assert planted["patterns"][PREVIOUS]["mean"][5][2] == 1.0
    circuit = Circuit((Node.parse("a1.h1"), Node.parse("m0")), 2, 4)
    found = roles.look(planted_roles(), member_prompts(), SETTINGS, circuit)
    assert set(found["patterns"]) == {"a1.h1"} and found["circuit"] == ["m0", "a1.h1"]


def test_every_head_is_said_with_its_roles_and_their_control(planted):
    assert set(planted["heads"]) == set(planted["patterns"])
    roles_of = {head: list(roles) for head, roles in planted["heads"].items()}
    assert roles_of[PREVIOUS] == ["previous_member", "similar_member"] and roles_of[MOVER] == ["last_to_newest", "last_to_members"]
    assert planted["heads"][PREVIOUS]["previous_member"]["score"] == planted["roles"]["previous_member"]["scores"][PREVIOUS]
    assert 0 < planted["heads"][PREVIOUS]["previous_member"]["chance"] < 0.01


def test_the_finding_can_be_written_and_read(planted, tmp_path):
    body = {"task": "odd", **planted}
    assert load(Finding, save_finding(Finding("roles", "t", body, {}), tmp_path)).body == json.loads(json.dumps(body))


def test_the_summary_names_the_best_and_stars_the_circuit(planted, capsys):
    roles.show(planted, Circuit((Node.parse(NEXT),), 2, 4))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"previous member {PREVIOUS} 0.88" in shown
    assert f"OV next, % {NEXT}* 100 (mean of all heads 12.5)" in shown
    assert f"OV copy, % {MOVER} 100, {COPY} 100 (mean" in shown
    assert "switch to the answer a1 12 (of 12 prompts)" in shown
    assert "induction no head above the threshold" in shown and "* member of the circuit" in shown
    chosen = {**planted, "heads": {NEXT: planted["heads"][NEXT], "a1.h1": {}}}
    roles.show(chosen, Circuit((Node.parse(NEXT), Node.parse("a1.h1")), 2, 4))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{NEXT}: last to newest 0.93 (chance 0." in shown and "a1.h1: no role above the threshold" in shown


def test_what_a_model_cannot_do_is_skipped_and_said(capsys):
    found = roles.look(tiny_model("gemma2"), tiny_prompts(), SETTINGS)
    assert set(found["skipped"]) == {"role similar_member", "role previous_member", "role last_to_repeats", "attribution"}
    assert "caps its logits" in found["skipped"]["attribution"]
    assert set(found["roles"]) == {"last_to_newest", "last_to_members", "duplicate_token", "induction", "previous_token"}
    assert "ov" in found and "attribution" not in found and len(found["logit_lens"]["sites"]) == 7
    roles.show(found, None)
    assert "skipped attribution: tiny-gemma2 caps its logits" in capsys.readouterr().out


def test_prompts_without_labels_and_a_model_of_few_tokens():
    found = roles.look(tiny_model("llama"), replace(tiny_prompts(), spans={}), SETTINGS)
    assert {"ov", "role last_to_newest", "role similar_member"} <= set(found["skipped"])
    assert found["attribution"]["unit"] == "logits"
    short = tiny_model("llama")
    short.n_ctx = 4
    found = roles.look(short, tiny_prompts(), SETTINGS)
    assert "4 positions" in found["skipped"]["control"]
    assert "induction" not in found["roles"] and "last_to_newest" in found["roles"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"top": 0}, "top must be a whole number"),
        ({"ov_prompts": 1.5}, "ov_prompts must be a whole number, 1 or more; found 1.5"),
        ({"threshold": 10}, "threshold must be a share of attention"),
        ({"circuit": ["a.json"]}, "circuit must be the path of one circuit file"),
        ({"successors": "next"}, "successors must be null, ordinals, or a mapping"),
    ],
)
def test_settings_that_cannot_be_used(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        roles.check(OmegaConf.create({**SETTINGS, **setting}))


def test_what_comes_next():
    assert roles.successors(None, Months()) is None
    assert roles.successors({"January": "second"}, Months()) == {"January": "second"}
    ordinals = roles.successors("ordinals", Months())
    assert (ordinals["January"], ordinals["November"], len(ordinals)) == ("second", "twelfth", 11)
    with pytest.raises(ConfigError, match="needs a task of sequence members; found mixed_months"):
        roles.successors("ordinals", MixedMonths())


# On a trained model, and the task of two sequences


@pytest.fixture(scope="module")
def model():
    return load_model("tiny_gpt2")


def test_prompts_for_the_costly_part_are_the_first_of_each_template(model):
    prompts = Months(n=9, filter=False).prompts(model.tokenizer)
    few = roles.few(prompts, 2)
    assert few.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert roles.opening(model, prompts) is None
    assert roles.opening(model, Months(n=2, filter=False, bos=True).prompts(model.tokenizer)) == model.tokenizer.bos_token_id


def test_two_sequences_in_one_prompt(model):
    prompts = MixedMonths(n=9).prompts(model.tokenizer)
    assert len(prompts) == 9 and prompts.group_names == ("mixed",)
    assert [item.stratum for item in prompts.items][:3] == ["January", "February", "March"], "each start in turn"
    item = prompts.items[0]
    numbers, months = item.clean.split()[::2], item.clean.split()[1::2]
    assert months == ["January", "February", "March", "April"] and item.answer.strip() == "May" and item.wrong.strip() == "April"
    assert len(set(numbers)) == 5 and all(1 <= int(number) <= 20 for number in numbers)
    assert prompts.position("N5", 0) == prompts.position("last", 0)
    found = roles.look(model, prompts, SETTINGS)
    assert set(found["roles"]) >= {"similar_member", "other_member"} and set(found["skipped"]) == {"role last_to_repeats"}


SHARED = ("a0.h0", "a0.h1", "a1.h1", "a1.h3", "a2.h2", "a2.h3", "a3.h7")
"""Heads of the circuits of all three tasks at 80 %: see the model's card."""


@pytest.fixture(scope="module")
def played(model):
    """What each shared head plays on each task."""
    found = {}
    for task in (Numerals, Numwords, Months):
        patterns = mean_patterns(model, task(n=16).prompts(model.tokenizer))
        measured = roles.roles_of(patterns, None, lambda part, make, *inputs: make(*inputs))
        found[task.name] = {head: roles.played(Node.parse(head), measured, SETTINGS["threshold"]) for head in SHARED}
    return found


def test_the_heads_that_the_trained_circuits_share_all_play_a_role(played):
    first = {**dict.fromkeys(SHARED, "last_to_repeats"), "a0.h0": "similar_member", "a1.h1": "last_to_members", "a1.h3": "last_to_newest"}
    assert {task: {head: next(iter(each), "") for head, each in heads.items()} for task, heads in played.items()} == {
        "numerals": first | {"a1.h3": "last_to_members"}, "numwords": first, "months": first,
    }  # fmt: skip


def test_their_roles_are_above_chance_but_where_a_head_looks_at_two_things(played):
    """On months a2.h2 looks both at the repeats of the last token and at the members, at neither of them clearly."""
    above = {task: {head for head, each in heads.items() if next(iter(each.values()))["chance"] < 0.05} for task, heads in played.items()}
    assert above == {"numerals": set(SHARED), "numwords": set(SHARED), "months": set(SHARED) - {"a2.h2"}}
    assert list(played["months"]["a2.h2"]) == ["last_to_repeats", "last_to_members"]


@pytest.mark.parametrize("setting", [{"n": 0}, {"top": 4}, {"top": 101}])
def test_settings_of_the_mixed_task_that_cannot_be_used(setting):
    with pytest.raises(ConfigError, match=f"task.{next(iter(setting))}"):
        MixedMonths(**setting)


class TestMixedMonths(TaskConformance):
    @pytest.fixture(autouse=True)
    def _tokenizer(self, model):
        self.model = model

    def make(self):
        return MixedMonths()

    def tokenizer(self):
        return self.model.tokenizer
