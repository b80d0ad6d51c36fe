"""The jobs that evaluate circuits, as a user types them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import yaml
from commands_for_tests import circuitkit, last_line

from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.core.node import INPUT, LOGITS, Edge, Level, Node
from circuitkit.storage import load, save

SMALL = ["task.n=4", "draws=3", "resamples=50", "logger=jsonl"]
LISTS = {
    "mine": {"heads": [[0, 0], [0, 1], [0, 2], [0, 3], [0, 5]], "mlps": "all"},
    "other": {"heads": [[0, 1], [1, 2]], "mlps": [0, 1]},
    "foreign": {"heads": [[9, 1]]},
    "empty": {"heads": [], "mlps": []},
    "apart": {"heads": [[3, 7]]},
}


def free_port():
    with socket.socket() as door:
        door.bind(("", 0))
        return str(door.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    for name, body in LISTS.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    line = {"corrupt": "Van done in 7. Hat done in", "answer": " 2", "wrong": " 9"}
    lines = [json.dumps({"clean": f"Van done in {shown}. Hat done in", **line}) for shown in (3, 5, 8)]
    (folder / "wrong.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_evaluate(folder):
    done = circuitkit("job=evaluate", "circuit=mine.json", "shared=other.json", *SMALL, "dir=evaluation", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        "config.yaml", "evaluation.json", "metrics.jsonl", "run.log", "status.json",
    }  # fmt: skip
    found = load(Finding, folder / "evaluation/evaluation.json")
    body = found.body
    assert (body["task"], body["model"], body["n_prompts"], body["circuit"]["label"]) == ("months", "tiny_gpt2", 12, "mine")
    assert list(body["removed_from_circuit"]) == body["circuit"]["nodes"]
    assert body["score"]["low"] < body["score"]["value"] < body["score"]["high"]
    assert body["random_head"]["n"] == 32
    assert {"settings", "seed", "versions", "model", "prompts_hash", "content_hash"} <= set(found.provenance)
    assert found.provenance["settings"]["question"]["circuit"] == body["circuit"]["nodes"]
    assert json.loads((folder / "evaluation/status.json").read_text())["status"] == "finished"
    numbers = json.loads((folder / "evaluation/metrics.jsonl").read_text().splitlines()[0])
    assert numbers["evaluation/score"] == body["score"]["value"]
    assert yaml.safe_load((folder / "evaluation/config.yaml").read_text())["name"] == "evaluate-months-tiny_gpt2"
    for word in ("mine: 5 heads, 4 MLPs", "random", "a0.h5", "the shared set, heads only (2)"):
        assert word in done.stdout, word


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["circuit=none.json"], "The circuit file 'none.json' cannot be read"),
        (["circuit=foreign.json"], "foreign.json lists a9.h1, but tiny_gpt2 has layers 0-3"),
        (["circuit=empty.json"], "The circuit empty is empty"),
        (["circuit=mine.json", "draws=0"], "draws must be a whole number of at least 1, found 0."),
        (["circuit=mine.json", "task=from_file", "task.path=wrong.jsonl"], "The untouched model tiny_gpt2 solves 0 of the 3 prompts"),
    ],
)
def test_evaluate_refuses(folder, settings, sentence):
    done = circuitkit("job=evaluate", *SMALL, *settings, "dir=refused", cwd=folder)
    assert done.returncode in (1, 2)
    assert last_line(done.stderr).startswith(sentence)
    assert "Traceback" not in done.stderr + done.stdout
    assert not (folder / "refused/evaluation.json").exists()


@pytest.mark.slow
def test_evaluate_goes_on_by_force(folder):
    """A metric for which the model need not be right."""
    settings = ["task=from_file", "task.path=wrong.jsonl", "metric=kl", "force=true", *SMALL, "dir=forced"]
    done = circuitkit("job=evaluate", "circuit=mine.json", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "but force is set" in done.stdout + done.stderr
    assert load(Finding, folder / "forced/evaluation.json").body["n_prompts"] == 3


@pytest.mark.slow
def test_cross_task(folder):
    settings = ["circuits=[mine.json,other.json]", "controls=[apart.json]", "tasks=[numerals,months]", *SMALL, "dir=cross"]
    done = circuitkit("job=cross_task", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = load(Finding, folder / "cross/cross_task.json")
    body = found.body
    assert body["circuits"] == ["mine", "other", "apart", "random like mine", "random like other"]
    assert body["controls"] == ["apart", "random like mine", "random like other"]
    assert body["n_prompts"] == {"numerals": 12, "months": 12}
    assert [len(row) for row in body["percent"]] == [2] * 5
    hashes = [found.provenance["tasks"][task]["prompts_hash"] for task in body["tasks"]]
    assert hashes[0] != hashes[1]
    assert "mine" in done.stdout
    numbers = json.loads((folder / "cross/metrics.jsonl").read_text().splitlines()[0])
    assert numbers["cross_task/mine/months"] == body["percent"][0][1]["value"]
    done = circuitkit("job=cross_task", "circuits=[mine.json]", "tasks=[months,moths]", *SMALL, cwd=folder)
    assert last_line(done.stderr).startswith("There is no task named 'moths'. Did you mean 'months'?")


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "circuitkit.cli"]
    settings = ["job=cross_task", "circuits=[mine.json]", "tasks=[numerals,months]", *SMALL]
    assert circuitkit(*settings, "dir=alone", cwd=folder).returncode == 0
    done = subprocess.run([sys.executable, *launch, *settings, "dir=together"], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    alone, together = (load(Finding, folder / name / "cross_task.json").body for name in ("alone", "together"))
    assert [cell["value"] for row in together["percent"] for cell in row] == pytest.approx(
        [cell["value"] for row in alone["percent"] for cell in row], abs=0.01
    )
    assert done.stdout.count("circuit \\ prompts") == 1


@pytest.mark.slow
def test_compare_of_lists(folder):
    done = circuitkit("job=compare", "circuits=[mine.json,other.json]", "dir=both", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert load(Circuit, folder / "both/shared.json").names == ("a0.h1", "m0", "m1")
    assert load(Finding, folder / "both/compare.json").body["pairs"][0]["containment"] == 0.75
    done = circuitkit("job=compare", "circuits=[mine.json,apart.json]", "dir=both", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "shared by all: nothing, so there is no shared.json" in done.stdout
    assert not (folder / "both/shared.json").exists(), "that of the comparison before would mislead"


@pytest.mark.slow
def test_stability(folder):
    settings = ["design=grid", "task.n=4", "seeds=[0,1]", "orders=null", "thresholds=[0.5]", "dir=stability"]
    done = circuitkit("job=stability", *settings, "method.max_sweeps=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    body = load(Finding, folder / "stability/stability.json").body
    labels = [f"{corruption}-seed{seed}-backward-0.5" for corruption in ("random", "repeat_last") for seed in (0, 1)]
    assert [run["label"] for run in body["runs"]] == labels
    for run in body["runs"]:
        circuit = load(Circuit, folder / "stability" / run["label"] / "circuit.json")
        assert list(circuit.names) == run["nodes"]
        settings_of = circuit.provenance["settings"]
        assert (settings_of["task"]["seed"], settings_of["task"]["corruption"]) == (run["seed"], run["corruption"])
        assert settings_of["method"]["threshold"] == 0.5
    assert set(body["survive_all"]) <= set(body["survive_corruptions"])
    assert body["mean_jaccard"]["threshold"] is None
    again = circuitkit("job=stability", *settings, "method.max_sweeps=1", "overwrite=true", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count("Skipped: the same run") == 4
    assert load(Finding, folder / "stability/stability.json").body == body


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["orders=backward"], "orders must be a list of values, each once, such as [backward,forward], or null; found backward."),
        (["corruptions=[random,rndom]"], "There is no corruption named 'rndom'. Did you mean 'random'?"),
        (["design=stra"], "There is no design named 'stra'. Did you mean 'star'? Choices: grid, star."),
        (["method=knockout", "thresholds=null"], "orders varies method.order, but this method has no order."),
    ],
)
def test_stability_refuses(folder, settings, sentence):
    done = circuitkit("job=stability", "task.n=4", *settings, "dir=never", cwd=folder)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith(sentence)


# Circuits of edges

FRAMES = {"wide": ["a0.h0", "a0.h1", "m0", "a1.h2", "m1"], "narrow": ["a0.h1", "m0", "m1"]}
EDGES = {
    "wide": ["input->a0.h1<v>", "a0.h1->m0", "m0->m1", "m0->logits", "m1->logits"],
    "narrow": ["input->a0.h1<v>", "a0.h1->m0", "m0->logits"],
}
EDGE_PATCHER = "+patcher@edge_patcher=resample"


@pytest.fixture(scope="module")
def edge_folder(folder):
    """The folder of above, with circuits of edges in it as a search leaves them."""
    for name, edges in EDGES.items():
        parsed = [Edge.parse(edge) for edge in edges]
        ends = {end for edge in parsed for end in (edge.src, edge.dst.component_of_port)} - {INPUT, LOGITS}
        within = tuple(map(Node.parse, FRAMES[name]))
        save(Circuit(tuple(ends), 4, 8, "tiny_gpt2", None, Level.EDGE_QKV, {}, tuple(parsed), within), folder / f"edges_{name}.json")
    return folder


@pytest.mark.slow
def test_a_circuit_of_edges_is_evaluated_compared_crossed_and_reported(edge_folder):
    cwd, study = edge_folder, edge_folder / "study"
    done = circuitkit("job=evaluate", "circuit=edges_wide.json", *SMALL, EDGE_PATCHER, "dir=study/evaluation", cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = load(Finding, study / "evaluation/evaluation.json")
    body, settings = found.body, found.provenance["settings"]
    assert list(body["removed_from_circuit"]) == EDGES["wide"] == settings["question"]["circuit"]["edges"]
    assert body["frame"] == FRAMES["wide"] == settings["question"]["circuit"]["within"]
    assert (settings["patcher"]["_target_"], settings["edge_patcher"]["_target_"]) == (
        "circuitkit.patchers.mean.Mean", "circuitkit.patchers.resample.Resample"
    )  # fmt: skip
    assert "5 of the 32 in its frame of 5 components" in done.stdout and "any head" not in done.stdout
    numbers = json.loads((study / "evaluation/metrics.jsonl").read_text().splitlines()[0])
    assert numbers["evaluation/n_edges"] == 5 and numbers["evaluation/score"] == body["score"]["value"]

    done = circuitkit("job=evaluate", "circuit=edges_wide.json", *SMALL, "dir=as_the_patcher", cwd=cwd)
    assert done.returncode == 0, done.stderr
    other = load(Finding, cwd / "as_the_patcher/evaluation.json")
    assert other.provenance["settings"]["edge_patcher"] == other.provenance["settings"]["patcher"]
    assert other.body["score"]["value"] != body["score"]["value"]
    assert other.provenance["content_hash"] != found.provenance["content_hash"]

    files = "[edges_wide.json,edges_narrow.json]"
    done = circuitkit("job=cross_task", f"circuits={files}", "tasks=[numerals,months]", *SMALL, EDGE_PATCHER, "dir=study/cross", cwd=cwd)
    assert done.returncode == 0, done.stderr
    crossed = load(Finding, study / "cross/cross_task.json")
    assert crossed.body["circuits"][:2] == ["edges_wide", "edges_narrow"] and crossed.body["members"]["edges_narrow"] == EDGES["narrow"]
    assert crossed.body["percent"][0][1]["value"] == pytest.approx(body["score"]["value"], abs=0.01)  # the same prompts, frame and edges
    assert "edge_patcher" in crossed.provenance["tasks"]["months"]["settings"] and "circuits of edges (level edge_qkv)" in done.stdout

    done = circuitkit("job=compare", f"circuits={files}", "dir=study/compare", cwd=cwd)
    assert done.returncode == 0, done.stderr
    compared = load(Finding, study / "compare/compare.json").body
    assert compared["pairs"][0]["shared"] == 3 and compared["pairs"][0]["jaccard"] == 3 / 5
    shared = load(Circuit, study / "compare/shared.json")
    assert shared.member_names == EDGES["narrow"] and "shared edges" in done.stdout
    done = circuitkit("job=evaluate", "circuit=edges_wide.json", "shared=study/compare/shared.json", *SMALL, "dir=with_shared", cwd=cwd)
    assert done.returncode == 0 and "the shared set (3)" in done.stdout, done.stderr

    done = circuitkit("job=report", "run=study", cwd=cwd)
    assert done.returncode == 0, done.stderr
    page = (study / "report.html").read_text()
    assert "could not be drawn" not in page + done.stderr
    for words in ("removed edge", "5 of the ", "circuit of edges of a row", "edges in both"):
        assert words in page, words


@pytest.mark.slow
@pytest.mark.parametrize("job", [["job=compare"], ["job=cross_task", "tasks=[months]", *SMALL, "dir=mixed"]], ids=["compare", "cross_task"])
def test_circuits_of_edges_and_of_nodes_are_not_mixed(edge_folder, job):
    done = circuitkit(*job, "circuits=[mine.json,edges_wide.json]", cwd=edge_folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "A circuit of level node and one of level edge_qkv cannot be combined" in last_line(done.stderr)
