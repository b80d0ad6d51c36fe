"""Transfer: accuracy on solved questions with components removed, against random sets; and what is left out with which sentence."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from circuitkit import load_model
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, MeasurementError, PromptError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.evaluation.transfer import answers, transfer, wilson
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.storage import load, save_finding
from circuitkit.tasks import Addition, Intervals, MonthProblem, NextWord


@lru_cache
def model():
    return load_model("tiny_gpt2")


def circuit(*names):
    return Circuit(tuple(map(Node.parse, names)), 4, 8, "tiny_gpt2")


def encoded(questions):
    return questions.encoded(model().tokenizer)


SETS = {"early": circuit("a0.h0", "a0.h1", "a1.h1", "a1.h3", "m1"), "one": circuit("a3.h7")}


def right_by_hand(asked, removed):
    """Which single-token answers are right when heads are zeroed with plain hooks."""
    right = []
    handles = []
    for node in removed:

        def hook(module, args, node=node):
            z = args[0].clone()
            z[..., 16 * node.head : 16 * (node.head + 1)] = 0
            return (z,)

        handles.append(model().module(node.layer, "out_proj").register_forward_pre_hook(hook))
    for question, ids in zip(asked.questions, asked.ids, strict=True):
        with torch.no_grad():
            token = model().hf(torch.tensor([ids])).logits[0, -1].argmax().item()
        right.append(model().tokenizer.decode([token]) == question.answer.strip())
    for handle in handles:
        handle.remove()
    return right


def test_accuracy_is_that_of_plain_hooks_on_what_the_model_solves():
    asked = encoded(Addition(digits=2, n=40))
    finding = transfer(model(), [asked], SETS, Zero(), draws=2, examples=2)
    clean = right_by_hand(asked, [])
    assert 0 < sum(clean) < 40, "some are solved and some are not"
    (task,) = finding.body["tasks"]
    assert task == {"name": "addition_2_digit", "asked": 40, "solved": sum(clean), "clean_accuracy": sum(clean) / 40}
    accuracy = finding.body["accuracy"]["addition_2_digit"]
    assert list(accuracy) == ["early", "random like early", "one", "random like one"]
    for entry in finding.body["sets"]:
        members = entry["drawn"] if entry["control"] else [entry["nodes"]]
        shares = []
        for names in members:
            right = right_by_hand(asked, [Node.parse(name) for name in names])
            shares.append(sum(one and other for one, other in zip(right, clean, strict=True)) / sum(clean))
        found = accuracy[entry["label"]]
        assert found["draws"] == pytest.approx(shares) and found["mean"] == pytest.approx(sum(shares) / len(shares))
        low, high = (min(shares), max(shares)) if entry["control"] else wilson(round(shares[0] * sum(clean)), sum(clean))
        assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert accuracy["early"]["mean"] < accuracy["random like early"]["mean"], "or the test would not tell sets from controls"


def test_only_heads_unless_mlps_are_asked_for():
    asked = [encoded(Intervals(step=2, start=2, n=6))]
    heads, whole = (transfer(model(), asked, SETS, Zero(), mlps=mlps, draws=3).body["sets"][:2] for mlps in (False, True))
    assert [(entry["n_heads"], entry["n_mlps"]) for entry in (*heads, *whole)] == [(4, 0), (4, 0), (4, 1), (4, 1)]
    assert heads[0]["nodes"] == ["a0.h0", "a0.h1", "a1.h1", "a1.h3"] and "m1" in whole[0]["nodes"]
    for entry in (heads[1], whole[1]):
        assert entry["control"] and entry["draws"] == len(entry["drawn"]) == 3
        assert all(not set(names) & set(SETS["early"].names) for names in entry["drawn"]), "from outside of the set"


def test_a_finding_can_be_saved_and_has_its_examples(tmp_path):
    asked = [encoded(Addition(n=5)), encoded(MonthProblem(n=4))]
    finding = transfer(model(), asked, SETS, Mean(), draws=1, examples=2)
    loaded = load(Finding, save_finding(finding, tmp_path))
    assert loaded == finding and loaded.kind == "transfer"
    assert len(finding.body["examples"]) == 2 * 4 * 2, "sets of questions, removals with their controls, examples"
    one = finding.body["examples"][0]
    assert one.keys() == {"task", "prompt", "answer", "set", "generated"} and one["prompt"].endswith("=")
    assert finding == transfer(model(), asked, SETS, Mean(), draws=1, examples=2), "same seed, same numbers"


@pytest.mark.parametrize("patcher", [Resample(), Mean(), Mean(pool="group")])
def test_questions_of_several_lengths_are_asked_each_on_its_own(patcher):
    """Each answer is that of a run in which only prompts of its own length are."""
    short, long = encoded(NextWord(vocabulary="months", n=4)), encoded(NextWord(vocabulary="months", n=4, length=5))
    both = replace(short, **{column: (*getattr(short, column), *getattr(long, column)) for column in
                             ("questions", "ids", "corrupt_ids", "n_new_tokens")})  # fmt: skip
    masks = model().universe.without(model().universe.full(), [*SETS["early"].nodes, "m0"])[None]
    texts = [answers(model(), each, masks, patcher).texts[0] for each in (both, short, long)]
    assert texts[0] == texts[1] + texts[2]
    assert texts[0] != answers(model(), both, model().universe.full()[None], patcher).texts[0]


def test_what_the_model_cannot_do_is_left_out_with_its_accuracy(caplog):
    hopeless = replace(encoded(Addition(n=5)), name="hopeless", is_right=lambda question, text: False)
    finding = transfer(model(), [hopeless, encoded(Addition(n=5))], SETS, Zero(), draws=0)
    sentence = "tiny_gpt2 answers 0 of 5 questions of hopeless (accuracy 0.00), so they are left out."
    assert finding.body["left_out"] == [{"name": "hopeless", "asked": 5, "solved": 0, "clean_accuracy": 0.0, "reason": sentence}]
    assert sentence in caplog.text
    assert [task["name"] for task in finding.body["tasks"]] == ["addition_1_digit"] == list(finding.body["accuracy"])
    assert [entry["label"] for entry in finding.body["sets"]] == ["early", "one"], "no control without draws"
    with pytest.raises(MeasurementError, match="No question set is left to measure.*answers 0 of 5"):
        transfer(model(), [hopeless], SETS, Zero())


def test_corrupt_prompts_of_another_length_or_none(caplog):
    asked = encoded(Addition(n=5))
    longer = replace(asked, name="longer", corrupt_ids=tuple((*ids, 5) for ids in asked.corrupt_ids))
    without = replace(asked, name="without", corrupt_ids=((),) * 5)
    finding = transfer(model(), [longer, without, asked], SETS, Mean(), draws=0)
    reasons = [entry["reason"] for entry in finding.body["left_out"]]
    assert "longer: Mean takes its values from corrupt prompts with as many tokens" in reasons[0]
    assert "has 5. Use patcher=zero" in reasons[0]
    assert "without: Mean" in reasons[1] and "there is no corrupt prompt for it" in reasons[1]
    assert all(reason in caplog.text for reason in reasons)
    assert len(transfer(model(), [longer, without, asked], SETS, Zero(), draws=0).body["tasks"]) == 3, "zeros need none"
    with pytest.raises(PromptError, match="longer: Mean takes"):
        answers(model(), longer, model().universe.empty()[None], Mean())


def test_answers_that_do_not_end_are_bounded_and_reported(caplog):
    asked = replace(encoded(MonthProblem(n=3, n_new_tokens=4)), is_right=lambda question, text: True)
    everything = {"all": Circuit(model().universe.nodes, 4, 8, "tiny_gpt2")}
    finding = transfer(model(), [asked], everything, Mean(), mlps=True, draws=0)
    assert "month_problem: 3 of 3 answers had not ended after 4 tokens and are judged as they are" in caplog.text
    assert all(len(each["generated"].split()) == 4 for each in finding.body["examples"])


def test_a_set_with_nothing_to_remove_is_left_out(caplog):
    asked = [encoded(Addition(n=3))]
    finding = transfer(model(), asked, {"mlps": circuit("m0", "m1"), **SETS}, Zero(), draws=0)
    assert [entry["label"] for entry in finding.body["sets"]] == ["early", "one"]
    assert "The set 'mlps' has no head (and MLPs are only removed with mlps=true)" in caplog.text
    with pytest.raises(ConfigError, match="None of the sets has anything to remove"):
        transfer(model(), asked, {"mlps": circuit("m0")}, Zero())


def test_a_set_larger_than_what_is_left_says_so(caplog):
    large = circuit(*(f"a{layer}.h{head}" for layer in range(3) for head in range(8)))
    entry = transfer(model(), [encoded(Addition(n=3))], {"large": large}, Zero(), draws=1).body["sets"][1]
    assert len(entry["drawn"][0]) == 24 and "its random control shares some of them" in caplog.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"asked": []}, r"at least one question set, each name once; found \[\]"),
        ({"asked": ["twice", "twice"]}, r"found \['addition_1_digit', 'addition_1_digit'\]"),
        ({"sets": {}}, "at least one set of components"),
        ({"sets": {"a": SETS["one"], "random like a": SETS["one"]}}, "unlike those of the controls"),
        ({"draws": -1}, "found draws=-1"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    one = encoded(Addition(n=2))
    given = {"asked": [one], "sets": SETS} | settings
    given["asked"] = [one for _ in given["asked"]]
    with pytest.raises(ConfigError, match=sentence):
        transfer(model(), patcher=Zero(), **given)


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)]
)
def test_wilson_s_interval(n_right, n, low, high):
    assert wilson(n_right, n) == pytest.approx((low, high), abs=1e-4)
