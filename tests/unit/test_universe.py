"""Universes: names, places and order of units, whatever they are, against what is written out by hand or counted naively."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError
from circuitkit.core.node import INPUT, LOGITS, Edge, Kind, Level, Node, Site, precedes
from circuitkit.core.universe import NodeUniverse, Universe

QUICK = settings(deadline=None, max_examples=60)
SITES = (Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST)


@st.composite
def universes(draw, spans: bool = True) -> NodeUniverse:
    """Any union of the kinds of units, perhaps at positions."""
    n_layers, n_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    layers = draw(st.lists(st.integers(0, n_layers - 1), min_size=1, unique=True))
    sizes = draw(st.dictionaries(st.tuples(st.sampled_from(SITES), st.integers(0, n_layers - 1)), st.integers(1, 5), max_size=4))
    parts = [
        Universe.of_nodes(n_layers, n_heads),
        Universe.of_attentions(n_layers, n_heads),
        Universe.of_neurons(n_layers, n_heads, draw(st.integers(1, 6)), layers),
        Universe.of_features(n_layers, n_heads, sizes, errors=draw(st.booleans())),
    ]
    chosen = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3))
    whole = chosen[0]
    for part in chosen[1:]:
        whole = whole | part
    return whole.at(draw(st.sampled_from([(), ("last",), ("0", "S1", "last")]))) if spans else whole


@QUICK
@given(universe=universes())
def test_names_and_places_there_and_back(universe):
    for place, node in enumerate(universe):
        assert Node.parse(str(node)) == node == universe.unit(place)
        assert universe.index(node) == universe.index(str(node)) == place
    assert len(universe) == len(universe.nodes) == len(set(universe.nodes))


STAGES = {Kind.ATTENTION: 0, Kind.HEAD: 1, Kind.NEURON: 3, Kind.MLP: 4}


def causal(node: Node, spans: tuple[str, ...]) -> tuple[int, ...]:
    """Written out once more: layers, in them the sites as they are computed, in these the units in order, error terms last."""
    stage = STAGES[node.kind] if node.kind in STAGES else {Site.ATTN_OUT: 2, Site.MLP_OUT: 5, Site.RESID_POST: 6}[node.site]
    slot = node.head if node.kind is Kind.HEAD else node.index or 0
    return node.layer, stage, node.kind is Kind.ERROR, slot, spans.index(node.span) if node.span is not None else 0


@QUICK
@given(universe=universes())
def test_units_are_in_causal_order(universe):
    order = [causal(node, universe.spans) for node in universe]
    assert order == sorted(order)
    assert universe.layers.tolist() == [node.layer for node in universe]


@QUICK
@given(universe=universes(), data=st.data())
def test_masks_and_members(universe, data):
    chosen = data.draw(st.sets(st.integers(0, len(universe) - 1))) if len(universe) else set()
    nodes = [universe.unit(place) for place in chosen]
    mask = universe.mask(nodes)
    assert mask.nonzero().flatten().tolist() == sorted(chosen)
    assert universe.members(mask) == tuple(universe.unit(place) for place in sorted(chosen))
    assert torch.equal(universe.without(universe.full(), nodes), ~mask)
    assert universe.mask(map(str, nodes)).equal(mask)


@QUICK
@given(universe=universes(spans=False), other=universes(spans=False))
def test_unions(universe, other):
    if (universe.n_layers, universe.n_heads) != (other.n_layers, other.n_heads):
        with pytest.raises(CircuitError, match="cannot be joined"):
            universe | other
        return
    both = universe | other
    assert set(both) == set(universe) | set(other)
    assert both == other | universe and both.digest() == (other | universe).digest()
    assert (both == universe) == (set(other) <= set(universe))


@QUICK
@given(universe=universes(spans=False))
def test_spans_and_kinds(universe):
    at = universe.at(["S1", 2])
    assert [str(node) for node in at] == [f"{node}@{span}" for node in universe for span in ("S1", "2")]
    assert universe.at([]) is universe and (at.digest() != universe.digest() or not len(universe))
    assert universe.kinds == {node.kind for node in universe}
    for kind in Kind:
        assert universe.only(kind).nodes == tuple(node for node in universe if node.kind is kind)
        if kind in (Kind.INPUT, Kind.LOGITS, Kind.EDGE):
            continue
        for on in SITES if kind in (Kind.FEATURE, Kind.ERROR) else (None,):
            places, where = at.places_of(kind, on)
            expected = [place for place, node in enumerate(at) if node.kind is kind and on in (None, node.site)]
            assert places.tolist() == expected
            for place, (layer, slot, span) in zip(expected, where.tolist(), strict=True):
                node = at.unit(place)
                assert (node.layer, at.spans[span]) == (layer, node.span)
                assert slot == (node.head if kind is Kind.HEAD else node.index or 0)


@pytest.mark.parametrize(
    ("universe", "level"),
    [
        (Universe.of_nodes(2, 2), Level.NODE),
        (Universe.of_attentions(2, 2), Level.ATTENTION),
        (Universe.of_neurons(2, 2, 3), Level.NEURON),
        (Universe.of_features(2, 2, {(Site.MLP_OUT, 0): 2}), Level.FEATURE),
        (Universe.of_nodes(2, 2) | Universe.of_neurons(2, 2, 3), Level.MIXED),
        (Universe.of_nodes(2, 2).only(Kind.MLP), Level.NODE),
    ],
)
def test_levels(universe, level):
    assert universe.level is level


def test_names_by_hand():
    features = Universe.of_features(3, 1, {(Site.RESID_POST, 2): 2, (Site.ATTN_OUT, 0): 1, (Site.MLP_OUT, 2): 1})
    assert list(map(str, features)) == ["a0.f0", "a0.e", "m2.f0", "m2.e", "r2.f0", "r2.f1", "r2.e"]
    assert list(map(str, Universe.of_neurons(3, 1, 2, [2, 0]))) == ["m0.n0", "m0.n1", "m2.n0", "m2.n1"]
    assert list(map(str, Universe.of_attentions(2, 5))) == ["a0", "m0", "a1", "m1"]
    assert list(map(str, Universe.of_nodes(1, 2, ["last"]))) == ["a0.h0@last", "a0.h1@last", "m0@last"]


def test_a_unit_twice_and_unknown_units_are_refused():
    columns = torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]])
    with pytest.raises(CircuitError, match="names each unit once"):
        NodeUniverse(1, 1, columns)
    neurons = Universe.of_neurons(2, 2, 3)
    for name in ("m0.n3", "a0.h0", "m0", "r0.f1", "m2.n0", "m0.n0@last", "a0.h0->m0"):
        with pytest.raises(CircuitError, match="not in this universe|is not"):
            neurons.index(name)


@QUICK
@given(n_layers=st.integers(0, 3), n_heads=st.integers(1, 3), qkv=st.booleans(), parallel=st.booleans())
def test_edges_against_a_double_loop(n_layers, n_heads, qkv, parallel):
    level = Level.EDGE_QKV if qkv else Level.EDGE
    universe = EdgeUniverse(Universe.of_nodes(n_layers, n_heads).nodes, level, parallel)
    expected = []
    for dst in (*universe.nodes, LOGITS):
        ports = [Node(dst.kind, dst.layer, dst.head, port) for port in "qkv"] if qkv and dst.kind is Kind.HEAD else [dst]
        expected += [Edge(src, port) for port in ports for src in (INPUT, *universe.nodes) if precedes(src, dst, parallel)]
    assert universe.edges == tuple(expected) and len(universe) == len(expected)
    for place, edge in enumerate(expected):
        assert universe.unit(place) == edge and universe.index(edge) == universe.index(str(edge)) == place


@QUICK
@given(n_layers=st.integers(1, 3), n_heads=st.integers(1, 2), keep=st.floats(0, 1), seed=st.integers(0, 99))
def test_live_edges_against_a_search_from_the_logits(n_layers, n_heads, keep, seed):
    universe = Universe.of_edges(n_layers, n_heads)
    mask = torch.rand(len(universe), generator=torch.Generator().manual_seed(seed)) < keep
    kept, live, waiting = universe.members(mask), set(), [LOGITS]
    while waiting:
        at = waiting.pop()
        into = [edge for edge in kept if edge.dst.component_of_port == at and edge not in live]
        live.update(into)
        waiting += [edge.src for edge in into]
    reached, found = universe.live_mask(mask)
    assert universe.members(found) == tuple(edge for edge in kept if edge in live)
    nodes, edges = universe.live(mask)
    assert edges == universe.members(found) and nodes == tuple(node for node, there in zip(universe.nodes, reached, strict=True) if there)
    assert set(nodes) == {edge.src for edge in live} - {INPUT}


def test_every_edge_of_a_model_of_32_layers_is_made_in_little_memory():
    """Llama-3-8B: 32 layers x 32 heads. No object per edge is made."""
    tracemalloc.start()
    universe = Universe.of_edges(32, 32)
    mask = universe.full()
    mask[universe.places(["m0->a3.h1<q>", "input->logits"])] = False
    reached, live = universe.live_mask(mask)
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(universe) == 1_592_881 and int(live.sum()) == 1_592_879 and reached.all()
    assert universe.src.dtype == universe.dst.dtype == torch.int32
    assert python_bytes < 8 * 2**20, "an object per edge would take a hundred times as much"


def test_every_neuron_of_such_a_model_is_held_as_numbers():
    universe = Universe.of_neurons(32, 32, 14336)
    assert len(universe) == 458_752
    assert universe.index("m31.n14335") == 458_751 and str(universe.unit(14336)) == "m1.n0"
