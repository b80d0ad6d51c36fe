"""The study in experiments/seqcont, run as a user runs it, on the embedded GPT-2 and with few prompts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.findings import Finding
from circuitkit.storage import load

SEQCONT = Path(__file__).parents[2] / "experiments" / "seqcont"
TASKS = ("numerals", "numwords", "months")
CHEAPER = {
    "evaluation": ["draws=5", "resamples=100"],
    "stability": ["corruptions=[random,repeat_all]", "seeds=[0]", "orders=[backward]", "thresholds=[0.8]"],
    "cross_task": ["draws=5", "resamples=100"],
    "transfer": ["draws=3", "n=8", "question=[numerals_plus_1,addition_1_digit]"],
}

pytestmark = pytest.mark.slow


def run(folder, *arguments):
    command = [sys.executable, str(folder / "seqcont/study.py"), "tiny_gpt2", "--dir", str(folder / "out"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ), timeout=900)


def commands_of(done):
    return [line for line in done.stdout.splitlines() if line.startswith("$ circuitkit")]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished study, and what it said. Its experiment is the real one but for the size of what costs most."""
    folder = tmp_path_factory.mktemp("study of seqcont")
    shutil.copytree(SEQCONT, folder / "seqcont", ignore=shutil.ignore_patterns("results", "__pycache__"))
    path = folder / "seqcont/conf/experiment/tiny_gpt2.yaml"
    experiment = yaml.safe_load(path.read_text())
    assert CHEAPER.keys() <= experiment["study"].keys()
    experiment["study"] |= CHEAPER
    path.write_text(f"# @package _global_\n{yaml.safe_dump(experiment)}")
    done = run(folder, "--prompts", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, out=folder / "out", done=done)


@pytest.fixture(scope="module")
def tables(study):
    """Every table, row by row under its first column."""
    sys.path.insert(0, str(SEQCONT))
    from tables import load

    return {name: {next(iter(row.values())): row for row in rows} for name, rows in load(study.out / "tables").items()}


def body(study, name):
    return load(Finding, study.out / f"{name}.json").body


def circuit(study, task):
    return load(Circuit, study.out / "nodes" / task / "circuit.json")


def test_every_table_and_the_report_are_there(study, tables):
    assert {name: set(rows) for name, rows in tables.items() if name != "roles"} == {
        **dict.fromkeys(("circuits", "edges", "parts", "stability"), set(TASKS)),
        "compare": {"numerals&numwords", "numerals&months", "numwords&months", "all"},
        "cross_task": {*TASKS, "ioi", *(f"random like {task}" for task in TASKS)},
        "transfer": {"numerals_plus_1", "addition_1_digit"},
    }
    assert {name.partition("/")[0] for name in tables["roles"]} == set(TASKS)
    assert "<html" in (study.out / "report.html").read_text()
    assert len(commands_of(study.done)) == 4 + 1 + 5 * 3 + 2 + 1
    assert "Traceback" not in study.done.stdout + study.done.stderr
    assert study.done.stderr.count("The model of the last job is used again") == 4 + 5 * 3 + 2 - 1, "it is loaded once"


@pytest.mark.parametrize("task", TASKS)
def test_circuits_explain_their_own_task_and_random_ones_do_not(study, tables, task):
    found = circuit(study, task)
    evaluation = body(study, f"evaluation/{task}/evaluation")
    assert found.score > 80
    assert evaluation["score"]["value"] == pytest.approx(found.score, abs=1e-3)
    assert max(evaluation["random_circuits"]["scores"]) < found.score / 2
    assert evaluation["random_circuits"]["share_as_good"] == pytest.approx(1 / 6)
    without = next(each for each in evaluation["sets_removed_from_model"] if each["control_of"] is None)
    assert without["score"]["value"] < 20
    row = tables["circuits"][task]
    assert (row["heads"], row["mlps"], row["members"].split()) == (str(len(found.heads)), str(len(found.mlps)), list(found.names))
    assert float(row["score"]) == pytest.approx(found.score, abs=0.006)


@pytest.mark.parametrize("task", TASKS)
def test_stages_agree_on_the_circuit(study, tables, task):
    """The same circuit on the same prompts has one score, whoever measures it; the same search finds it again."""
    score = circuit(study, task).score
    edges = body(study, f"edges/{task}/edges")
    assert edges["node_score"] == pytest.approx(score, abs=1e-2)
    assert 0 < len(edges["kept"]) < len(edges["edges"])
    assert set(edges["nodes"]) | set(edges["dropped_nodes"]) == set(circuit(study, task).names)
    cross = body(study, "cross_task/cross_task")
    cell = cross["percent"][cross["circuits"].index(task)][cross["tasks"].index(task)]
    assert cell["value"] == pytest.approx(score, abs=1e-3)
    assert float(tables["cross_task"]["ioi"][task]) < score
    assert float(tables["cross_task"][f"random like {task}"][task]) < score / 2
    runs = {run["label"]: run for run in body(study, f"stability/{task}/stability")["runs"]}
    assert list(runs) == ["random-seed0-backward-0.8", "repeat_all-seed0-backward-0.8"]
    assert runs["random-seed0-backward-0.8"]["nodes"] == list(circuit(study, task).names)


@pytest.mark.parametrize("task", TASKS)
def test_knockouts_are_of_the_full_model_and_agree_with_the_evaluation(study, task):
    scores = load(Scores, study.out / "knockout" / task / "scores.json").values
    assert len(scores) == 4 * 8 + 4
    alone = body(study, f"evaluation/{task}/evaluation")["removed_from_model"]
    assert {node: scores[node] for node in alone} == pytest.approx({node: each["value"] for node, each in alone.items()}, abs=1e-2)


def test_what_circuits_share_lies_in_all_of_them(study, tables):
    shared = tables["compare"]["all"]["members"].split()
    circuits = [set(circuit(study, task).names) for task in TASKS]
    assert set(shared) == set.intersection(*circuits)
    assert shared, "with nothing shared there would be nothing to test"
    assert list(load(Circuit, study.out / "compare/shared.json").names) == shared
    sets = {each["label"]: each for each in body(study, "transfer/transfer")["sets"]}
    assert sets["intersection"]["nodes"] == [name for name in shared if name.startswith("a")]
    assert {label for label, each in sets.items() if not each["control"]} == {*TASKS, "intersection"}
    for task in TASKS:
        labels = [each["label"] for each in body(study, f"evaluation/{task}/evaluation")["sets_removed_from_model"]]
        assert "the shared set" in labels


def test_a_second_run_makes_the_report_alone(study):
    before = contents(study.out / "tables")
    (study.out / "report.html").unlink()
    again = run(study.folder, "--prompts", "8")
    assert again.returncode == 0, again.stderr
    assert len(commands_of(again)) == 1
    assert "job=report" in commands_of(again)[0]
    assert contents(study.out / "tables") == before
    assert (study.out / "report.html").is_file()


def test_other_settings_are_refused(study):
    before = contents(study.out / "tables")
    other = run(study.folder, "--prompts", "4")
    assert other.returncode == 1
    assert other.stderr.startswith(f"{study.out} holds a study with other settings")
    assert commands_of(other) == []
    assert contents(study.out / "tables") == before
    unknown = subprocess.run([sys.executable, str(SEQCONT / "study.py"), "tiny_gtp2"], capture_output=True, text=True, cwd=study.folder)
    assert unknown.returncode == 2
    assert "choose from" in unknown.stderr


def test_a_command_that_fails_stops_the_study(study, tmp_path):
    shutil.copytree(study.folder / "seqcont", tmp_path / "seqcont")
    shutil.copytree(study.out, tmp_path / "out", ignore=shutil.ignore_patterns("compare", "report.html", "figures", "tables"))
    path = tmp_path / "out/nodes/months/circuit.json"
    path.write_text(path.read_text().replace('"n_layers": 4', '"n_layers": 5'))
    done = run(tmp_path, "--prompts", "8")
    assert done.returncode == 1
    assert len(commands_of(done)) == 1
    assert "job=compare" in commands_of(done)[0]
    said = (done.stdout.partition(commands_of(done)[0])[2] + done.stderr).strip().splitlines()
    assert len(said) == 1
    assert "was changed or damaged after it was written" in said[0]
    assert not (tmp_path / "out/tables").exists()
    assert not (tmp_path / "out/report.html").exists()
