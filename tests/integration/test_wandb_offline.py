"""WandbLogger with the real wandb, in processes of their own, offline and without a network."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

TWO_RUNS = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import wandb
from circuitkit.core.records import TableArtifact, TextArtifact
from circuitkit.loggers import LoggerGroup, WandbLogger

def group(**fields):
    return LoggerGroup([WandbLogger(project="planted", group="sweep-7", tags=["tiny"], mode=fields.pop("mode", None), **fields)])

first, second = group(folder="first"), group(folder="second", mode="offline", name="n" * 200)
first.log_config("months-tiny", {"task": {"name": "months"}, "hf_token": "SECRET"})
second.log_config("other", {})
for step in range(3):
    first.log_metrics({"search/score": 90.5 + step, "search/node": f"a0.h{step}"}, step=step)
first.log_metrics({"search/score": float("nan")}, step=0)
second.log_metrics({"search/score": -1.0}, step=0)
first.log_metrics({"evaluation/score": 98.25, "evaluation/size": 5})
first.log_artifact(TableArtifact("scores", [{"node": "a0.h0", "score": 90.5}, {"score": None, "node": "m0"}]))
first.log_artifact(TableArtifact("empty", []))
first.log_artifact(TextArtifact("circuit.json", json.dumps({"nodes": ["a0.h0"]})))
second.finalize("interrupted")
first.finalize("finished")
first.finalize("failed")
print(json.dumps({"failures": [first.failures, second.failures], "global_run": repr(wandb.run)}))
"""

ONE_RUN = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from circuitkit.loggers import LoggerGroup, WandbLogger
group = LoggerGroup([WandbLogger(**json.loads(sys.argv[1]))])
group.log_config("run", {"a": 1})
group.log_metrics({"x": 1.5}, step=0)
group.finalize("finished")
print(json.dumps(group.failures))
"""


def run(code: str, folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in an empty home, with nothing of the caller's W&B settings, and with no way to the network by accident."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG")) and key != "NETRC"}
    home = folder / "home"
    home.mkdir()
    here = {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[2])}
    wandb = {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    # No terminal on stdin: were W&B to ask for a key, this would fail at once instead of hanging.
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=folder,
        env={**clean, **here, **wandb, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_one(where: Path, env: dict[str, str] | None = None, **fields: Any) -> subprocess.CompletedProcess[str]:
    return run(ONE_RUN, where, json.dumps({"folder": "runs", **fields}), **(env or {}))


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """The transaction log of the one offline run in a folder: what ``wandb sync`` would send."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = []
    for content in _log_entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        found.append(record)
    return found


def _log_entries(data: bytes) -> Iterator[bytes]:
    # LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, in them (checksum, length, kind, part of an entry).
    assert data[:4] == b":W&B"
    position, entry = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield entry
            entry = b""


def of_kind(found: list[wandb_internal_pb2.Record], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("wandb")
    done = run(TWO_RUNS, folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def first(two_runs) -> list[wandb_internal_pb2.Record]:
    return records(two_runs[0] / "first")


def test_logged_out_it_goes_on_offline_and_says_so_in_one_line(two_runs):
    folder, done = two_runs
    (line,) = done.stderr.splitlines()
    (offline,) = folder.glob("first/wandb/offline-run-*")
    assert "nobody is logged in" in line and line.endswith(f"wandb sync {offline}")
    assert json.loads(done.stdout) == {"failures": [{}, {}], "global_run": "None"}


def test_what_the_run_is_called_and_its_settings(first):
    (begin,) = of_kind(first, "run")
    assert (begin.project, begin.run_group, begin.display_name, list(begin.tags)) == ("planted", "sweep-7", "months-tiny", ["tiny"])
    config = values(begin.config.update)
    assert config["task"] == {"name": "months"} and config["hf_token"] == "<removed>"


def test_history_has_the_steps_that_were_given(first):
    rows = [values(history.item) for history in of_kind(first, "history")]
    scores = [(row["step"], row["search/score"], row.get("search/node")) for row in rows if "search/score" in row]
    assert scores[:3] == [(0, 90.5, "a0.h0"), (1, 91.5, "a0.h1"), (2, 92.5, "a0.h2")]
    step, score, _ = scores[3]
    assert step == 0 and score != score, "a later phase counts from 0 again"
    glob = [metric for metric in of_kind(first, "metric") if metric.glob_name == "*"]
    assert [metric.step_metric for metric in glob] == ["step"]


def test_summary_has_the_numbers_of_the_whole_run_and_how_it_ended(first):
    summary: dict[str, Any] = {}
    for record in of_kind(first, "summary"):
        summary |= values(record.update)
    assert (summary["evaluation/score"], summary["evaluation/size"], summary["status"]) == (98.25, 5, "finished")
    assert [end.exit_code for end in of_kind(first, "exit")] == [0]


def test_the_table_is_whole(two_runs, first):
    (file,) = two_runs[0].glob("first/wandb/offline-run-*/files/media/table/scores_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["node", "score"]
    assert table["data"] == [["a0.h0", 90.5], ["m0", None]]
    assert "scores/_type" in {key for history in of_kind(first, "history") for key in values(history.item)}


def test_the_circuit_is_an_artifact_of_the_run(two_runs, first):
    (begin,) = of_kind(first, "run")
    (circuit,) = (artifact for artifact in of_kind(first, "artifact") if artifact.type == "circuit")
    assert circuit.name == f"circuit-{begin.run_id}"
    (entry,) = circuit.manifest.contents
    assert entry.path == "circuit.json"
    staged = Path(entry.local_path)
    assert json.loads(staged.read_text()) == {"nodes": ["a0.h0"]}
    assert staged.is_relative_to(two_runs[0])


def test_two_runs_of_one_process_do_not_mix(two_runs):
    second = records(two_runs[0] / "second")
    (begin,) = of_kind(second, "run")
    assert begin.display_name == "n" * 128
    scores = [values(history.item).get("search/score") for history in of_kind(second, "history")]
    assert scores == [-1.0]
    assert [end.exit_code for end in of_kind(second, "exit")] == [1]


def test_nothing_about_the_machine_is_collected(two_runs, first):
    (begin,) = of_kind(first, "run")
    assert begin.host == "" and not begin.HasField("git")
    kinds = {record.WhichOneof("record_type") for record in first}
    assert not kinds & {"stats", "environment", "output", "output_raw"}, kinds
    files = {path.name for path in two_runs[0].glob("first/wandb/offline-run-*/files/**/*") if path.is_file()}
    assert not files & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}, files
    everything = b"".join(path.read_bytes() for path in two_runs[0].rglob("*") if path.is_file())
    assert b"SECRET" not in everything


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_one(tmp_path, folder="file/runs", mode="offline")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"0": 2}
    (line,) = done.stderr.splitlines()
    assert line.startswith("WandbLogger failed in log_config (NotADirectoryError")


def test_online_without_a_login_is_refused_at_the_start(tmp_path):
    done = run_one(tmp_path, mode="online")
    assert done.returncode == 1
    assert "ConfigError: Expected to be logged in to W&B, since its mode is 'online', but nobody is logged in." in done.stderr


def test_the_environment_variable_chooses_the_mode_where_the_config_does_not(tmp_path):
    done = run_one(tmp_path, {"WANDB_MODE": "disabled"})
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", {})
    assert not list(tmp_path.glob("runs/wandb/*"))


@pytest.mark.parametrize("key", ["too-short", pytest.param("0" * 40, marks=pytest.mark.slow)])
def test_a_login_that_leads_nowhere_ends_offline(tmp_path, key):
    done = run_one(tmp_path, {"WANDB_API_KEY": key}, init_timeout=1.0)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
    ours = [line for line in done.stderr.splitlines() if not line.startswith("wandb:")]
    assert len(ours) == 1 and "recorded offline" in ours[0]
    assert key not in done.stderr
    history = [values(history.item) for history in of_kind(records(tmp_path / "runs"), "history")]
    assert [(row["step"], row["x"]) for row in history] == [(0, 1.5)]


def test_an_unknown_mode_is_refused_before_anything_runs():
    from circuitkit.core.errors import ConfigError
    from circuitkit.loggers import WandbLogger

    with pytest.raises(ConfigError, match="Did you mean 'offline'"):
        WandbLogger(mode="ofline")
