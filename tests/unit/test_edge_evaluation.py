"""Circuits of edges evaluated, crossed, compared and drawn: by hand on a linear model, and against all there can be."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from models_for_tests import engines, paths_model, paths_prompts, shared_model, solvable_prompts

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError
from circuitkit.core.findings import Finding
from circuitkit.core.node import INPUT, LOGITS, Edge, Level, Node
from circuitkit.evaluation import SearchRun, cross_task, evaluate, overlap, stability
from circuitkit.jobs import cross_task as cross_task_job
from circuitkit.jobs import evaluate as evaluate_job
from circuitkit.methods import EdgePruning
from circuitkit.patchers import Mean, Resample
from circuitkit.report.contents import sections
from circuitkit.report.reading import Located, Material
from circuitkit.storage import load, save

# The paths from the input to the logits of the model of test_edges.py, and by how much a unit of value arrives on each.
CHAIN = ("input->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<v>", "a1.h0->m1", "m1->logits")
PATHS = {
    ("input->logits",): 1,
    ("input->a0.h0<v>", "a0.h0->logits"): 1,
    ("input->a0.h0<v>", "a0.h0->m0", "m0->logits"): 10,
    ("input->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<v>", "a1.h0->logits"): 10,
    CHAIN: 10,
    ("input->a0.h0<v>", "a0.h0->a1.h1<v>", "a1.h1->logits"): 2,
    ("input->a0.h0<v>", "a0.h0->a1.h1<v>", "a1.h1->m1", "m1->logits"): 2,
}
CLEAN, CORRUPT = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
WHOLE = 46 * CLEAN.mean().item()  # with the head that lies outside of the frame
FRAME = ("a0.h0", "m0", "a1.h0", "a1.h1", "m1")
KEPT = ("input->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<v>", "m0->logits", "a1.h0->logits")


def nodes(*names):
    return tuple(map(Node.parse, names))


def circuit_of(*edges, within=FRAME, level=Level.EDGE_QKV, n_layers=2, n_heads=2, model="by-hand", **fields):
    """The circuit of these edges and their ends."""
    parsed = [Edge.parse(edge) for edge in edges]
    ends = {end for edge in parsed for end in (edge.src, edge.dst.component_of_port)} - {INPUT, LOGITS}
    return Circuit(tuple(ends), n_layers, n_heads, model, level=level, edges=tuple(parsed), within=nodes(*within), **fields)


def percent(kept, outside=15.0):
    """What is left with these edges: paths that are whole carry the clean value, the others the corrupt one."""
    whole = sum(weight for path, weight in PATHS.items() if set(path) <= set(kept))
    return 100 * (outside + whole * CLEAN.mean().item() + (36 - whole) * CORRUPT.mean().item()) / WHOLE


@pytest.fixture(scope="module", params=[0, 1], ids=["fast", "naive"])
def by_hand(request):
    """The engine over nodes."""
    return engines(paths_model(), paths_prompts(CLEAN, CORRUPT), Mean())[request.param]


def over(engine, circuit, **options):
    return engine.edges(circuit.frame, level=circuit.level, **{"patcher": Resample(), **options})


def test_an_evaluation_by_hand(by_hand):
    circuit = circuit_of(*KEPT)
    engine = over(by_hand, circuit)
    every = [str(edge) for edge in engine.universe]
    body = evaluate(engine, circuit, label="mine", draws=3, resamples=20).body
    assert body["score"]["value"] == pytest.approx(percent(KEPT), abs=1e-3) and percent(KEPT) == pytest.approx(100 * 119 / 184)
    assert list(body["removed_from_circuit"]) == list(body["removed_from_model"]) == body["circuit"]["edges"] == circuit.member_names
    for name in KEPT:
        left = percent(set(KEPT) - {name})
        found = body["removed_from_circuit"][name]
        assert (found["value"], found["drop"]) == pytest.approx((left, percent(KEPT) - left), abs=1e-3)
        assert body["removed_from_model"][name]["value"] == pytest.approx(percent(set(every) - {name}), abs=1e-3)
    entry, control = body["sets_removed_from_model"]
    assert entry["nodes"] == circuit.member_names and entry["score"]["value"] == pytest.approx(percent(set(every) - set(KEPT)), abs=1e-3)
    assert control["in_common"] == 0 and len(control["scores"]) == 3
    assert len(body["random_circuits"]["scores"]) == 3 and body["random_head"] == {"mean_drop": None, "n": 0, "drops": {}}
    assert body["frame"] == list(FRAME) and body["frame_edges"] == len(every) and body["circuit"]["n_edges"] == 5
    json.dumps(body, allow_nan=False)


def test_random_circuits_have_as_many_edges_of_the_frame(by_hand, monkeypatch):
    circuit = circuit_of(*KEPT)
    engine, seen = over(by_hand, circuit), []
    score = type(engine).score
    monkeypatch.setattr(type(engine), "score", lambda self, masks, base=None: seen.append(masks) or score(self, masks, base))
    evaluate(engine, circuit, draws=4, resamples=10)
    assert seen[-1].shape == (4, len(engine.universe)) and seen[-1].sum(1).tolist() == [5] * 4


def test_a_shared_set_of_edges_is_removed_from_the_frame(by_hand):
    circuit, shared = circuit_of(*KEPT), circuit_of("m0->logits")
    engine = over(by_hand, circuit)
    every = {str(edge) for edge in engine.universe}
    sets = evaluate(engine, circuit, shared=shared, draws=1, resamples=10).body["sets_removed_from_model"]
    assert [entry["label"] for entry in sets] == ["circuit", "random like circuit", "the shared set", "random like the shared set"]
    assert sets[2]["score"]["value"] == pytest.approx(percent(every - {"m0->logits"}), abs=1e-3)


@pytest.mark.parametrize(
    ("circuit", "sentence"),
    [
        (circuit_of(), "The circuit circuit is empty, so there is nothing to evaluate. Take one with at least one edge."),
        (circuit_of("input->a0.h0", level=Level.EDGE), "circuit of level edge, and the masks here are over edges of level edge_qkv"),
        (Circuit(nodes(*FRAME), 2, 2, "by-hand"), "This is a circuit of level node, and the masks here are over edges"),
        (circuit_of("a0.h1->logits", within=("a0.h1",)), "a0.h1 is not among its senders"),
    ],
)
def test_what_is_no_circuit_of_these_edges_is_refused(by_hand, circuit, sentence):
    with pytest.raises(CircuitError, match=sentence):
        evaluate(over(by_hand, circuit_of(*KEPT)), circuit)


SMALL = circuit_of("input->a0.h0<v>", "a0.h0->m0", "m0->logits", within=("a0.h0", "m0"))
# With all else at its mean on the corrupt prompts, 12 v + 51 of the logit are left, 10 v of them on the way through m0.
SMALL_LEFT = 100 * (51 + 2 * CORRUPT.mean().item() + 10 * CLEAN.mean().item()) / WHOLE


def test_circuits_of_different_frames_are_crossed_each_in_its_own(by_hand):
    circuit = circuit_of(*KEPT)
    found = [("task", over(by_hand, each)) for each in (circuit, SMALL)]
    body = cross_task(found, {"large": circuit, "small": SMALL}, draws=2, resamples=10).body
    assert [row[0]["value"] for row in body["percent"][:2]] == pytest.approx([percent(KEPT), SMALL_LEFT], abs=1e-3)
    assert body["circuits"] == ["large", "small", "random like large", "random like small"]
    assert body["members"]["small"] == SMALL.member_names and body["level"] == "edge_qkv"
    assert len(body["random_scores"]["task"]["random like small"]) == 2 and body["tasks"] == ["task"] and body["n_prompts"] == {"task": 2}
    with pytest.raises(CircuitError, match="No engine for task is over the edges between the components of small"):
        cross_task(found[:1], {"large": circuit, "small": SMALL})
    with pytest.raises(CircuitError, match="A circuit of level edge_qkv and one of level node cannot be combined"):
        cross_task(found, {"large": circuit, "nodes": SMALL.nodes_only()})


def test_a_cross_task_job_makes_one_engine_for_each_frame():
    circuit, again = circuit_of(*KEPT), circuit_of("input->logits")
    assert [each.frame for each in cross_task_job.frames([circuit, again, SMALL])] == [again.frame, SMALL.frame]
    assert len(cross_task_job.frames([circuit.nodes_only(), SMALL.nodes_only()])) == 1
    with pytest.raises(CircuitError, match="cannot be combined"):
        cross_task_job.frames([circuit, SMALL.nodes_only()])


# Overlap


@pytest.mark.parametrize("parallel", [False, True])
def test_chance_overlap_of_edges_is_that_of_all_pairs_of_sets_of_the_joined_frames(parallel):
    """Circuits of one layer: one was searched between a head and the MLP, the other between another head and the MLP."""
    size = {"level": Level.EDGE, "n_layers": 1, "parallel": parallel}
    a = circuit_of("input->a0.h0", "input->m0", "m0->logits", within=("a0.h0", "m0"), **size)
    b = circuit_of("input->m0", "m0->logits", within=("a0.h1", "m0"), **size)
    every = list(EdgeUniverse(nodes("a0.h0", "a0.h1", "m0"), Level.EDGE, parallel))
    assert len(every) == (7 if parallel else 9) and Circuit.from_json(a.to_json()) == a
    drawn = list(combinations(every, 2))
    expected = sum(len(set(a.edges) & set(other)) >= 2 for other in drawn) / len(drawn)
    assert overlap.p_value(a, b) == pytest.approx(expected) == overlap.p_value(b, a)
    body = overlap.compare({"a": a, "b": b}).body
    assert body["pairs"] == [{"a": "a", "b": "b", "shared": 2, "jaccard": 2 / 3, "containment": 1.0, "p_value": pytest.approx(expected)}]
    assert body["shared_by_all"] == ["input->m0", "m0->logits"] and body["universe"]["edges"] == len(every)
    assert body["circuits"]["a"]["n_edges"] == 3 and body["circuits"]["a"]["edges"] == a.member_names
    shared = overlap.shared_by_all({"a": a, "b": b})
    assert shared.member_names == body["shared_by_all"] and shared.parallel is parallel


def test_circuits_of_different_levels_are_not_compared():
    a = circuit_of(*KEPT)
    with pytest.raises(CircuitError, match="A circuit of level edge_qkv and one of level node cannot be combined"):
        overlap.compare({"a": a, "b": a.nodes_only()})


def test_two_circuits_of_the_same_nodes_that_share_no_edge():
    a, b = circuit_of("input->m0", "m0->logits"), circuit_of("input->m0", "m0->m1", "m1->logits")
    assert a.jaccard(b) == 0.25 and a.jaccard(a) == 1.0
    assert replace(a, edges=a.edges[:1]).jaccard(replace(a, edges=a.edges[1:])) == 0.0


def test_stability_of_edges():
    a, b = circuit_of("input->m0", "m0->logits"), circuit_of("input->m0", "m0->m1", "m1->logits")
    body = stability([SearchRun(a, seed=0), SearchRun(b, seed=1)]).body
    assert body["survive_all"] == ["input->m0"] and body["mean_jaccard"]["seed"] == 0.25
    shares = {name: each["share"] for name, each in body["edges"].items()}
    assert shares == {"input->m0": 1.0, "m0->m1": 0.5, "m0->logits": 0.5, "m1->logits": 0.5}
    assert body["nodes"] == {"m0": {"share": 1.0}, "m1": {"share": 0.5}}
    assert [run["edges"] for run in body["runs"]] == [a.member_names, b.member_names]


# What is said of it


def findings(by_hand):
    circuit = circuit_of(*KEPT)
    found = [("months", over(by_hand, each)) for each in (circuit, SMALL)]
    runs = [SearchRun(circuit, seed=0), SearchRun(SMALL, seed=1)]
    return circuit, [
        evaluate(found[0][1], circuit, label="large", draws=2, resamples=10),
        overlap.compare({"large": circuit, "small": SMALL}),
        cross_task(found, {"large": circuit, "small": SMALL}, draws=2, resamples=10),
        stability(runs),
    ]


def test_the_report_draws_what_jobs_find_of_edges(by_hand):
    circuit, found = findings(by_hand)
    circuits = tuple(Located(label, f"{label}/circuit.json", each) for label, each in (("large", circuit), ("small", SMALL)))
    material = Material("study", circuits, findings=tuple(Located(each.kind, f"{each.kind}.json", each) for each in found))
    made, problems = sections(material)
    assert problems == []
    text = {section.title: repr(section.blocks) for section in made}
    evaluation = next(words for title, words in text.items() if title.startswith("Evaluation"))
    size = f"5 of the {found[0].body['frame_edges']} edges between the 5 components of its frame"
    for words in (size, "removed edge", "frame with all of its edges", "m0->a1.h0<v>"):
        assert words in evaluation, words
    assert "heads blue" not in evaluation
    assert "edges in both" in next(words for title, words in text.items() if title.startswith("Comparison"))
    assert "circuit of edges of a row" in next(words for title, words in text.items() if title.startswith("Across"))
    assert "3, 5 edges" in text[next(title for title in text if "What the circuits of 2" in title)]


def test_the_score_of_nodes_is_not_shown_for_edges_between_them(by_hand):
    """An evaluation belongs to the circuit with the same edges, and not to any with the same nodes."""
    circuit, (evaluation, *_) = findings(by_hand)
    others = replace(circuit, edges=circuit.edges[:1])
    for each, shown in ((circuit, True), (others, False), (circuit.nodes_only(), False)):
        material = Material("one", (Located("large", "circuit.json", each),), findings=(Located("large", "evaluation.json", evaluation),))
        summary = repr(sections(material)[0][0].blocks[0])
        assert (f"{evaluation.body['score']['value']:.1f}" in summary) is shown


def test_an_evaluation_of_edges_is_shown(by_hand, tmp_path, capsys):
    _, (found, *_) = findings(by_hand)
    evaluate_job.show(found, tmp_path)
    text = capsys.readouterr().out
    assert f"5 of the {found.body['frame_edges']} in its frame of 5 components" in text
    assert "any head" not in text and "frame without it" in text
    assert evaluate_job.numbers(found.body)["evaluation/n_edges"] == 5
    assert "evaluation/random_head_mean_drop" not in evaluate_job.numbers(found.body)


def test_files_keep_what_was_found(by_hand, tmp_path):
    circuit, (found, *_) = findings(by_hand)
    assert load(Circuit, save(circuit, tmp_path / "circuit.json")) == circuit
    assert Finding.from_json(found.to_json()).body == found.body


# The whole model


@pytest.mark.parametrize("rule", ["single", "cumulative"])
def test_the_whole_model_is_searched_as_the_oracle_does(rule):
    model = shared_model("gpt_neox_parallel", 2, 2)
    decided = []
    for engine in engines(model, solvable_prompts(model, 4, 4), Mean()):
        steps = []
        method = EdgePruning(None, rule=rule, threshold=0.7, edge_patcher=Resample())
        found = method.discover(method.over(engine), on_step=steps.append)
        decided.append(([(step.node, step.kept) for step in steps], found))
    (fast, circuit), (naive, expected) = decided
    assert fast == naive and (circuit.edges, circuit.nodes) == (expected.edges, expected.nodes)
    every = EdgeUniverse(model.universe.nodes, Level.EDGE_QKV, parallel=True)
    assert {name for name, _ in fast} == {str(edge) for edge in every} and {kept for _, kept in fast} == {True, False}
    assert circuit.within == model.universe.nodes and circuit.parallel
    assert circuit.provenance["node_score"] == pytest.approx(100, abs=1e-2)
