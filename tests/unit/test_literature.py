"""Circuits that others published as lists."""

from __future__ import annotations

import json

import pytest

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError
from circuitkit.core.node import Node
from circuitkit.storage import load, save
from circuitkit.storage.literature import PublishedCircuit, fitted, read


def written(folder, body):
    path = folder / "list.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return path


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"heads": [[1, 0], [0, 1]], "mlps": [1]}, ("a0.h1", "a1.h0", "m1")),
        ({"heads": [[0, 1]], "mlps": "all"}, ("a0.h1", "m0", "m1")),
        ({"heads": [[0, 1]]}, ("a0.h1",)),
        ({"mlps": [0]}, ("m0",)),
        ({"source": "a paper", "mlps": [0]}, ("m0",)),
        ({"heads": "all", "mlps": []}, ("a0.h0", "a0.h1", "a1.h0", "a1.h1")),
    ],
)
def test_lists_become_circuits(tmp_path, body, names):
    found = read(written(tmp_path, body))
    assert isinstance(found, PublishedCircuit)
    circuit = fitted(found, "tiny", 2, 2)
    assert circuit.names == names
    assert (circuit.model, circuit.n_layers, circuit.n_heads, circuit.score) == ("tiny", 2, 2, None)
    assert load(Circuit, save(circuit, tmp_path / "circuit.json")) == circuit


def test_our_own_files_are_read_too(tmp_path):
    circuit = Circuit((Node.parse("m0"),), 2, 2, "tiny", 80.0)
    found = read(save(circuit, tmp_path / "circuit.json"))
    assert found == circuit
    assert fitted(found, "tiny", 2, 2) == circuit
    with pytest.raises(CircuitError, match="not in 'other'"):
        fitted(found, "other", 2, 2)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{", "is not a whole JSON file"),
        ([], "found a list"),
        ({}, "found a dict"),
        ({"nodes": ["m0"]}, "found the entries nodes"),
        ({"source": "a paper"}, "found the entries source"),
        ({"heads": [[0, 1, 2]]}, r"heads must be .* found \[\[0, 1, 2\]\]"),
        ({"heads": [[0, 1.0]]}, "heads must be"),
        ({"heads": [[True, 0]]}, "heads must be"),
        ({"heads": [[0, -1]]}, "heads must be"),
        ({"heads": "some"}, 'found "some"'),
        ({"mlps": [[0]]}, "mlps must be"),
        ({"mlps": 3}, "mlps must be .* found 3"),
    ],
)
def test_other_files_are_refused(tmp_path, body, sentence):
    with pytest.raises(CircuitError, match=sentence):
        read(written(tmp_path, body))


@pytest.mark.parametrize(("body", "stray"), [({"heads": [[2, 0]]}, "a2.h0"), ({"heads": [[0, 2]]}, "a0.h2"), ({"mlps": [2]}, "m2")])
def test_a_list_of_a_larger_model_is_refused(tmp_path, body, stray):
    with pytest.raises(CircuitError, match=rf"lists {stray}, but tiny has layers 0-1 and heads 0-1"):
        read(written(tmp_path, body)).of("tiny", 2, 2)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CircuitError, match="cannot be read"):
        read(tmp_path / "none.json")
