"""The nouns: nodes and edges by name, graphs and masks, circuits as sets and as files, prompts, descriptions, error sentences."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import VOCAB, tiny_prompts

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.describe import describe
from circuitkit.core.errors import CircuitError, MeasurementError, PromptError, UserError, unknown_choice
from circuitkit.core.findings import Finding
from circuitkit.core.node import Edge, Kind, Level, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.sealed import FORMAT_VERSION, checksum
from circuitkit.core.universe import Universe
from circuitkit.engine.packed.layout import Edits, Layout
from circuitkit.patchers import Mean, Zero
from circuitkit.storage import load, save

LAYERS, HEADS = 3, 4
GRAPH = Universe.of_nodes(LAYERS, HEADS)
FAST = settings(deadline=None, max_examples=100)

spans = st.none() | st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True)
heads = st.builds(
    Node,
    kind=st.just(Kind.HEAD),
    layer=st.integers(0, 99),
    head=st.integers(0, 99),
    port=st.sampled_from([None, "q", "k", "v"]),
    span=spans,
)
mlps = st.builds(Node, kind=st.just(Kind.MLP), layer=st.integers(0, 99), span=spans)
ends = st.builds(Node, kind=st.sampled_from([Kind.INPUT, Kind.LOGITS]), span=spans)
nodes = st.one_of(heads, mlps, ends)
circuits = st.builds(
    lambda members: Circuit(tuple(members), LAYERS, HEADS, "toy"), st.lists(st.sampled_from(GRAPH.nodes), max_size=len(GRAPH))
)


# Names


@FAST
@given(node=nodes)
def test_node_names_round_trip(node):
    assert Node.parse(str(node)) == node


@FAST
@given(src=nodes, dst=nodes)
def test_edge_names_round_trip(src, dst):
    assert Edge.parse(str(Edge(src, dst))) == Edge(src, dst)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("a7.h11", Node(Kind.HEAD, 7, 11)),
        ("a7.h11<v>", Node(Kind.HEAD, 7, 11, "v")),
        ("m9", Node(Kind.MLP, 9)),
        ("m9@last", Node(Kind.MLP, 9, span="last")),
        ("a0.h1@-2", Node(Kind.HEAD, 0, 1, span="-2")),
        ("a7.h11<q>@S1", Node(Kind.HEAD, 7, 11, "q", "S1")),
        ("input", Node(Kind.INPUT)),
        ("logits", Node(Kind.LOGITS)),
    ],
)
def test_names_as_mib_and_eap_ig_write_them(name, node):
    assert Node.parse(name) == node
    assert str(node) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "h3",
        "a7.h",
        "a7<q>",
        "m7.n",
        "m7.f",
        "r7",
        "r7.n3",
        "a7.n3",
        "r7.e3",
        "r7.f1<q>",
        "a7.h11<x>",
        "m",
        "m9<q>",
        "m-1",
        "a7.h11 ",
        " m9",
        "m9@",
        "m9@a b",
        "A1.H2",
        "m9\n",
    ],
)
def test_what_is_no_node_name(name):
    with pytest.raises(CircuitError, match="is not a node name. Expected a head such as 'a7.h11'"):
        Node.parse(name)


@pytest.mark.parametrize("name", ["m1", "m1->", "->m1", "m1->m2->m3", "m1-m2"])
def test_what_is_no_edge_name(name):
    with pytest.raises(CircuitError, match="Expected|expected"):
        Edge.parse(name)


def test_positions_on_and_off():
    node = Node.of_head(2, 1).at(3)
    assert (str(node), node.component) == ("a2.h1@3", Node.of_head(2, 1))


# NodeUniverse and masks


def test_a_graph_is_in_causal_order():
    assert [str(node) for node in Universe.of_nodes(2, 2)] == ["a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert [str(node) for node in Universe.of_nodes(1, 1).at(["S1", -1])] == ["a0.h0@S1", "a0.h0@-1", "m0@S1", "m0@-1"]


@FAST
@given(members=st.sets(st.sampled_from(GRAPH.nodes)))
def test_masks_and_members_are_inverse(members):
    mask = GRAPH.mask(members)
    assert set(GRAPH.members(mask)) == members
    assert mask.sum() == len(members)
    assert all(mask[GRAPH.index(str(node))] == (node in members) for node in GRAPH)


def test_without_leaves_the_mask_it_was_given():
    full = GRAPH.full()
    less = GRAPH.without(full, ["m1", Node.of_head(0, 0)])
    assert full.all() and less.sum() == len(GRAPH) - 2
    assert not less[GRAPH.index("m1")] and not less[0]


@pytest.mark.parametrize("name", ["a3.h0", "a0.h4", "m3", "m0@last", "a0.h0<q>", "input"])
def test_a_node_that_is_not_in_the_graph(name):
    with pytest.raises(CircuitError, match="layers 0-2 and heads 0-3, whole components only"):
        GRAPH.index(name)


# Layout: what masks mean for a pass


def test_first_difference_by_hand():
    layout = Layout(GRAPH, tiny_prompts())
    base = GRAPH.without(GRAPH.full(), ["a1.h0"])
    masks = torch.stack(
        [base, GRAPH.full(), GRAPH.without(base, ["m0"]), GRAPH.without(base, ["m2"]), GRAPH.without(base, ["m2", "a0.h3"])]
    )
    assert layout.first_difference(masks, base).tolist() == [3, 1, 0, 2, 0]


def test_edits_by_hand_with_positions_that_depend_on_the_group():
    prompts = tiny_prompts(n=3, n_pos=4, n_groups=2)  # S1 is token 0 in group 0 and token 1 in group 1; groups 0, 1, 0
    graph = Universe.of_nodes(1, 2, ("S1", "last"))
    mask = graph.without(graph.full(), ["a0.h1@S1", "m0@last"])
    edits = Edits(Layout(graph, prompts), mask[None], slice(1, 3))
    assert edits.heads(0)[0, :, :, 0].all()
    assert edits.heads(0)[0, :, :, 1].tolist() == [[True, False, True, True], [False, True, True, True]]
    assert edits.mlp(0)[0].tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize("names", [("last", "3"), ("S1", "0"), ("-1", "last"), ("last", "last")])
def test_positions_that_contradict_each_other_are_refused(names):
    with pytest.raises(MeasurementError, match="a mask could contradict itself. Name each position once"):
        Layout(Universe.of_nodes(1, 1, names), tiny_prompts(n_pos=4))


# Circuits as sets


@FAST
@given(a=circuits, b=circuits, c=circuits)
def test_set_algebra(a, b, c):
    assert a & b == b & a and a | b == b | a
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a - (a & b)
    assert (a - b) | (a & b) == a | (a & b)
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert len((a - b) & b) == 0
    assert all((name in (a & b)) == (name in a and name in b) for name in map(str, GRAPH))
    assert a.jaccard(b) == b.jaccard(a) and 0 <= a.jaccard(b) <= 1 and a.jaccard(a) == 1.0


def test_jaccard_by_hand():
    a, b = (Circuit(tuple(map(Node.parse, names)), LAYERS, HEADS) for names in (("m0", "m1", "a0.h0"), ("m1", "a0.h0", "a2.h3")))
    empty = Circuit((), LAYERS, HEADS)
    assert (a.jaccard(b), a.jaccard(empty), empty.jaccard(empty)) == (0.5, 0.0, 1.0)


def test_members_are_put_in_causal_order_once_each():
    circuit = Circuit(tuple(map(Node.parse, ("m2", "a2.h1", "m0", "a2.h1", "a10.h0", "a2.h0"))), 11, 2)
    assert circuit.names == ("m0", "a2.h0", "a2.h1", "m2", "a10.h0")
    assert ([str(node) for node in circuit.heads], [str(node) for node in circuit.mlps]) == (["a2.h0", "a2.h1", "a10.h0"], ["m0", "m2"])
    assert "m0" in circuit and Node.of_mlp(1) not in circuit


@FAST
@given(circuit=circuits)
def test_a_circuit_and_its_mask(circuit):
    assert Circuit.of(GRAPH, circuit.mask(GRAPH), model="toy") == circuit


@pytest.mark.parametrize("name", ["a3.h0", "a0.h4", "m3", "input", "logits"])
def test_nodes_that_cannot_be_in_a_circuit(name):
    with pytest.raises(CircuitError, match="cannot be in a circuit of a model with 3 layers and 4 heads"):
        Circuit((Node.parse(name),), LAYERS, HEADS)


def test_circuits_of_other_models_do_not_mix():
    toy, other, small = Circuit((), 3, 4, "toy"), Circuit((), 3, 4, "other"), Circuit((), 2, 4, "toy")
    for combine in (lambda a, b: a & b, lambda a, b: a | b, lambda a, b: a - b, lambda a, b: a.jaccard(b)):
        with pytest.raises(CircuitError, match="found in the model 'other', not in 'toy'"):
            combine(toy, other)
        with pytest.raises(CircuitError, match="with 2 layers x 4 heads, but the model here has 3 x 4"):
            combine(toy, small)
    with pytest.raises(CircuitError, match="but the model here has 3 x 4"):
        small.mask(GRAPH)


# Circuits as files

CIRCUIT = Circuit(
    tuple(map(Node.parse, ("a0.h1", "m0", "a2.h3"))),
    LAYERS,
    HEADS,
    "toy",
    83.25,
    provenance={"seed": 3, "settings": {"n": [1, 2.5, None, "x"]}},
)


def test_a_circuit_survives_its_file(tmp_path):
    path = save(CIRCUIT, tmp_path / "deep" / "er" / "circuit.json")
    assert load(Circuit, path) == CIRCUIT
    assert load(Circuit, str(path)).provenance == {"seed": 3, "settings": {"n": [1, 2.5, None, "x"]}}
    assert [file.name for file in path.parent.iterdir()] == ["circuit.json"]
    body = json.loads(path.read_text())
    assert body["format_version"] == FORMAT_VERSION == 1
    assert body["nodes"] == ["a0.h1", "m0", "a2.h3"] and body["score"] == 83.25


@FAST
@given(
    circuit=circuits,
    score=st.none() | st.floats(-1e6, 1e6),
    model=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
)
def test_json_round_trip(circuit, score, model):
    circuit = Circuit(circuit.nodes, LAYERS, HEADS, model, score, provenance={model: score})
    assert Circuit.from_json(circuit.to_json()) == circuit


TEXT = CIRCUIT.to_json()


@st.composite
def mutated(draw) -> str:
    """The text of a circuit file, cut, with parts doubled, dropped, or written over."""
    text = TEXT
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        kind = draw(st.sampled_from(["cut", "drop", "double", "write", "digit"]))
        new = {
            "cut": "",
            "drop": "",
            "double": text[start:end] * 2,
            "write": draw(st.text(max_size=5)),
            "digit": draw(st.sampled_from("0123456789")),
        }
        text = text[:start] if kind == "cut" else text[:start] + new[kind] + text[end:]
    return text


@settings(FAST, max_examples=400)
@given(text=mutated())
def test_a_mutated_file_is_refused_or_still_the_same_circuit(text):
    try:
        circuit = Circuit.from_json(text)
    except CircuitError:
        return
    assert circuit == CIRCUIT


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(FAST, max_examples=400)
@given(
    key=st.sampled_from(["model", "n_layers", "n_heads", "level", "score", "nodes", "provenance"]), value=json_values, drop=st.booleans()
)
def test_a_forged_file_with_a_right_checksum_is_refused_or_a_usable_circuit(key, value, drop):
    """Someone wrote a field by hand and corrected the checksum too."""
    body = json.loads(TEXT)
    del body["checksum"]
    body[key] = value
    if drop:
        del body[key]
    text = json.dumps({**body, "checksum": checksum(body)})
    try:
        circuit = Circuit.from_json(text)
    except CircuitError:
        return
    again = Circuit.from_json(circuit.to_json())
    assert again.names == circuit.names


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"x"', "[" * 100_000, "{}", '{"nodes": []}'], ids=lambda text: text[:12] or "nothing"
)
def test_texts_that_are_no_circuit(text):
    with pytest.raises(CircuitError, match="is not a"):
        Circuit.from_json(text)


def test_a_file_cut_in_half(tmp_path):
    path = tmp_path / "circuit.json"
    path.write_text(TEXT[: len(TEXT) // 2])
    with pytest.raises(CircuitError, match=r"circuit.json is not a whole JSON file .* It may have been cut off; make it again."):
        load(Circuit, path)


def test_another_format_version():
    with pytest.raises(CircuitError, match="has format 99; this version reads format 1. Use the version that wrote it"):
        Circuit.from_json(TEXT.replace('"format_version": 1', '"format_version": 99'))


@pytest.mark.parametrize(("old", "new"), [("83.25", "93.25"), ('"m0"', '"m1"'), ('"toy"', '"gpt2"'), ('"seed": 3', '"seed": 4')])
def test_a_changed_file(old, new):
    assert old in TEXT
    with pytest.raises(CircuitError, match="was changed or damaged after it was written: its checksum does not match"):
        Circuit.from_json(TEXT.replace(old, new))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CircuitError, match="cannot be read"):
        load(Circuit, tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CircuitError, match="cannot be read"):
        load(Circuit, tmp_path / "bytes.json")


def test_saving_is_all_or_nothing(tmp_path):
    """A circuit that cannot be written leaves the one that was there."""
    path = save(CIRCUIT, tmp_path / "circuit.json")
    with pytest.raises(TypeError):
        save(Circuit((), LAYERS, HEADS, provenance={"what": object()}), path)
    assert load(Circuit, path) == CIRCUIT


def test_scores_by_rank():
    scores = Scores({"m0": 50.0, "m1": -3.0, "a0.h0": 101.0}, "%", LAYERS, HEADS)
    assert scores.top(2) == [("m1", -3.0), ("m0", 50.0)]
    assert scores.top(1, lowest=False) == [("a0.h0", 101.0)]
    body = json.loads(scores.to_json())
    assert body["values"] == {"m0": 50.0, "m1": -3.0, "a0.h0": 101.0} and body["unit"] == "%"


# Prompts


def test_taking_prompts():
    prompts = tiny_prompts(6)
    for rows in (range(2, 4), [2, 3], torch.tensor([2, 3]), torch.tensor([False, False, True, True, False, False])):
        taken = prompts.take(rows)
        assert torch.equal(taken.clean, prompts.clean[2:4]) and torch.equal(taken.answers.tokens, prompts.answers.tokens[2:4])
        assert torch.equal(taken.corrupt, prompts.corrupt[2:4]) and taken.groups.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("span", "group", "position"), [("last", 0, 4), ("0", 1, 0), ("-1", 0, 4), ("-5", 0, 0), ("S1", 0, 0), ("S1", 1, 1)]
)
def test_positions(span, group, position):
    assert tiny_prompts(n_pos=5).position(span, group) == position


@pytest.mark.parametrize(
    ("span", "text"), [("5", "outside of prompts with 5 tokens"), ("-6", "outside"), ("S9", "Choices: S1, last, or a number")]
)
def test_positions_that_are_not_there(span, text):
    with pytest.raises(PromptError, match=text):
        tiny_prompts(n_pos=5).position(span, 0)


@pytest.mark.parametrize("span", ["--3", "²", "-", "3-"])
def test_positions_that_only_look_like_numbers(span):
    with pytest.raises(PromptError, match="no position labelled"):
        tiny_prompts(n_pos=5).position(span, 0)


def test_the_content_hash_depends_on_every_column():
    prompts = tiny_prompts()
    columns = ("clean", "corrupt", "answers", "wrongs", "groups")
    hashes = {prompts.content_hash()}
    for name in columns:
        sets = {each: getattr(prompts, each).tokens for each in ("answers", "wrongs")}
        changed = {each: sets.get(each, getattr(prompts, each)).clone() for each in columns}
        changed[name].view(-1)[0] = VOCAB  # no other column has it
        hashes.add(PromptSet(**changed, group_names=("a", "b"), spans=prompts.spans).content_hash())
    assert len(hashes) == 6
    assert tiny_prompts().content_hash() == prompts.content_hash()


def test_the_content_hash_depends_on_labelled_positions():
    """They say where units at positions lie, so scores depend on them."""
    prompts = tiny_prompts()
    moved = PromptSet(prompts.clean, prompts.corrupt, prompts.answers, prompts.wrongs, prompts.groups, prompts.group_names, {"S1": (2, 2)})
    assert moved.content_hash() != prompts.content_hash()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"corrupt": torch.zeros(6, 4, dtype=torch.long)}, "two tables of equal size"),
        ({"clean": torch.zeros(6, dtype=torch.long)}, "two tables of equal size"),
        ({"answers": torch.zeros(5, dtype=torch.long)}, "6 prompts need 6 answers, wrong answers and groups; found 5, 6 and 6"),
    ],
)
def test_prompts_that_do_not_fit_together(change, text):
    prompts = tiny_prompts()
    columns = {name: getattr(prompts, name) for name in ("clean", "corrupt", "answers", "wrongs", "groups")}
    with pytest.raises(PromptError, match=text):
        PromptSet(**{**columns, **change})


def test_no_prompts():
    with pytest.raises(PromptError, match="No prompt is left. Draw more"):
        tiny_prompts().take(torch.zeros(6, dtype=torch.bool))


# Descriptions


def test_describing_objects_and_plain_values(tmp_path):
    found = describe({"patcher": Mean("conditional"), "level": Level.NODE, "where": tmp_path, "keep": ("m1", {"b", "a"}), "zero": Zero()})
    assert found == {
        "patcher": {"_target_": "circuitkit.patchers.mean.Mean", "means": "conditional", "pool": "all"},
        "level": "node",
        "where": str(tmp_path),
        "keep": ["m1", ["a", "b"]],
        "zero": {"_target_": "circuitkit.patchers.zero.Zero"},
    }
    json.dumps(found)


def one(shown):
    return shown


def other(shown):
    return shown[::-1]


@pytest.mark.parametrize("thing", [one, max, torch.tensor([1.0, 2.0]), Circuit, len], ids=["function", "builtin", "tensor", "class", "len"])
def test_describing_what_users_may_hand_in(thing):
    """Settings may hold functions (a corruption), classes and tensors. They must end as plain values."""
    json.dumps(describe(thing))


def test_two_functions_are_described_differently():
    """Else two runs with different corruptions would carry the same settings."""
    assert describe(one) != describe(other)


def test_unknown_choice_names_the_choices():
    text = unknown_choice("task", "mnths", ["months", "numerals"], "See the list.")
    assert text == "There is no task named 'mnths'. Did you mean 'months'? Choices: months, numerals. See the list."
    assert unknown_choice("task", "x", []) == "There is no task named 'x'. Choices: none."


@pytest.mark.parametrize("value", [Circuit((), 1, 1), Scores({}, "logits", 1, 1), Finding("kind", "", {})], ids=type)
def test_a_value_says_how_it_is_saved(value):
    """And not what nnsight says, which mounts a method of that name on every object."""
    with pytest.raises(UserError, match=rf"circuitkit.save\(value, path\), and read it with circuitkit.load\({type(value).__name__}, path"):
        value.save("months.json")
