"""The job that looks at every part, as a user types it."""

import json

import pytest
from commands_for_tests import circuitkit

from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.storage import load, save

pytestmark = pytest.mark.slow


def test_it_writes_a_finding_and_marks_the_circuit(tmp_path):
    save(Circuit((Node.parse("a0.h0"), Node.parse("m3")), 4, 8, model="tiny_gpt2"), tmp_path / "circuit.json")
    done = circuitkit("job=roles", "task.n=8", "dir=here", "circuit=circuit.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    finding = load(Finding, tmp_path / "here/roles.json")
    assert finding.title == "Roles in tiny_gpt2 on months" and finding.body["task"] == "months"
    assert list(finding.body["patterns"]) == ["a0.h0"] and finding.body["skipped"] == {}
    assert {"settings", "seed", "model", "prompts_hash", "versions"} <= set(finding.provenance)
    assert finding.provenance["settings"]["task"]["n"] == 8 and len(finding.provenance["model"]["fingerprint"]) == 64
    assert "a0.h0*" in done.stdout and "m3* +" in done.stdout and f"folder    {tmp_path / 'here'}\n" in done.stdout
    lens = finding.body["logit_lens"]
    assert lens["answer_top1"][-1] == 1.0 and lens["n"] == 24, "prompts that the model can do"
    assert 0 < sum(lens["switch"].values()) <= 24, "in some the answer leads from the start"
    assert json.loads((tmp_path / "here/roles.json").read_text())["kind"] == "roles"


def test_a_circuit_of_another_model_is_refused_in_a_sentence(tmp_path):
    save(Circuit((Node.parse("m0"),), 2, 2, model="other"), tmp_path / "circuit.json")
    done = circuitkit("job=roles", "task.n=2", "circuit=circuit.json", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "This circuit was found in other with 2 layers x 2 heads" in done.stderr
