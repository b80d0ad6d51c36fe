"""Single knock-outs and random circuits: what they score, what they return, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import PLANTED, engines, linear_llama, planted_model, planted_prompts, shared_model, solvable_prompts, wire_head

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError, ConfigError
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.methods import Knockout, RandomCircuit
from circuitkit.patchers import Mean, Zero
from circuitkit.storage import save


def nothing(step):
    """Takes steps and does nothing with them."""


def scored(method, engine) -> tuple[Scores, list]:
    steps = []
    return method.discover(engine, on_step=steps.append), steps


@pytest.fixture
def parts():
    """Heads of one layer that give 50, 30 and 20 % of the logit difference."""
    model = linear_llama(n_layers=1, n_heads=3, d_model=6, vocab=4)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.tensor([0.0, 0.0, 0.0, 10.0])
        for head, weight in enumerate((5.0, 3.0, 2.0)):
            wire_head(model, 0, head, 1, 2, weight)
        model.hf.lm_head.weight[1, 2] = 1.0
    one = torch.tensor([1])
    return engines(model, PromptSet(torch.tensor([[3, 3]]), torch.tensor([[0, 3]]), one, one + 1, one - 1), Zero())[0]


# Knock-outs


def test_knockouts_of_the_full_model_by_hand(parts):
    scores, steps = scored(Knockout(), parts)
    assert scores.values == pytest.approx({"a0.h0": 50.0, "a0.h1": 70.0, "a0.h2": 80.0, "m0": 100.0})
    assert [(step.node, step.score, step.order, step.total) for step in steps] == [
        (name, score, order, 4) for order, (name, score) in enumerate(scores.values.items())
    ]
    assert (scores.unit, scores.n_layers, scores.n_heads, scores.model) == ("% of the untouched model", 1, 3, "by-hand")


@pytest.mark.parametrize("from_file", [False, True])
def test_knockouts_of_a_circuit_by_hand(parts, from_file, tmp_path):
    """In the circuit of heads 0 and 1 (80 %), still in % of the untouched model."""
    circuit = Circuit(tuple(map(Node.parse, ("a0.h0", "a0.h1"))), 1, 3, "by-hand")
    given = str(save(circuit, tmp_path / "circuit.json")) if from_file else circuit
    scores, _ = scored(Knockout(given), parts)
    assert scores.values == pytest.approx({"a0.h0": 30.0, "a0.h1": 50.0})


def test_knockouts_agree_with_the_naive_path():
    model = shared_model("mistral", 3, 3)
    prompts = solvable_prompts(model, 5, 4)
    fast, naive = (scored(Knockout(), engine)[0].values for engine in engines(model, prompts, Mean("conditional")))
    assert fast == pytest.approx(naive, abs=1e-3) and list(fast) == [str(node) for node in model.universe]


def test_a_circuit_of_another_model(parts):
    with pytest.raises(CircuitError, match="with 2 layers x 3 heads, but the model here has 1 x 3"):
        Knockout(Circuit((), 2, 3)).discover(parts, on_step=nothing)
    with pytest.raises(CircuitError, match="found in the model 'gpt2', not in 'by-hand'"):
        Knockout(Circuit((), 1, 3, "gpt2")).discover(parts, on_step=nothing)


def test_a_circuit_without_members_has_no_knockouts(parts):
    with pytest.raises(CircuitError, match="no member|empty"):
        Knockout(Circuit((), 1, 3)).discover(parts, on_step=nothing)


# Random circuits


def test_random_circuits_have_the_size_that_was_asked_for():
    engine, naive = engines(planted_model(), planted_prompts(), Mean())
    scores, steps = scored(RandomCircuit(n_heads=4, n_mlps=2, draws=12, seed=3), engine)
    members = scores.provenance["members"]
    assert list(scores.values) == list(members) == [f"draw{order}" for order in range(12)]
    for name, drawn in members.items():
        assert len(set(drawn)) == 6 and sum(node.startswith("a") for node in drawn) == 4
        assert scores.values[name] == pytest.approx(naive.percent(naive.universe.mask(drawn)[None]).item(), abs=1e-3)
    assert len({tuple(drawn) for drawn in members.values()}) > 6
    assert all(step.size == 6 for step in steps)


def test_a_draw_scores_100_percent_just_if_it_has_the_planted_circuit():
    """The control can tell: the rest of the model is noise, so nothing less than the circuit gives anything."""
    engine, _ = engines(planted_model(n_layers=3, n_heads=2), planted_prompts(), Zero())
    scores, _ = scored(RandomCircuit(n_heads=5, n_mlps=2, draws=40), engine)
    having = {name: set(PLANTED) <= set(drawn) for name, drawn in scores.provenance["members"].items()}
    assert 0 < sum(having.values()) < 40
    assert scores.values == pytest.approx({name: 100.0 if all_in else 0.0 for name, all_in in having.items()}, abs=1e-3)


def test_the_seed_decides_the_draws(parts):
    drawn = [scored(RandomCircuit(n_heads=1, n_mlps=0, draws=8, seed=seed), parts)[0].provenance["members"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_like_a_circuit_and_without_some_nodes(parts, tmp_path):
    like = save(Circuit(tuple(map(Node.parse, ("a0.h0", "a0.h1", "m0"))), 1, 3), tmp_path / "like.json")
    scores, _ = scored(RandomCircuit(like=like, draws=5, exclude=["a0.h0"]), parts)
    assert all(drawn == ["a0.h1", "a0.h2", "m0"] for drawn in scores.provenance["members"].values())
    assert list(scores.values.values()) == pytest.approx([50.0] * 5)
    one, _ = scored(RandomCircuit(n_heads=2, n_mlps=0, draws=3, exclude="a0.h1"), parts)
    assert all(drawn == ["a0.h0", "a0.h2"] for drawn in one.provenance["members"].values())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "either method.like=<circuit file>, or both"),
        ({"n_heads": 3}, "either method.like=<circuit file>, or both"),
        ({"like": "x.json", "n_heads": 3, "n_mlps": 1}, "either method.like=<circuit file>, or both"),
        ({"like": "x.json", "n_heads": 3}, "either method.like=<circuit file>, or both"),
        ({"n_heads": 1, "n_mlps": 1, "draws": 0}, "method.draws must be at least 1, found 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        RandomCircuit(**settings)


@pytest.mark.parametrize(("n_heads", "n_mlps"), [(4, 0), (0, 2), (-1, 1)])
def test_sizes_that_cannot_be_drawn(parts, n_heads, n_mlps):
    with pytest.raises(ConfigError, match=rf"draw {n_heads} heads and {n_mlps} MLPs|at least 0"):
        RandomCircuit(n_heads=n_heads, n_mlps=n_mlps).discover(parts, on_step=nothing)
