"""What an evaluation says of a circuit, against numbers by hand, brute force and the methods that score the same masks."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from models_for_tests import engines, linear_llama, shared_model, solvable_prompts, wire_head

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError, PromptError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Level, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.base import Baseline
from circuitkit.evaluation import SearchRun, cross_task, evaluate, overlap, stability
from circuitkit.evaluation import solvable_prompts as draw_solvable
from circuitkit.evaluation.bootstrap import resampled
from circuitkit.evaluation.controls import random_sets
from circuitkit.jobs.stability import DESIGNS
from circuitkit.methods import Knockout, RandomCircuit
from circuitkit.metrics.base import Floor
from circuitkit.patchers import Mean, Zero
from circuitkit.storage import load, save_finding


def circuit_of(*names, n_layers=1, n_heads=3, model="by-hand", **fields):
    return Circuit(tuple(map(Node.parse, names)), n_layers, n_heads, model, **fields)


@pytest.fixture
def by_hand():
    """Heads of one layer that give 50, 30 and 20 % of the logit difference."""
    model = linear_llama(n_layers=1, n_heads=3, d_model=6, vocab=4)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.tensor([0.0, 0.0, 0.0, 10.0])
        for head, weight in enumerate((5.0, 3.0, 2.0)):
            wire_head(model, 0, head, 1, 2, weight)
        model.hf.lm_head.weight[1, 2] = 1.0
    one = torch.tensor([1, 1])
    prompts = PromptSet(torch.tensor([[3, 3]] * 2), torch.tensor([[0, 3]] * 2), one, one + 1, one - 1)
    return engines(model, prompts, Zero())[0]


@pytest.fixture(scope="module")
def tiny():
    """A random model of 3 layers of 2 heads, with prompts on which it is right."""
    model = shared_model("gpt2")
    return engines(model, solvable_prompts(model, n=12), Mean("plain", "all"))[0]


@pytest.fixture(scope="module")
def tiny_circuit(tiny):
    return circuit_of("a0.h0", "m0", "a1.h1", "m1", "m2", n_layers=3, n_heads=2, model=tiny.model.name)


# The bootstrap


def sample(n, generator, floor):
    """Prompts on which the true score is 60 %: a noisy metric, and a noisier one that is right on average."""
    clean = 10 + 3 * torch.randn(n, generator=generator)
    patched = 2 + torch.randn(n, generator=generator)
    zero = 2.0 if floor is Floor.ABLATED else 0.0
    values = zero + 0.6 * (10 - zero) + 0.3 * (clean - 10) + 4 * torch.randn(n, generator=generator)
    return Baseline(clean, patched, floor, "logits"), values[None]


@pytest.mark.parametrize("floor", list(Floor))
def test_intervals_cover_the_truth_as_often_as_they_say(floor):
    generator = torch.Generator().manual_seed(0)
    found = [resampled(*sample(80, generator, floor), resamples=400, seed=draw).interval(0) for draw in range(400)]
    covered = sum(each.low <= 60 <= each.high for each in found) / len(found)
    assert 0.92 <= covered <= 0.975
    assert sum(each.value for each in found) / len(found) == pytest.approx(60, abs=0.7)
    assert all(each.low <= each.value <= each.high for each in found)


def test_a_lower_confidence_covers_less_often():
    generator = torch.Generator().manual_seed(1)
    found = [resampled(*sample(80, generator, Floor.ZERO), resamples=300, confidence=0.5).interval(0) for _ in range(300)]
    assert 0.42 <= sum(each.low <= 60 <= each.high for each in found) / len(found) <= 0.58


def test_intervals_shrink_with_the_root_of_the_number_of_prompts():
    generator = torch.Generator().manual_seed(2)
    small, large = (resampled(*sample(n, generator, Floor.ZERO)).interval(0) for n in (100, 1600))
    assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4, rel=0.25)


def test_masks_see_the_same_resamples():
    """A score that is a fixed share of the untouched model's has no spread, and neither has a fixed difference between two."""
    generator = torch.Generator().manual_seed(3)
    baseline, values = sample(50, generator, Floor.ZERO)
    found = resampled(baseline, torch.cat([0.25 * baseline.clean[None], values, values - 0.1 * baseline.clean]))
    assert found.interval(0).plain() == pytest.approx({"value": 25, "low": 25, "high": 25}, rel=1e-5)
    assert found.drop(2, 1).plain() == pytest.approx({"value": 10, "low": 10, "high": 10}, rel=1e-4)
    assert found.drop(1).value == pytest.approx(100 - found.interval(1).value)
    assert found.drop(1).low == pytest.approx(100 - found.interval(1).high)


def test_draws_do_not_depend_on_the_masks_beside_them_and_follow_the_seed():
    baseline, values = sample(30, torch.Generator().manual_seed(4), Floor.ABLATED)
    alone, beside = resampled(baseline, values), resampled(baseline, torch.cat([values, 2 * values]))
    assert alone.interval(0).plain() == pytest.approx(beside.interval(0).plain())
    assert resampled(baseline, values).interval(0) == alone.interval(0) != resampled(baseline, values, seed=1).interval(0)


def test_many_prompts_are_resampled_in_parts(monkeypatch):
    baseline, values = sample(30, torch.Generator().manual_seed(4), Floor.ZERO)
    whole = resampled(baseline, values, resamples=100)
    monkeypatch.setattr("circuitkit.evaluation.bootstrap._AT_ONCE", 30 * 7)
    parts = resampled(baseline, values, resamples=100)
    assert parts.draws.shape == whole.draws.shape == (1, 100)
    assert torch.equal(parts.draws, whole.draws)


@pytest.mark.parametrize("clean", [[5.0], [30.0, -10.0, -12.0]])
def test_no_interval_where_it_would_mean_nothing(clean):
    """One prompt, or resamples on which the untouched model is on the wrong side."""
    clean = torch.tensor(clean)
    found = resampled(Baseline(clean, torch.zeros_like(clean), Floor.ZERO, "logits"), clean[None] / 2).interval(0)
    assert (found.value, found.low, found.high) == (pytest.approx(50), None, None)


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_bootstrap_refuses(wrong):
    with pytest.raises(ConfigError, match=r"resamples must be at least 1 and confidence in \(0, 1\)"):
        resampled(*sample(5, torch.Generator(), Floor.ZERO), **wrong)


# Overlap


def test_chance_overlap_is_that_of_all_pairs_of_sets():
    """Two layers of two heads: every set of two heads and one MLP against a given one."""
    graph = Universe.of_nodes(2, 2)
    heads, mlps = [n for n in graph if n.head is not None], [n for n in graph if n.head is None]
    a = Circuit((*heads[:2], mlps[0]), 2, 2)
    every = [Circuit((*chosen, mlp), 2, 2) for chosen, mlp in product(combinations(heads, 2), mlps)]
    assert len(every) == 12
    for b in every:
        expected = sum(len(a & other) >= len(a & b) for other in every) / len(every)
        assert overlap.p_value(a, b) == pytest.approx(expected)
        assert overlap.p_value(b, a) == pytest.approx(expected)
    assert {overlap.p_value(a, b) for b in every} > {1.0}


def test_chance_overlap_of_other_sizes():
    graph = Universe.of_nodes(2, 3)
    heads, mlps = [n for n in graph if n.head is not None], [n for n in graph if n.head is None]
    a, b = Circuit((*heads[:4], *mlps), 2, 3), Circuit((*heads[2:5], mlps[1]), 2, 3)
    drawn = [Circuit((*chosen, mlp), 2, 3) for chosen, mlp in product(combinations(heads, 3), mlps)]
    assert overlap.p_value(a, b) == pytest.approx(sum(len(a & other) >= 3 for other in drawn) / len(drawn))


def test_comparison_by_hand():
    a, b, c = circuit_of("a0.h0", "a0.h1", "m0"), circuit_of("a0.h1", "a0.h2"), circuit_of("a0.h1")
    found = overlap.compare({"a": replace(a, score=81.0), "b": b, "c": c}, {"seed": 0})
    assert (found.kind, found.provenance) == ("compare", {"seed": 0})
    body = found.body
    assert body["circuits"]["a"] == {"model": "by-hand", "heads": 2, "mlps": 1, "score": 81.0, "nodes": ["a0.h0", "a0.h1", "m0"]}
    assert body["pairs"][0] == {"a": "a", "b": "b", "shared": 1, "jaccard": 0.25, "containment": 0.5, "p_value": 1.0}
    assert body["pairs"][1]["containment"] == 1.0
    assert body["pairs"][2]["p_value"] == pytest.approx(2 / 3)
    assert body["shared_by_all"] == ["a0.h1"]
    assert body["union"] == ["a0.h0", "a0.h1", "a0.h2", "m0"]
    assert body["universe"] == {"heads": 3, "mlps": 1}
    assert overlap.shared_by_all({"a": a, "b": b}) == circuit_of("a0.h1")


def test_circuits_that_share_nothing():
    a, empty = circuit_of("a0.h0"), circuit_of()
    assert overlap.compare({"a": a, "b": circuit_of("a0.h1")}).body["shared_by_all"] == []
    assert overlap.containment(a, empty) is None
    assert overlap.p_value(a, empty) == 1.0
    assert overlap.compare({"a": empty, "b": empty}).body["pairs"][0]["jaccard"] == 1.0


def test_comparison_of_positions_has_no_chance_level():
    assert overlap.p_value(circuit_of("a0.h0@last"), circuit_of("a0.h0@S1")) is None


def test_comparison_refuses():
    with pytest.raises(CircuitError, match="at least two circuits, found 1"):
        overlap.compare({"a": circuit_of("m0")})
    with pytest.raises(CircuitError, match="was found in the model 'other'"):
        overlap.compare({"a": circuit_of("m0"), "b": circuit_of("m0", model="other")})
    with pytest.raises(CircuitError, match="no circuit to combine"):
        overlap.union({})


# Controls


def test_random_sets_have_the_size_and_avoid_what_they_can():
    graph, like = Universe.of_nodes(3, 4), circuit_of("a0.h0", "a1.h1", "m0", "m1", n_layers=3, n_heads=4)
    sets = random_sets(graph, like.members, draws=50, seed=0, avoid=like.nodes)
    for nodes in sets:
        drawn = Circuit(nodes, 3, 4)
        assert (len(drawn.heads), len(drawn.mlps)) == (2, 2)
        assert not set(drawn.heads) & set(like.heads)
        assert "m2" in drawn.names, "the one MLP that is free, before any other"
    assert len(set(sets)) > 25
    assert (
        sets == random_sets(graph, like.members, draws=50, seed=0, avoid=like.nodes) != random_sets(graph, like.members, draws=50, seed=1)
    )


# One circuit


def test_evaluation_by_hand(by_hand):
    circuit, shared = circuit_of("a0.h0", "a0.h1"), circuit_of("a0.h2")
    found = evaluate(by_hand, circuit, label="mine", task="t", shared=shared, draws=9, provenance={"x": 1})
    body = found.body
    assert (found.kind, found.provenance, found.title) == ("evaluation", {"x": 1}, "mine on t in by-hand")
    assert body["circuit"] == {"label": "mine", "nodes": ["a0.h0", "a0.h1"], "n_heads": 2, "n_mlps": 0}
    assert body["score"] == pytest.approx({"value": 80, "low": 80, "high": 80})
    assert {name: (each["value"], each["drop"]) for name, each in body["removed_from_circuit"].items()} == {
        "a0.h0": (pytest.approx(30), pytest.approx(50)),
        "a0.h1": (pytest.approx(50), pytest.approx(30)),
    }
    assert {name: (each["value"], each["drop"]) for name, each in body["removed_from_model"].items()} == {
        "a0.h0": (pytest.approx(50), pytest.approx(50)),
        "a0.h1": (pytest.approx(70), pytest.approx(30)),
    }
    assert body["random_head"]["mean_drop"] == pytest.approx(100 / 3)
    assert body["random_head"]["n"] == 3
    scores = body["random_circuits"]["scores"]
    assert {round(score) for score in scores} <= {80, 70, 50}
    assert body["random_circuits"]["share_as_good"] == pytest.approx((1 + sum(score > 79 for score in scores)) / 10)
    assert body["random_circuits"]["mean"] == pytest.approx(sum(scores) / 9)
    mine, control, third, other = body["sets_removed_from_model"]
    assert (mine["label"], mine["nodes"], mine["score"]["value"]) == ("mine", ["a0.h0", "a0.h1"], pytest.approx(20))
    assert (control["label"], control["control_of"]) == ("random like mine", "mine")
    assert {round(score) for score in control["scores"]} <= {30, 50}, "head 2 is the only one outside, so it is always drawn"
    assert control["score"]["value"] == pytest.approx(sum(control["scores"]) / 9)
    assert (third["label"], third["score"]["value"], other["control_of"]) == ("the shared set", pytest.approx(80), "the shared set")
    assert third["share_as_bad"] == 1.0, "either other head is worth more"
    assert body["clean_mean"] == pytest.approx(by_hand.baseline().clean.mean().item())
    assert [each["clean"] for each in body["prompts"]] == by_hand.baseline().clean.tolist()
    assert [each["circuit"] for each in body["prompts"]] == pytest.approx([0.8 * each["clean"] for each in body["prompts"]])


def test_evaluation_agrees_with_the_methods(tiny, tiny_circuit):
    body = evaluate(tiny, tiny_circuit, draws=5, seed=3).body
    from_circuit = Knockout(tiny_circuit).discover(tiny, on_step=lambda step: None).values
    alone = Knockout().discover(tiny, on_step=lambda step: None).values
    drawn = RandomCircuit(tiny_circuit, draws=5, seed=3).discover(tiny, on_step=lambda step: None).values
    assert {name: each["value"] for name, each in body["removed_from_circuit"].items()} == pytest.approx(from_circuit, abs=1e-3)
    assert {name: each["value"] for name, each in body["removed_from_model"].items()} == pytest.approx(
        {name: alone[name] for name in tiny_circuit.names}, abs=1e-3
    )
    assert body["random_circuits"]["scores"] == pytest.approx(list(drawn.values()), abs=1e-3)
    heads = [100 - score for name, score in alone.items() if ".h" in name]
    assert min(heads) < 0, "a head without which the model is better, or the next line would prove less"
    assert body["random_head"]["mean_drop"] == pytest.approx(sum(max(0, drop) for drop in heads) / 6, abs=1e-3)
    assert body["score"]["low"] < body["score"]["value"] < body["score"]["high"]
    labels = [each["label"] for each in body["sets_removed_from_model"]]
    assert labels == ["circuit", "random like circuit", "circuit, heads only", "random like circuit, heads only"]


def test_an_evaluation_survives_its_file(tiny, tiny_circuit, tmp_path):
    found = evaluate(tiny, tiny_circuit, draws=2, resamples=50)
    json.dumps(found.body, allow_nan=False)
    assert load(Finding, save_finding(found, tmp_path)) == found


@pytest.mark.parametrize(
    ("circuit", "sentence"),
    [
        (circuit_of(), "The circuit mine is empty"),
        (circuit_of("m0", model="other"), "found in the model 'other', not in 'by-hand'"),
        (circuit_of("m1", n_layers=2), "2 layers x 3 heads, but the model here has 1 x 3"),
        (circuit_of("m0", level=Level.EDGE), "a circuit of edges"),
    ],
)
def test_evaluation_refuses_a_circuit(by_hand, circuit, sentence):
    with pytest.raises(CircuitError, match=sentence):
        evaluate(by_hand, circuit, label="mine")
    with pytest.raises(CircuitError, match=sentence):
        cross_task([("t", by_hand)], {"mine": circuit})


def test_evaluation_refuses_settings(by_hand):
    with pytest.raises(ConfigError, match="draws must be at least 1"):
        evaluate(by_hand, circuit_of("m0"), draws=0)
    with pytest.raises(CircuitError, match="The circuit of the shared set is empty"):
        evaluate(by_hand, circuit_of("m0"), shared=circuit_of())


def test_a_score_that_is_no_number_is_refused(by_hand, monkeypatch):
    by_hand.baseline()
    monkeypatch.setattr(by_hand, "score", lambda masks, base=None: torch.full((len(masks), 2), torch.nan))
    with pytest.raises(MeasurementError, match="give NaN or infinite logit_diff"):
        evaluate(by_hand, circuit_of("a0.h0"))


# Circuits on tasks


def test_cross_task_by_hand(by_hand):
    model = by_hand.model
    turned = replace(by_hand.prompts, answers=by_hand.prompts.wrongs, wrongs=by_hand.prompts.answers)
    with pytest.raises(MeasurementError, match="cannot do this task"):
        cross_task([("turned", engines(model, turned, Zero())[0])], {"a": circuit_of("a0.h0")})
    again = engines(model, by_hand.prompts, Zero())[0]
    circuits = {"a": circuit_of("a0.h0", "a0.h1"), "b": circuit_of("a0.h2")}
    body = cross_task(iter([("one", by_hand), ("two", again)]), circuits, controls={"c": circuit_of("a0.h1")}, draws=7).body
    assert body["circuits"] == ["a", "b", "c", "random like a", "random like b"]
    assert body["controls"] == ["c", "random like a", "random like b"]
    assert (body["tasks"], body["n_prompts"]) == (["one", "two"], {"one": 2, "two": 2})
    assert [row[0]["value"] for row in body["percent"][:3]] == pytest.approx([80, 20, 30])
    assert [row[1]["value"] for row in body["percent"][:3]] == pytest.approx([80, 20, 30])
    for place, label in ((3, "a"), (4, "b")):
        scores = body["random_scores"]["one"][f"random like {label}"]
        assert len(scores) == 7
        assert body["percent"][place][0]["value"] == pytest.approx(sum(scores) / 7)
    assert body["members"]["a"] == ["a0.h0", "a0.h1"]


def test_cross_task_agrees_with_the_engine(tiny, tiny_circuit):
    body = cross_task([("t", tiny)], {"mine": tiny_circuit}, draws=0).body
    assert (body["circuits"], body["controls"]) == (["mine"], [])
    assert body["percent"][0][0]["value"] == pytest.approx(tiny.percent(tiny_circuit.mask(tiny.universe)[None]).item(), abs=1e-3)
    json.dumps(body, allow_nan=False)


def test_cross_task_refuses(by_hand):
    a = circuit_of("a0.h0")
    with pytest.raises(ConfigError, match="at least one circuit"):
        cross_task([("t", by_hand)], {})
    with pytest.raises(ConfigError, match="a is the label of several circuits"):
        cross_task([("t", by_hand)], {"a": a}, controls={"a": a})
    with pytest.raises(ConfigError, match="tasks is empty"):
        cross_task([], {"a": a})


# Stability


def test_stability_by_hand():
    def run(*names, corruption="random", seed=0, order="backward", threshold=0.8):
        return SearchRun(circuit_of(*names, score=81.0), corruption, seed, order, threshold)

    shuffled, forward = run("a0.h0", "a0.h1", "m0", corruption="shuffled"), run("m0", seed=1, order="forward")
    runs = [run("a0.h0", "m0"), shuffled, run("a0.h1", "m0", seed=1), forward]
    found = stability(runs, task="t")
    body = found.body
    assert (found.kind, body["task"], body["model"]) == ("stability", "t", "by-hand")
    assert body["runs"][2] == {
        "label": "random-seed1-backward-0.8", "corruption": "random", "seed": 1, "order": "backward", "threshold": 0.8, "score": 81.0,
        "nodes": ["a0.h1", "m0"],
    }  # fmt: skip
    assert body["nodes"] == {"a0.h0": {"share": 0.5}, "a0.h1": {"share": 0.5}, "m0": {"share": 1.0}}
    assert body["survive_all"] == ["m0"]
    assert body["survive_corruptions"] == ["a0.h0", "m0"], "of the first two runs, which differ in their corruption alone"
    pairs = [2 / 3, 1 / 3, 1 / 2, 2 / 3, 1 / 3, 1 / 2]
    assert body["mean_jaccard"] == {
        "all": pytest.approx(sum(pairs) / 6),
        "corruption": pytest.approx(2 / 3),
        "seed": pytest.approx(1 / 3),
        "order": pytest.approx(1 / 2),
        "threshold": None,
    }


def test_stability_of_one_search_without_settings():
    body = stability([SearchRun(circuit_of("m0"))]).body
    assert body["runs"][0]["label"] == "run"
    assert body["survive_all"] == body["survive_corruptions"] == ["m0"]
    assert set(body["mean_jaccard"].values()) == {None}


def test_a_star_varies_one_factor_at_a_time():
    values = [["a", "b"], [0, 1, 2], ["up"], [None]]
    assert list(DESIGNS["star"](values)) == [
        ("a", 0, "up", None), ("b", 0, "up", None), ("a", 1, "up", None), ("a", 2, "up", None),
    ]  # fmt: skip
    assert len(list(DESIGNS["grid"](values))) == 6


def test_stability_refuses():
    with pytest.raises(ConfigError, match="at least one run"):
        stability([])
    with pytest.raises(ConfigError, match="settings of its own; found random, random"):
        stability([SearchRun(circuit_of("m0"), "random"), SearchRun(circuit_of("m0"), "random")])


# Prompts that the model can do


class Given:
    """A task of given prompts."""

    name, n, seed = "given", None, 0

    def __init__(self, prompts, filter=True):
        self.given, self.filter = prompts, filter

    def prompts(self, tokenizer, *, n=None, seed=None, accept=None):
        kept = self.given if accept is None else accept(self.given)
        if accept is not None and not kept.any():
            raise PromptError("None is left.")
        return self.given if accept is None else self.given.take(kept)


@pytest.fixture(scope="module")
def half_solved(tiny):
    """Twelve prompts of which six are solved: the others have the wrong token for an answer."""
    prompts, swapped = tiny.prompts, torch.arange(12) % 2 == 0
    return replace(
        prompts,
        answers=torch.where(swapped, prompts.wrongs.tokens, prompts.answers.tokens),
        wrongs=torch.where(swapped, prompts.answers.tokens, prompts.wrongs.tokens),
    )


def n_solved(tiny, prompts):
    from circuitkit.engine.filtering import Solves

    return int(Solves(tiny.model)(prompts).sum())


def test_a_task_that_the_model_can_do_in_part(tiny, half_solved, caplog):
    solved = n_solved(tiny, half_solved)
    assert 0 < solved <= 6
    assert len(draw_solvable(Given(half_solved), tiny.model)) == solved
    assert len(draw_solvable(Given(half_solved, filter=False), tiny.model)) == 12
    with pytest.raises(MeasurementError, match=rf"solves {solved} of the 12 prompts drawn for given .* At least 90 % .* force=true"):
        draw_solvable(Given(half_solved), tiny.model, least_accuracy=0.9)
    assert len(draw_solvable(Given(half_solved), tiny.model, least_accuracy=0.9, force=True)) == solved
    assert "but force is set" in caplog.text


def test_a_task_that_the_model_cannot_do(tiny, half_solved):
    none = half_solved.take(torch.arange(12) % 2 == 0)
    for filtered in (True, False):
        with pytest.raises(MeasurementError, match=r"solves 0 of the 6 prompts drawn for given \(0.0 %\)"):
            draw_solvable(Given(none, filtered), tiny.model, least_accuracy=0)
        assert len(draw_solvable(Given(none, filtered), tiny.model, force=True)) == 6


def test_least_accuracy_is_a_share(tiny, half_solved):
    with pytest.raises(ConfigError, match=r"least_accuracy must be in \[0, 1\]"):
        draw_solvable(Given(half_solved), tiny.model, least_accuracy=10)
