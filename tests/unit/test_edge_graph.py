"""The direct paths that can be in a circuit: their order and number, what still leads to the logits, and circuits that hold them."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError
from circuitkit.core.node import Edge, Level, Node
from circuitkit.core.sealed import seal
from circuitkit.core.universe import Universe
from circuitkit.storage import load, save


def nodes(*names: str) -> tuple[Node, ...]:
    return tuple(Node.parse(name) for name in names)


# --- The graph ------------------------------------------------------------------------------------------------------------------------


def test_edges_in_order():
    graph = EdgeUniverse(nodes("a0.h0", "m0", "a1.h1"))
    assert [str(edge) for edge in graph] == [
        "input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>",
        "input->m0", "a0.h0->m0",
        *(f"{src}->a1.h1<{port}>" for port in "qkv" for src in ("input", "a0.h0", "m0")),
        "input->logits", "a0.h0->logits", "m0->logits", "a1.h1->logits",
    ]  # fmt: skip
    assert [str(edge) for edge in EdgeUniverse(graph.nodes, Level.EDGE)][:4] == ["input->a0.h0", "input->m0", "a0.h0->m0", "input->a1.h1"]
    assert len(EdgeUniverse(())) == 1  # the input to the logits
    assert [graph.index(str(edge)) for edge in graph] == list(range(len(graph)))


@pytest.mark.parametrize(("n_layers", "n_heads", "parallel"), list(product((1, 2, 3), (1, 4), (False, True))))
def test_the_number_of_edges_of_a_whole_model(n_layers, n_heads, parallel):
    """Heads of layer l read the input and l layers of heads and an MLP; its MLP these and, unless it is parallel, the layer's heads."""
    whole = Universe.of_nodes(n_layers, n_heads)
    for level, ports in ((Level.EDGE_QKV, 3), (Level.EDGE, 1)):
        below = [1 + layer * (n_heads + 1) for layer in range(n_layers)]
        into_heads = sum(n_heads * ports * n for n in below)
        into_mlps = sum(n + (0 if parallel else n_heads) for n in below)
        assert len(EdgeUniverse(whole.nodes, level, parallel)) == into_heads + into_mlps + 1 + len(whole)


def test_a_head_reaches_the_mlp_of_its_own_layer_but_not_in_a_parallel_model():
    members = nodes("a0.h0", "m0")
    assert Edge.parse("a0.h0->m0") in EdgeUniverse(members).edges
    assert Edge.parse("a0.h0->m0") not in EdgeUniverse(members, parallel=True).edges
    with pytest.raises(CircuitError, match="runs against the causal order: m0 is computed before a0.h0, or beside it"):
        EdgeUniverse(members, parallel=True).index("a0.h0->m0")


@pytest.mark.parametrize(
    ("kept", "live_nodes", "live_edges"),
    [
        ([], [], []),
        (["input->logits"], [], ["input->logits"]),
        (["input->a0.h0<q>", "a0.h0->m0"], [], []),  # leads nowhere
        (["a0.h0->m0", "m0->logits"], ["a0.h0", "m0"], ["a0.h0->m0", "m0->logits"]),  # needs no way from the input
        (["a0.h0->a1.h0<k>", "a1.h0->logits", "m0->m1"], ["a0.h0", "a1.h0"], ["a0.h0->a1.h0<k>", "a1.h0->logits"]),
        (["input->m0", "m0->a1.h0<q>", "a1.h0->m1"], [], []),
        (["input->m0", "a1.h0->m1", "m0->a1.h0<q>", "m1->logits"], ["m0", "a1.h0", "m1"],
         ["input->m0", "m0->a1.h0<q>", "a1.h0->m1", "m1->logits"]),
    ],
)  # fmt: skip
def test_what_still_leads_to_the_logits(kept, live_nodes, live_edges):
    graph = EdgeUniverse(nodes("a0.h0", "m0", "a1.h0", "m1"))
    found_nodes, found_edges = graph.live(graph.mask(kept))
    assert [str(node) for node in found_nodes] == live_nodes and [str(edge) for edge in found_edges] == live_edges


def test_masks_over_edges():
    graph = EdgeUniverse(nodes("a0.h0", "m0"))
    assert graph.members(graph.full()) == graph.edges and graph.members(graph.empty()) == ()
    mask = graph.without(graph.full(), ["input->m0"])
    assert graph.full().all() and graph.members(mask) == tuple(edge for edge in graph if str(edge) != "input->m0")
    assert torch.equal(graph.mask(graph.members(mask)), mask)


@pytest.mark.parametrize(
    ("edge", "text"),
    [
        ("m0->a0.h0<q>", "runs against the causal order"),
        ("a0.h0->a0.h0<q>", "runs against the causal order"),
        ("m1->m0", "m1 is not among its senders, which are input, a0.h0, m0"),
        ("m0->m1", "m1 is not among its receivers, which are a0.h0<q>, a0.h0<k>, a0.h0<v>, m0, logits"),
        ("input->a0.h0", "a0.h0 is not among its receivers"),
        ("a0.h0<q>->m0", "is not among its senders"),
        ("m0", "is not an edge name"),
    ],
)
def test_an_edge_that_is_not_there(edge, text):
    with pytest.raises(CircuitError, match=text):
        EdgeUniverse(nodes("a0.h0", "m0")).index(edge)


# --- Circuits with edges --------------------------------------------------------------------------------------------------------------

MEMBERS = nodes("a0.h0", "m0", "a1.h1", "m1")


def with_edges(*edges: str, members=MEMBERS, level=Level.EDGE_QKV) -> Circuit:
    return Circuit(members, 2, 2, "tiny", 81.5, level, {"seed": 0}, tuple(Edge.parse(edge) for edge in edges))


def test_a_circuit_with_edges_comes_back_from_its_file(tmp_path):
    graph = EdgeUniverse(MEMBERS)
    circuit = with_edges(*reversed([str(edge) for edge in graph]))
    assert circuit.edges == graph.edges  # in the order of the graph, whatever order they came in
    assert load(Circuit, save(circuit, tmp_path / "circuit.json")) == circuit
    nothing_kept = with_edges(members=())
    assert Circuit.from_json(nothing_kept.to_json()) == nothing_kept and nothing_kept.level is Level.EDGE_QKV


def test_circuits_with_edges_as_sets():
    one = with_edges("input->a0.h0<v>", "a0.h0->m1", "m1->logits", "input->logits", members=nodes("a0.h0", "m1"))
    other = with_edges("input->m0", "m0->m1", "m1->logits", members=nodes("m0", "m1"))

    def names(circuit: Circuit) -> list[str]:
        return [str(edge) for edge in circuit.edges]

    assert (one & other).names == ("m1",) and names(one & other) == ["m1->logits"]
    assert (one | other).names == ("a0.h0", "m0", "m1") and len((one | other).edges) == 6
    assert (one - other).names == ("a0.h0",) and names(one - other) == ["input->a0.h0<v>", "input->logits"]
    nothing = with_edges(members=())
    assert (one - nothing).edges == one.edges and (one - one).edges == () == (one - one).nodes
    only = one.nodes_only()
    assert only.level is Level.NODE and only.edges == () and only.score is None and only.nodes == one.nodes
    with pytest.raises(CircuitError, match="level edge_qkv and one of level node cannot be combined"):
        _ = one | only


@pytest.mark.parametrize(
    "edge", ["a0.h0->a1.h0<q>", "m1->a1.h1<q>", "a0.h0->input", "logits->m0", "input@3->m0", "a0.h0<q>->m0", "m0->a1.h1"]
)
def test_edges_that_cannot_be_in_a_circuit(edge):
    with pytest.raises(CircuitError, match="cannot be in this circuit"):
        with_edges(edge)


def test_a_circuit_of_nodes_has_no_edges():
    with pytest.raises(CircuitError, match="an edge needs level edge, or edge_qkv .*, here node"):
        with_edges("input->m0", level=Level.NODE)
    with pytest.raises(CircuitError, match="'m0->a1.h1<q>' cannot be in this circuit"):
        with_edges("m0->a1.h1", "m0->a1.h1<q>", level=Level.EDGE)


@pytest.mark.parametrize("edges", [["m1->a0.h0<q>"], ["a0.h1->m1"], ["a0.h0"], [3], "input->m0", [None], {"input->m0": 1}])
def test_a_file_with_other_edges(edges):
    text = with_edges("input->m0", "m0->m1").to_json()
    body = json.loads(text)
    body["edges"] = edges
    with pytest.raises(CircuitError, match="its checksum does not match"):
        Circuit.from_json(json.dumps(body))
    del body["checksum"], body["format_version"]
    with pytest.raises(CircuitError):
        Circuit.from_json(seal(body))
