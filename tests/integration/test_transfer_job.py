"""job=transfer, as a user types it."""

from __future__ import annotations

import pytest
import yaml
from commands_for_tests import circuitkit

from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.storage import load, save


def transfer(*args, cwd):
    return circuitkit("job=transfer", "logger=jsonl", *args, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Circuits by hand: two that share heads, one that shares none with them, and one of another model."""
    folder = tmp_path_factory.mktemp("transfer")
    for name, model, nodes in (
        ("a", "tiny_gpt2", "a0.h0 a0.h1 a3.h2 m0"),
        ("b", "tiny_gpt2", "a0.h0 a0.h1 a1.h4 m1"),
        ("c", "tiny_gpt2", "a2.h5"),
        ("other", "tiny_llama", "a0.h0"),
    ):
        save(Circuit(tuple(map(Node.parse, nodes.split())), 4, 8, model), folder / f"{name}.json")
    return folder


@pytest.mark.slow
def test_it_leaves_a_finding_and_prints_the_table(folder):
    done = transfer(
        "sets={first: a.json, second: b.json}", "question=[addition_1_digit,numerals_plus_100,date_problem]", "n=12", "draws=2",
        "+question.mine={_target_: circuitkit.tasks.Intervals, step: 5, start: 5}", "dir=out", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    finding = load(Finding, folder / "out" / "transfer.json")
    body = finding.body
    assert [entry["label"] for entry in body["sets"] if not entry["control"]] == ["first", "second", "intersection"]
    assert body["sets"][4]["nodes"] == ["a0.h0", "a0.h1"] and body["sets"][0]["nodes"] == ["a0.h0", "a0.h1", "a3.h2"], "heads only"
    assert [(task["name"], task["asked"]) for task in body["tasks"]] == [("addition_1_digit", 12), ("numerals_plus_100", 8), ("mine", 12)]
    assert [entry["name"] for entry in body["left_out"]] == ["date_problem"]
    assert all(len(row) == 6 for row in body["accuracy"].values())
    assert finding.provenance["settings"]["questions"]["mine"]["step"] == 5
    assert finding.provenance["settings"]["patcher"] == {"_target_": "circuitkit.patchers.zero.Zero"}, "by default"
    assert len(finding.provenance["model"]["fingerprint"]) == 64 and "torch" in finding.provenance["versions"]
    for text in ("addition_1_digit", "12 of 12", "without intersection", "(3 heads)", "random", "left out: date_problem"):
        assert text in done.stdout, text
    settings = yaml.safe_load((folder / "out" / "config.yaml").read_text())
    assert list(settings["question"]) == ["addition_1_digit", "numerals_plus_100", "date_problem", "mine"]


@pytest.mark.slow
def test_sets_that_share_nothing_are_still_measured(folder):
    done = transfer("sets={first: a.json, third: c.json}", "question=[addition_1_digit]", "n=3", "draws=0", "dir=nothing", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "The sets first, third share no component, so their intersection is left out." in done.stdout + done.stderr
    body = load(Finding, folder / "nothing" / "transfer.json").body
    assert [entry["label"] for entry in body["sets"]] == ["first", "third"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["sets={a: a.json}", "question=[adition_1_digit]"], "no question named 'adition_1_digit'. Did you mean 'addition_1_digit'?"),
        (["sets={a: a.json, x: other.json}"], "'tiny_llama', not in 'tiny_gpt2'"),
        (["sets={a: a.json}", "question=[]"], "No question set is named. Choose some, such as question=["),
        (["sets=a.json"], "sets must give a label to at least one circuit file, such as {months: a.json}; found a.json"),
        ([], "sets must be given"),
        (["sets={a: a.json}", "question=[month_list]"], "has a word that the tokenizer does not know"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(folder, settings, sentence):
    done = transfer(*settings, "dir=bad", "overwrite=true", cwd=folder)
    assert done.returncode in (1, 2), done.stderr
    assert sentence in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
