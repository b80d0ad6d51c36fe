"""A circuit that is measured with another ablation or score than it was found with: one line of warning, with both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models_for_tests import planted_model
from test_runner import run

from circuitkit.core.circuit import Circuit
from circuitkit.jobs.found_with import found_with, measured_with, warn_of_others
from circuitkit.methods import EdgePruning
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.storage import load, save


@pytest.fixture(scope="module")
def by_nodes(tmp_path_factory):
    """From its file, as a job reads it."""
    path = tmp_path_factory.mktemp("found") / "circuit.json"
    save(run().circuit, path)
    return load(Circuit, path)


@pytest.fixture(scope="module")
def by_edges():
    return run(method=EdgePruning(None, edge_patcher=Resample()), patcher=Zero()).circuit


def warned(caplog, circuit, patcher, edge_patcher=None, metric=None):
    caplog.clear()
    warn_of_others("A circuit", found_with(circuit), measured_with(patcher, edge_patcher, metric or LogitDiff()), "is measured here")
    assert len(caplog.messages) <= 1
    return caplog.messages[0] if caplog.messages else ""


def test_the_same_parts_say_nothing(caplog, by_nodes, by_edges):
    assert warned(caplog, by_nodes, Mean()) == ""
    assert warned(caplog, by_nodes, Mean(), Zero()) == "", "a circuit of nodes has no edges"
    assert warned(caplog, by_edges, Zero(), Resample()) == ""


def test_another_patcher_is_named_with_that_of_the_search(caplog, by_nodes):
    said = warned(caplog, by_nodes, Zero())
    assert said.startswith('A circuit was found with patcher=Mean(means="plain", pool="all"), and is measured here with patcher=Zero:')
    assert "Set patcher alike" in said
    assert 'means="plain"' in warned(caplog, by_nodes, Mean("conditional")) and "\n" not in said


def test_another_edge_patcher(caplog, by_edges):
    said = warned(caplog, by_edges, Zero())
    assert "found with edge_patcher=Resample, and is measured here with edge_patcher=Zero:" in said


def test_edges_found_without_an_edge_patcher_were_removed_by_the_patcher(caplog):
    circuit = run(method=EdgePruning(None), patcher=Zero()).circuit
    assert warned(caplog, circuit, Zero()) == warned(caplog, circuit, Zero(), Zero()) == ""
    assert "edge_patcher=Zero, and is measured here with edge_patcher=Resample:" in warned(caplog, circuit, Zero(), Resample())


def test_another_zero_of_the_score(caplog, by_nodes):
    assert warned(caplog, by_nodes, Mean(), metric=LogitDiff(zero="zero")) == "", "what the metric takes anyway"
    said = warned(caplog, by_nodes, Mean(), metric=LogitDiff(zero="ablated"))
    assert "found with score.zero=zero, and is measured here with score.zero=ablated:" in said


def test_a_file_that_does_not_say_is_not_held_against_anything(caplog, by_nodes):
    assert warned(caplog, replace(by_nodes, provenance={}), Zero()) == ""
    assert warned(caplog, Circuit.of(planted_model().universe, planted_model().universe.full(), model="m"), Zero()) == ""
