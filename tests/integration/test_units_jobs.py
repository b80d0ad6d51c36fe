"""Circuits of whole attentions, neurons and features, from the search to the report, as a user types it."""

from __future__ import annotations

import json

import pytest
import torch
from commands_for_tests import circuitkit
from safetensors.torch import save_file

from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.core.node import Level
from circuitkit.storage.values import load

SMALL = ["task.n=4", "logger=jsonl"]
UNITS = {
    "attention": ["units=attentions"],
    "neuron": ["units=neurons", "units.layers=[0]", "method.max_sweeps=1", "method.threshold=0.5"],
    "feature": ["units=features", "units.dictionaries={r1: sae}", "method.max_sweeps=1", "method.threshold=0.3"],
}
MEASURE = {"attention": [], "neuron": UNITS["neuron"][:2], "feature": UNITS["feature"][:2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    (folder / "sae").mkdir()
    generator = torch.Generator().manual_seed(0)
    width = 128
    directions = torch.nn.functional.normalize(torch.randn(6, width, generator=generator), dim=-1)
    weights = {"W_enc": directions.T.contiguous(), "W_dec": directions, "b_enc": torch.zeros(6), "b_dec": torch.zeros(width)}
    save_file(weights, folder / "sae" / "sae_weights.safetensors")
    (folder / "sae" / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": width, "d_sae": 6}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("level", sorted(UNITS))
def test_search_evaluate_compare_and_report(folder, level):
    there = folder / level
    for run in ("a", "b"):
        done = circuitkit("method=iterative_pruning", *UNITS[level], *SMALL, f"dir={level}/{run}", cwd=folder)
        assert done.returncode == 0, done.stderr
    circuit = load(Circuit, there / "a/circuit.json")
    assert circuit.level is Level(level) and circuit.nodes and circuit.provenance["universe"]
    done = circuitkit(
        "job=evaluate", f"circuit={level}/a/circuit.json", *MEASURE[level], *SMALL, "draws=2", "resamples=20", f"dir={level}/e", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = load(Finding, there / "e/evaluation.json")
    assert found.body["score"]["value"] == pytest.approx(circuit.score, abs=1e-3)
    assert found.body["circuit"]["size"] == circuit.summary and circuit.summary in done.stdout
    done = circuitkit("job=compare", f"circuits=[{level}/a/circuit.json,{level}/b/circuit.json]", f"dir={level}/c", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert load(Finding, there / "c/compare.json").body["pairs"][0]["jaccard"] == 1.0
    done = circuitkit("job=report", f"run={level}", cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_knockout_of_neurons(folder):
    done = circuitkit("method=knockout", "units=neurons", "units.layers=[2]", *SMALL, "dir=knockout", cwd=folder)
    assert done.returncode == 0, done.stderr
    body = json.loads((folder / "knockout/scores.json").read_text())
    assert list(body["values"])[:2] == ["m2.n0", "m2.n1"] and len(body["values"]) == 512


@pytest.mark.slow
def test_other_units_than_those_of_the_search_are_refused(folder):
    made = circuitkit("method=iterative_pruning", *UNITS["neuron"], *SMALL, "dir=layer_0", cwd=folder)
    assert made.returncode == 0, made.stderr
    done = circuitkit("job=evaluate", "circuit=layer_0/circuit.json", *SMALL, "dir=other", cwd=folder)
    assert done.returncode == 2 and "was found among other units" in done.stderr
    done = circuitkit("method=random_circuit", "method.n_heads=1", "method.n_mlps=1", "units=neurons", *SMALL, "dir=no", cwd=folder)
    assert done.returncode == 2 and "random_circuit searches nodes alone" in done.stderr
    done = circuitkit("method=knockout", "units=neurons", "units.layers=[9]", *SMALL, "dir=no2", cwd=folder)
    assert done.returncode in (1, 2) and "has layers 0 to 3, found 9" in done.stderr
