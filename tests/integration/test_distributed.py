"""One search over two processes: the decisions of one process, and no process left waiting when another fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.models import processes

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
SMALL = ["task.n=4", "logger=jsonl"]


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def launched(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **env}
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes saw in processes.py."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port()]
    done = launched(*torchrun, str(HERE / "processes.py"), str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process sees there that does not share its work."""
    folder = tmp_path_factory.mktemp("one")
    done = launched(sys.executable, str(HERE / "processes.py"), str(folder), cwd=folder, RANK="0")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "0.json").read_text())


@pytest.mark.parametrize("what", ["pruning", "knockout"])
def test_two_processes_find_what_one_finds(two, alone, what):
    for seen in two:
        for key in ("found", "steps", "baseline"):
            assert seen[what][key] == alone[what][key], key
    assert len(alone[what]["steps"]) >= 16


def test_both_processes_compute(two, alone):
    for what in ("pruning", "knockout"):
        assert min(seen[what]["passes"] for seen in two) > 2
    # Four layers of knock-outs in passes of a few masks each: half of them here, half there.
    assert max(seen["knockout"]["layer_rows"] for seen in two) < 0.85 * alone["knockout"]["layer_rows"]


@pytest.mark.parametrize("rule", ["single", "cumulative"])
def test_two_processes_find_the_edges_that_one_finds(two, alone, rule):
    """Single edges to the last bit, since the passes are those of one process; whole masks share passes with others than there."""
    expected = alone[f"edges {rule}"]
    circuit = Circuit.from_json(expected["found"])
    assert circuit.names == ("a0.h1", "m1", "a2.h0") and len(circuit.edges) >= 4
    for seen in (each[f"edges {rule}"] for each in two):
        if rule == "single":
            assert (seen["found"], seen["steps"]) == (expected["found"], expected["steps"])
        assert [(edge, kept) for edge, _, kept in seen["steps"]] == [(edge, kept) for edge, _, kept in expected["steps"]]
        assert [score for _, score, _ in seen["steps"]] == pytest.approx([score for _, score, _ in expected["steps"]], abs=1e-3)
        found = Circuit.from_json(seen["found"])
        assert (found.edges, found.within) == (circuit.edges, circuit.within) and found.score == pytest.approx(circuit.score, abs=1e-3)


def test_both_processes_compute_edges(two, alone):
    single = [seen["edges single"] for seen in two]
    whole = alone["edges single"]
    assert max(seen["layer_rows"] for seen in single) < 0.7 * whole["layer_rows"]
    assert max(seen["passes"] for seen in single) < 0.7 * whole["passes"] and sum(seen["passes"] for seen in single) >= whole["passes"]
    for what in ("edges cumulative", "evaluation of edges"):
        assert min(seen[what]["edge_masks"] for seen in two) > 0.3 * alone[what]["edge_masks"], what
    assert max(seen["evaluation of edges"]["edge_masks"] for seen in two) < 0.8 * alone["evaluation of edges"]["edge_masks"]
    assert max(seen["evaluation of nodes"]["layer_rows"] for seen in two) < 0.8 * alone["evaluation of nodes"]["layer_rows"]


def numbers_in(value):
    """All numbers, and the texts around them, in order."""
    if isinstance(value, dict):
        return [each for key in value for each in (key, *numbers_in(value[key]))]
    return [each for inner in value for each in numbers_in(inner)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("what", ["evaluation of nodes", "evaluation of edges"])
def test_two_processes_evaluate_as_one_does(two, alone, what):
    assert two[1][what]["body"] is None
    found, expected = numbers_in(two[0][what]["body"]), numbers_in(alone[what]["body"])
    assert [type(each) for each in found] == [type(each) for each in expected] and len(found) > 50
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other)


def test_a_shortage_of_memory_in_one_process_loses_no_value(two, alone):
    """From there on its passes are others than those of the first one, so each makes all of them."""
    found, expected = two[0]["short of memory"]["values"], alone["short of memory"]["values"]
    assert len(found) == len(expected) == 64
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)  # and so not NaN
    assert [seen["short of memory"]["rows"] for seen in two] == [12, 6] and alone["short of memory"]["rows"] == 12
    assert two[0]["short of memory"]["asked"] > alone["short of memory"]["asked"]


def test_the_planted_circuit_is_found_in_both(two):
    for seen in two:
        assert Circuit.from_json(seen["pruning"]["found"]).names == ("a0.h1", "m1", "a2.h0")
        assert Scores.from_json(seen["knockout"]["found"]).top(1)[0][1] < 50


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_says_why_and_the_other_stops(two, rank):
    other = 1 - rank
    assert two[rank][f"fails in {rank}"] == ["ZeroDivisionError", "in this process"]
    kind, text = two[other][f"fails in {rank}"]
    assert (kind, text.partition(" of this launch")[0]) in {("MeasurementError", "Process 1"), ("FailedElsewhere", "The first process")}


def test_a_job_that_the_first_process_left_out_fails_alone_and_the_next_one_runs(two, alone):
    assert "that one has left this job out" in two[1]["left out"][1]
    for seen in two:
        assert seen["after"]["found"] == alone["knockout"]["found"]


def test_methods_that_look_ahead_look_as_far_as_there_are_processes(two):
    for seen in two:
        own, together = seen["batch"]
        assert together == 2 * own >= 2


def test_accelerate_launches_the_command_line(tmp_path):
    """Over two processes without cards; the same folder as of one process, and only the first process speaks and writes."""
    one = launched(sys.executable, "-m", "circuitkit.cli", "dir=one", *SMALL, cwd=tmp_path)
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [
        str(BIN / "accelerate"),
        "launch",
        "--multi_gpu",
        *quiet,
        "--num_processes",
        "2",
        "--main_process_port",
        free_port(),
        "-m",
        "circuitkit.cli",
        "dir=two",
        *SMALL,
    ]
    two = launched(*command, cwd=tmp_path, ACCELERATE_USE_CPU="true", TMPDIR=str(tmp_path))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert "2 processes share the masks of this search" in two.stderr
    assert two.stdout.count("baseline") == 1
    folders = [tmp_path / name for name in ("one", "two")]
    assert (folders[0] / "circuit.json").read_bytes() == (folders[1] / "circuit.json").read_bytes()
    tables = [pandas.read_parquet(folder / "scores.parquet") for folder in folders]
    assert len(tables[0]) > 36
    pandas.testing.assert_frame_equal(*tables)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and (folders[1] / "run.log").read_text().count("Self-check") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and "circuitkit" in path.name) == []


def test_a_launch_that_started_only_one_process_says_so(monkeypatch, caplog):
    """What `accelerate launch --cpu --num_processes 2` leaves where there is no MPI."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    processes._warn_of_a_launch_of_one.cache_clear()
    assert processes.processes() == processes.Processes(0, 1) and not caplog.messages
    monkeypatch.setenv("MASTER_PORT", "29500")
    processes._warn_of_a_launch_of_one.cache_clear()
    assert processes.processes().is_first
    assert "started a single process" in caplog.text and "torchrun" in caplog.text
