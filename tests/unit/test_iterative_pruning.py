"""The paper's search: planted circuits, an independent re-implementation, speculation, and its settings."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from models_for_tests import (
    PATCHERS,
    PLANTED,
    engines,
    linear_llama,
    planted_model,
    planted_prompts,
    shared_model,
    solvable_prompts,
    wire_head,
    wire_mlp,
)

from circuitkit.core.errors import CircuitError, ConfigError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.methods import IterativePruning
from circuitkit.methods.iterative_pruning import candidates_in
from circuitkit.metrics import KL, LogitDiff
from circuitkit.patchers import Mean, Zero


class WideEngine(PackedEngine):
    """Lets a search guess far ahead, as it may on a GPU."""

    batch = 8


def pruned(engine, **settings):
    """The circuit and the steps of a search."""
    steps = []
    circuit = IterativePruning(**settings).discover(engine, on_step=steps.append)
    return circuit, steps


# A circuit that is known


@pytest.mark.parametrize("patcher", ["zero", "mean_all", "mean_group", "resample", "conditional_all"])
@pytest.mark.parametrize("order", ["backward", "forward"])
def test_a_planted_circuit_is_found(patcher, order):
    """Three components hand the number on; nine heads and three MLPs write noise that never reaches the logits."""
    engine, _ = engines(planted_model(), planted_prompts(), PATCHERS[patcher])
    circuit, steps = pruned(engine, order=order)
    assert circuit.names == PLANTED
    assert circuit.score == pytest.approx(100.0, abs=1e-3)
    assert [step.node for step in steps if step.sweep == 0 and step.kept] == list(PLANTED if order == "forward" else PLANTED[::-1])
    assert len(steps) == 16 + 3  # every node, then the three that are left, and nothing changed


def half_and_half() -> PackedEngine:
    """Values reach the logits by three ways: m2 gives 15 %, a1.h0 15 % and a0.h0 70 %."""
    model = linear_llama(n_layers=3, n_heads=1, d_model=4, vocab=4)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.tensor([0.0, 0.0, 0.0, 10.0])
        wire_head(model, 0, 0, 1, 2, 7.0)
        wire_head(model, 1, 0, 1, 2, 1.5)
        wire_mlp(model, 2, 1, 2, 1.5)
        model.hf.lm_head.weight[1, 2] = 1.0
    one = torch.tensor([1])
    return PackedEngine(model, PromptSet(torch.tensor([[3, 3]]), torch.tensor([[0, 0]]), one, one + 1, one - 1), Mean(), LogitDiff())


def test_the_result_depends_on_the_order_as_computed_by_hand():
    """Whichever of the two small ways is met first is removed (85 %); then the other one is needed (70 %)."""
    backward, steps = pruned(half_and_half(), order="backward")
    assert backward.names == ("a0.h0", "a1.h0") and backward.score == pytest.approx(85.0)
    # Nothing else matters: m1 and m0 stand at what is left, a2.h0 too.
    expected = [
        ("m2", 85.0, False),
        ("a2.h0", 85.0, False),
        ("m1", 85.0, False),
        ("a1.h0", 70.0, True),
        ("m0", 85.0, False),
        ("a0.h0", 15.0, True),
    ]
    assert [(step.node, step.kept) for step in steps[:6]] == [(node, kept) for node, _, kept in expected]
    assert [step.score for step in steps[:6]] == pytest.approx([score for _, score, _ in expected], abs=1e-3)
    forward, _ = pruned(half_and_half(), order="forward")
    assert forward.names == ("a0.h0", "m2")


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.84, ("a0.h0", "a1.h0")), (0.86, ("a0.h0", "a1.h0", "m2")), (0.6, ("a0.h0",)), (0.1, ("a0.h0",))]
)
def test_the_threshold_is_a_share_of_the_untouched_models_score(threshold, kept):
    """m2 goes where 85 % is enough, a1.h0 too where 70 % is; without a0.h0 as well nothing is left."""
    assert pruned(half_and_half(), threshold=threshold)[0].names == kept


def test_a_score_that_just_reaches_the_threshold_does_not_exceed_it():
    """85 % is not more than 85 %: close decisions go to the naive path and are strict."""
    model_engine = half_and_half()
    asked = []
    certain = model_engine.certain
    model_engine.certain = lambda mask: asked.append(1) or certain(mask)
    _, steps = pruned(model_engine, threshold=0.85)
    first = steps[0]
    assert first.node == "m2" and first.score == pytest.approx(85.0, abs=1e-4)
    assert first.kept == (not first.score > 85.0)
    assert asked


# The same by an independent re-implementation of the published rule, on the naive engine


def by_the_book(engine: ReferenceEngine, threshold: float, order: str, keep=(), max_sweeps=None):
    """Facts 3.2: (node, kept, score) of every evaluation, in order."""
    layers, n_heads = range(engine.model.n_layers), engine.model.n_heads
    inside = {f"a{layer}.h{head}" for layer in layers for head in range(n_heads)} | {f"m{layer}" for layer in layers}
    log, backward, sweeps = [], order == "backward", 0
    while max_sweeps is None or sweeps < max_sweeps:
        changed = False
        for layer in reversed(layers) if backward else layers:
            heads = [f"a{layer}.h{head}" for head in range(n_heads)]
            for name in [f"m{layer}", *heads] if backward else [*heads, f"m{layer}"]:
                if name not in inside or name in keep:
                    continue
                score = engine.percent(engine.universe.mask(inside - {name})[None]).item()
                removed = 100 - score < 100 * (1 - threshold)
                log.append((name, not removed, score))
                if removed:
                    inside.remove(name)
                    changed = True
        sweeps, backward = sweeps + 1, not backward
        if not changed:
            break
    return inside, log


@lru_cache
def the_books_answer(family: str, patcher: str, order: str, threshold: float):
    model = shared_model(family, 3, 3)
    prompts = solvable_prompts(model, 4, 4)
    return model, prompts, by_the_book(ReferenceEngine(model, prompts, PATCHERS[patcher], LogitDiff()), threshold, order)


def assert_as_the_book_says(engine, answer, **settings):
    circuit, steps = pruned(engine, **settings)
    inside, log = answer
    assert [(step.node, step.kept) for step in steps] == [(name, kept) for name, kept, _ in log]
    assert [step.score for step in steps] == pytest.approx([score for *_, score in log], abs=1e-3)
    assert set(circuit.names) == inside
    return steps


@pytest.mark.parametrize("engine_class", [PackedEngine, WideEngine, ReferenceEngine])
@pytest.mark.parametrize("patcher", ["mean_all", "mean_group", "conditional_all", "zero"])
@pytest.mark.parametrize(
    ("family", "order", "threshold"), [("gpt2", "backward", 0.8), ("llama", "forward", 0.8), ("gpt_neox_parallel", "backward", 0.9)]
)
def test_every_decision_is_as_the_book_says(family, order, threshold, patcher, engine_class):
    model, prompts, answer = the_books_answer(family, patcher, order, threshold)
    engine = engine_class(model, prompts, PATCHERS[patcher], LogitDiff())
    steps = assert_as_the_book_says(engine, answer, threshold=threshold, order=order)
    assert any(step.kept for step in steps) and not all(step.kept for step in steps)


@pytest.mark.parametrize("patcher", ["mean_all", "conditional_all"])
@pytest.mark.parametrize("seed", range(4))
def test_guessing_ahead_changes_nothing_but_the_number_of_passes(patcher, seed):
    model = shared_model("gpt2", 4, 4)
    prompts = solvable_prompts(model, 3, 4, seed=seed)
    logs, scores, passes = [], [], []
    for engine_class, speculate in ((PackedEngine, False), (WideEngine, True), (WideEngine, False)):
        engine = engine_class(model, prompts, PATCHERS[patcher], LogitDiff())
        _, steps = pruned(engine, speculate=speculate)
        logs.append([(step.node, step.kept, step.sweep, step.order, step.size, step.direction, step.total) for step in steps])
        passes.append(engine.work.passes - engine.work.corrupt_passes)
        scores.append([step.score for step in steps])
    assert scores[1] == pytest.approx(scores[0], abs=1e-3) and scores[2] == scores[0]
    assert logs[0] == logs[1] == logs[2]
    assert passes[0] == passes[2] > passes[1]


@pytest.mark.parametrize("metric", [KL(), LogitDiff()])
def test_a_metric_where_less_is_better(metric):
    """100 % is no divergence and 0 % everything replaced, so the same rule holds."""
    model = shared_model("qwen2", 2, 2)
    prompts = solvable_prompts(model, 4, 4)
    circuit, steps = pruned(PackedEngine(model, prompts, Mean(), metric), threshold=0.7)
    naive = ReferenceEngine(model, prompts, Mean(), metric)
    assert naive.percent(circuit.mask(naive.universe)[None]).item() > 70
    for step in steps:
        assert step.kept == (not step.score > 70)


# Settings


def test_candidates_in_order():
    graph = Universe.of_nodes(2, 2)
    assert [str(node) for node in candidates_in(graph, "backward")] == ["m1", "a1.h0", "a1.h1", "m0", "a0.h0", "a0.h1"]
    assert [str(node) for node in candidates_in(graph, "forward")] == ["a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    spans = Universe.of_nodes(1, 1, ("S1", "last"))
    assert [str(node) for node in candidates_in(spans, "backward")] == ["m0@S1", "m0@last", "a0.h0@S1", "a0.h0@last"]


def test_steps_say_where_the_search_is():
    _, steps = pruned(half_and_half())
    assert [step.order for step in steps] == list(range(len(steps)))
    assert [(step.sweep, step.direction) for step in steps] == [(0, "backward")] * 6 + [(1, "forward")] * 2
    assert [step.size for step in steps] == [5, 4, 3, 3, 2, 2, 2, 2]
    assert [step.total for step in steps] == [6] * 6 + [2] * 2


def test_nodes_that_are_never_removed():
    circuit, steps = pruned(half_and_half(), keep=["m2", "a2.h0"])
    assert circuit.names == ("a0.h0", "a2.h0", "m2")
    assert not {"m2", "a2.h0"} & {step.node for step in steps}


def test_one_name_to_keep_may_be_given_as_text():
    """``keep=m2`` on the command line. Its letters are no nodes."""
    assert pruned(half_and_half(), keep="m2")[0].names == ("a0.h0", "m2")


def test_everything_kept():
    engine = half_and_half()
    circuit, steps = pruned(engine, keep=[str(node) for node in engine.universe])
    assert len(circuit) == 6 and circuit.score == 100.0 and steps == []


@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_number_of_sweeps_is_bounded(sweeps):
    _, steps = pruned(half_and_half(), max_sweeps=sweeps)
    assert {step.sweep for step in steps} == set(range(sweeps))


def test_a_second_sweep_may_remove_more():
    """Somewhere among these a later sweep removes a node that an earlier one had kept; it is never asked about what is out."""
    again = 0
    for seed in range(6):
        model = shared_model("gpt2", 3, 3)
        engine = PackedEngine(model, solvable_prompts(model, 3, 4, seed=seed), Mean(), LogitDiff())
        _, steps = pruned(engine, threshold=0.6)
        gone = set()
        for step in steps:
            assert step.node not in gone
            gone |= set() if step.kept else {step.node}
            again += step.sweep > 0 and not step.kept
    assert again


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": 0}, r"method.threshold must be in \(0, 1\], found 0"),
        ({"threshold": 20}, r"method.threshold must be in \(0, 1\], found 20"),
        ({"threshold": float("nan")}, "found nan"),
        ({"order": "backwards"}, "no order of sweeps .* named 'backwards'. Did you mean 'backward'. Choices: backward, forward"),
        ({"max_sweeps": 0}, "method.max_sweeps must be at least 1, found 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        IterativePruning(**settings)


def test_keeping_what_is_not_there():
    with pytest.raises(CircuitError, match="'m7' is not in this universe: it has layers 0-2"):
        pruned(half_and_half(), keep=["m7"])


def test_zero_ablation_of_a_search_over_positions():
    """The unit is a component at a position: only the last one of the first head matters here, and both earlier tokens for nothing."""
    engine = half_and_half()
    spans = PackedEngine(engine.model, engine.prompts, Zero(), LogitDiff(), Universe.of_nodes(3, 1, ("0", "last")))
    circuit, _ = pruned(spans, threshold=0.6)
    assert circuit.names == ("a0.h0@last",)
