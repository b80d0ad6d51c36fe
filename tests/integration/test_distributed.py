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
