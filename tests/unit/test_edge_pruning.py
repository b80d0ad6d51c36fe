"""The paper's second stage: planted paths, the naive engine, going on where it stopped, close decisions, and the files of a run."""

from __future__ import annotations

import json

import pytest
import torch
from models_for_tests import PATCHERS, PLANTED, engines, planted_model, planted_prompts, random_masks, shared_model, solvable_prompts
from test_runner import Toy, run

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError, ConfigError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Level, Node
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.loggers import JsonlLogger
from circuitkit.methods import EdgePruning
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.storage import load, save

RULES = ("single", "cumulative")


def pruned(engine, circuit, history=(), **settings):
    """The circuit and the steps of a search."""
    steps = []
    method = EdgePruning(circuit, **settings)
    return method.discover(method.over(engine), on_step=steps.append, history=history), steps


# A circuit whose paths are known

WITH_NOISE = Circuit(tuple(Node.parse(name) for name in (*PLANTED, "a1.h2", "m3")), 4, 3)
TRUE = ["input->a0.h1<v>", "a0.h1->m1", "m1->a2.h0<v>", "a2.h0->logits"]


@pytest.mark.parametrize(("engine_class", "split"), [(PackedEngine, True), (PackedEngine, False), (ReferenceEngine, False)])
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"rule": "single", "mlps": "freeze"}, []),
        ({"rule": "single"}, ["a0.h1->a2.h0<v>"]),  # m1 lies between and recomputes
        ({"rule": "cumulative"}, []),
    ],
    ids=["direct", "paths", "cumulative"],
)
def test_planted_paths_are_found(engine_class, settings, more, split):
    engine = engine_class(planted_model(), planted_prompts(), Mean(), LogitDiff())
    circuit, steps = pruned(engine, WITH_NOISE, split=split, **settings)
    expected = {name if split else name.replace("<v>", "") for name in [*TRUE, *more]}
    assert {str(edge) for edge in circuit.edges} == expected == {step.node for step in steps if step.kept}
    assert circuit.names == PLANTED and circuit.level is (Level.EDGE_QKV if split else Level.EDGE)
    assert circuit.provenance["dropped_nodes"] == ["a1.h2", "m3"]
    assert circuit.score == pytest.approx(100.0, abs=1e-3) and circuit.provenance["node_score"] == pytest.approx(100.0, abs=1e-3)
    graph = EdgeUniverse(WITH_NOISE.nodes, circuit.level)
    assert [step.order for step in steps] == list(range(len(graph))) and {step.total for step in steps} == {len(graph)}
    order = list(graph) if settings["rule"] == "single" else list(reversed(graph.edges))
    assert [step.node for step in steps] == [str(edge) for edge in order]
    assert circuit.provenance["edge_scores"] == {step.node: step.score for step in steps}


# The same decisions whatever the engine


@pytest.mark.parametrize(
    ("family", "patcher", "split", "rule"),
    [
        ("llama", "conditional_all", True, "single"),
        ("gpt2", "mean_all", True, "cumulative"),
        ("gpt_neox_parallel", "halfway", False, "cumulative"),
    ],
)
def test_both_engines_decide_alike(family, patcher, split, rule):
    model = shared_model(family, 3, 4)
    prompts = solvable_prompts(model, 4, 4)
    circuit = Circuit.of(model.universe, random_masks(1, len(model.universe), seed=5)[0])
    fast, naive = engines(model, prompts, PATCHERS[patcher])
    threshold = 0.9 * fast.percent(circuit.mask(model.universe)[None]).item() / 100
    (fast, steps), (naive, expected) = (pruned(engine, circuit, rule=rule, split=split, threshold=threshold) for engine in (fast, naive))
    assert [(step.node, step.kept, step.size) for step in steps] == [(step.node, step.kept, step.size) for step in expected]
    assert [step.score for step in steps] == pytest.approx([step.score for step in expected], abs=1e-2)
    assert fast.edges == naive.edges and fast.nodes == naive.nodes
    assert fast.score == pytest.approx(naive.score, abs=1e-2)
    assert {step.kept for step in steps} == {True, False}


@pytest.mark.parametrize("rule", RULES)
def test_the_score_is_that_of_the_graph_that_is_left(rule):
    """Of the kept edges; those that lead nowhere, which are left out, would not change it."""
    model = shared_model("llama", 3, 4)
    engine = PackedEngine(model, solvable_prompts(model, 4, 4), Mean(), LogitDiff())
    circuit = Circuit.of(model.universe, random_masks(1, len(model.universe), seed=1)[0])
    found, steps = pruned(engine, circuit, rule=rule, threshold=0.5)
    edges = ReferenceEngine(model, engine.prompts, Mean(), LogitDiff()).edges(circuit)
    kept = edges.universe.mask(step.node for step in steps if step.kept)
    live, whole = edges.universe.mask(found.edges), edges.universe.full()
    assert (live & ~kept).sum() == 0 and (found.nodes, found.edges) == edges.universe.live(kept)
    expected = edges.percent(torch.stack([live, kept, whole])).tolist()
    assert [found.score, found.score, found.provenance["node_score"]] == pytest.approx(expected, abs=1e-2)
    if rule == "cumulative":  # the score of the last removal
        assert found.score == pytest.approx(next(step.score for step in reversed(steps) if not step.kept), abs=1e-2)


def test_what_is_removed_stays_removed():
    """Two equal ways to the logits: each alone is dispensable at 40 %, both are not."""
    engine, _ = engines(planted_model(), planted_prompts(), Zero())
    with torch.no_grad():
        weight = engine.model.module(2, "out_proj").weight
        weight[4, 2] = weight[4, 0]  # a2.h1 does what a2.h0 does
        engine.model.module(2, "attention").v_proj.weight[2] = engine.model.module(2, "attention").v_proj.weight[0]
    circuit = Circuit(tuple(Node.parse(name) for name in (*PLANTED, "a2.h1")), 4, 3)
    single, _ = pruned(engine, circuit, rule="single", threshold=0.4)
    cumulative, _ = pruned(engine, circuit, rule="cumulative", threshold=0.4)
    ends = ["a2.h0->logits", "a2.h1->logits"]
    assert not {str(edge) for edge in single.edges} & set(ends) and single.score < 40
    assert [str(edge) for edge in cumulative.edges if str(edge) in ends] == ends[:1]  # the last is tried first
    assert cumulative.score > 40


# Going on where an earlier process stopped


class Wide(PackedEngine):
    """Lets a search guess far ahead."""

    batch = 6


@pytest.mark.parametrize("rule", RULES)
def test_from_every_step_it_goes_on_to_the_same(rule, monkeypatch):
    """To the last bit, and with nothing scored that is known, by the fast or by the naive path."""
    asked = []

    def counting(call):
        return lambda self, what: asked.append(1) or call(self, what)

    for cls, name in ((PackedEdges, "alone"), (EdgeEngine, "certain_alone"), (EdgeEngine, "certain")):
        monkeypatch.setattr(cls, name, counting(getattr(cls, name)))
    circuit = Circuit(tuple(Node.parse(name) for name in (*PLANTED, "m3")), 4, 3)
    model, prompts = planted_model(), planted_prompts()
    first = pruned(Wide(model, prompts, Mean(), LogitDiff()), circuit, rule=rule)[1]
    threshold = min(step.score for step in first) / 100  # some are just at the border

    def discovered(history=()):
        asked.clear()
        return *pruned(Wide(model, prompts, Mean(), LogitDiff()), circuit, history, rule=rule, threshold=threshold), len(asked)

    found, steps, whole = discovered()
    assert whole > 0
    for done in range(0, len(steps) + 1, 4):
        again, after, scored = discovered(steps[:done])
        assert after == steps and again == found and again.score == found.score
        assert scored <= whole
    assert discovered(steps)[2] == 0


# Close decisions


@pytest.mark.parametrize("rule", RULES)
def test_close_decisions_are_taken_by_the_naive_path(rule, monkeypatch):
    model = shared_model("gpt2", 2, 2)
    engine = PackedEngine(model, solvable_prompts(model, 4, 4), Mean(), LogitDiff())
    circuit = Circuit(model.universe.nodes, 2, 2)
    name = "certain_alone" if rule == "single" else "certain"
    asked, certain = [], getattr(EdgeEngine, name)
    monkeypatch.setattr(EdgeEngine, name, lambda self, what: asked.append(1) or certain(self, what) + 1e-3)
    _, steps = pruned(engine, circuit, rule=rule, threshold=0.8)
    assert not asked and all(abs(step.score - 80) > 0.01 for step in steps)
    close = steps[3].score  # now the threshold is just there: the naive path's word, here a thousandth more, is final
    _, again = pruned(engine, circuit, rule=rule, threshold=close / 100)
    assert asked and again[3].node == steps[3].node and again[3].score == pytest.approx(close + 1e-3, abs=3e-4)
    assert not again[3].kept
    assert len(asked) >= sum(abs(step.score - 1e-3 - close) < 1e-3 / 2 for step in again)


# A run and its files


@pytest.mark.parametrize("rule", RULES)
def test_the_files_of_a_run(tmp_path, rule):
    path = save(WITH_NOISE, tmp_path / "nodes.json")
    result = run(loggers=[JsonlLogger(tmp_path / "run")], method=EdgePruning(str(path), rule=rule, mlps="freeze"))
    circuit, finding = load(Circuit, tmp_path / "run" / "circuit.json"), load(Finding, tmp_path / "run" / "edges.json")
    assert circuit == result.circuit and circuit.names == PLANTED and [str(edge) for edge in circuit.edges] == TRUE
    assert finding.kind == "edges" and set(finding.body) == {
        "task", "model", "nodes", "level", "rule", "mlps", "threshold", "node_score", "score", "edges", "kept", "dropped_nodes"
    }  # fmt: skip
    body = finding.body
    assert (body["task"], body["model"], body["level"], body["rule"], body["mlps"]) == ("toy", "by-hand", "edge_qkv", rule, "freeze")
    assert body["threshold"] == 80.0 and body["score"] == circuit.score and body["kept"] == TRUE
    assert sorted(body["nodes"]) == sorted(WITH_NOISE.names) and body["dropped_nodes"] == ["a1.h2", "m3"]
    assert body["edges"] == {step.node: step.score for step in result.steps} and len(result.steps) == len(EdgeUniverse(WITH_NOISE.nodes))
    assert finding.provenance["model"]["fingerprint"] == circuit.provenance["model"]["fingerprint"] == planted_model().fingerprint()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = {key: value for row in rows for key, value in row.items() if key.startswith("circuit/")}
    assert (summary["circuit/n_edges"], summary["circuit/size"], summary["circuit/score"]) == (4, 3, circuit.score)


def test_a_run_that_keeps_no_edge(tmp_path):
    """Its score is that of the circuit on the corrupt prompts, and not that of the model with everything replaced."""
    nodes = Circuit(tuple(Node.parse(name) for name in PLANTED), 4, 3)
    result = run(
        loggers=[JsonlLogger(tmp_path)], method=EdgePruning(nodes, threshold=0.01, edge_patcher=Resample()), task=Toy(n=5), patcher=Zero()
    )
    corrupt = planted_model().hf(result.prompts.corrupt).logits[:, -1, 1].mean() / result.baseline.clean.mean()
    assert result.circuit.edges == result.circuit.nodes == () and len(result.circuit.provenance["dropped_nodes"]) == 3
    assert result.circuit.score == pytest.approx(100 * corrupt.item(), abs=1e-3) and result.circuit.score > 1
    assert load(Circuit, tmp_path / "circuit.json") == result.circuit and load(Finding, tmp_path / "edges.json").body["kept"] == []


# Settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": 0}, r"method.threshold must be in \(0, 1\], found 0"),
        ({"threshold": 80}, r"found 80. It is the share"),
        ({"threshold": float("nan")}, "found nan"),
        ({"rule": "cumulativ"}, "no rule for edges .* named 'cumulativ'. Did you mean 'cumulative'. Choices: cumulative, single"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        EdgePruning(WITH_NOISE, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"mlps": "frozen"}, ConfigError, "Choices: freeze, recompute"),
        ({"circuit": "nowhere/circuit.json"}, CircuitError, "The circuit file 'nowhere/circuit.json' cannot be read"),
        ({"circuit": Circuit((), 4, 3)}, CircuitError, "The circuit is empty"),
        ({"circuit": WITH_NOISE.__class__(WITH_NOISE.nodes, 4, 3, level=Level.EDGE_QKV)}, CircuitError, "a circuit of nodes was expected"),
        ({"circuit": Circuit(WITH_NOISE.nodes, 12, 12)}, CircuitError, "12 layers x 12 heads"),
    ],
)
def test_what_only_the_model_can_refuse(settings, error, text):
    engine, _ = engines(planted_model(), planted_prompts(), Zero())
    with pytest.raises(error, match=text):
        pruned(engine, **{"circuit": WITH_NOISE, **settings})
