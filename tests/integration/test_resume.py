"""Runs that are killed, and gone on with, as a user types it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from commands_for_tests import circuitkit, last_line, started
from pyarrow import parquet

from circuitkit.storage.journal import JOURNAL, read

# The naive engine, so that there is time to stop it on the way.
SLOW = ["task.n=4", "engine=reference", "logger.wandb.mode=offline", "logger.wandb.folder=wb"]
AGAIN = "logger.wandb.folder=wb"  # neither in the run folder nor in runs, so the run folder cannot choose it on its own


def killed(*args: str, run: Path, at: int, how: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Starts the command line and stops it when the journal holds so many decisions. Returns how it ended and what it said."""
    process = started(*args, cwd=run.parent)
    deadline = time.monotonic() + 300
    while (read(run / JOURNAL) is None) or len(read(run / JOURNAL).steps) < at:
        assert process.poll() is None and time.monotonic() < deadline, "it ended or hung before it was stopped"
        time.sleep(0.002)
    process.send_signal(how)
    done = process.finished(timeout=120)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that finished, and one that was killed, gone on with, terminated, and gone on with to its end."""
    folder = tmp_path_factory.mktemp("resume")
    done = circuitkit("dir=whole", *SLOW[:2], "logger=jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    run, found = folder / "broken", []
    assert killed(f"dir={run}", *SLOW, run=run, at=3)[0] == -signal.SIGKILL
    found.append(read(run / JOURNAL).steps)
    code, said = killed(f"resume={run}", AGAIN, run=run, at=len(found[0]) + 4, how=signal.SIGTERM)
    assert code == 143 and "Traceback" not in said and f"Going on after {len(found[0])} decisions" in said
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    found.append(read(run / JOURNAL).steps)
    refused = circuitkit("resume=broken", AGAIN, "method.threshold=0.9", "task.n=5", cwd=folder)
    done = circuitkit("resume=broken", AGAIN, "logger.wandb.tags=[again]", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, found, refused, done


@pytest.mark.slow
def test_a_broken_run_ends_in_the_same_files(broken):
    folder, (first, second), _, done = broken
    whole = read(folder / "whole" / JOURNAL).steps
    assert 3 <= len(first) < len(second) < len(whole), "it was stopped on the way"
    assert first == whole[: len(first)] and second == whole[: len(second)] and read(folder / "broken" / JOURNAL).steps == whole
    assert (folder / "broken/circuit.json").read_bytes() == (folder / "whole/circuit.json").read_bytes()
    tables = [parquet.read_table(folder / name / "scores.parquet").to_pylist() for name in ("broken", "whole")]
    assert tables[0] == tables[1]
    rows = [json.loads(line) for line in (folder / "broken/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "step/score" in row] == list(range(len(whole)))
    assert not list((folder / "broken").glob("previous-*"))
    assert "score" in done.stdout and str(folder / "broken") in done.stdout


@pytest.mark.slow
def test_what_a_result_depends_on_may_not_change(broken):
    folder, _, refused, _ = broken
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    said = last_line(refused.stderr)
    assert "settings.task.n was 4, is 5; settings.method.threshold was 0.8, is 0.9" in said
    config = yaml.safe_load((folder / "broken/config.yaml").read_text())
    assert (config["task"]["n"], config["method"]["threshold"], config["resume"]) == (4, 0.8, None)


@pytest.mark.slow
def test_a_wandb_run_keeps_its_id(broken):
    folder, *_ = broken
    config = yaml.safe_load((folder / "broken/config.yaml").read_text())["logger"]["wandb"]
    folders = sorted(path.name.rpartition("-")[2] for path in (folder / "wb/wandb").glob("offline-run-*"))
    assert folders == [config["id"]] * 3, "one part for each process that had started to log"
    assert config["tags"] == ["again"] and config["mode"] == "offline"


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(broken):
    folder, *_ = broken
    before = {path.name: path.read_bytes() for path in (folder / "broken").iterdir() if path.name != "run.log"}
    done = circuitkit("resume=broken", cwd=folder)
    assert done.returncode == 0 and last_line(done.stderr).endswith("has finished already: there is nothing to go on with.")
    assert before == {path.name: path.read_bytes() for path in (folder / "broken").iterdir() if path.name != "run.log"}


def test_a_folder_without_a_run_is_not_made(tmp_path):
    done = circuitkit("resume=runs/typo", cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("Expected the folder of a run to go on with, found no such folder: runs/typo.")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_from_elsewhere_runs_no_code_of_its_own(tmp_path):
    """It names a target, and allows it itself."""
    parts = {part: {"_target_": "circuitkit.patchers.Zero"} for part in ("model", "method", "metric", "engine", "patcher")}
    config = {"task": {"_target_": "os.system", "command": "touch hacked"}, "allow_targets": ["os"], **parts}
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").write_text(yaml.safe_dump(config))
    done = circuitkit("resume=0", cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("task._target_ is 'os.system', which is outside of circuitkit.")
    assert not (tmp_path / "hacked").exists()


def test_a_link_in_a_run_folder_is_not_followed_not_even_by_the_log(tmp_path):
    """What a sentence quotes would otherwise be written wherever the folder likes."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").write_text("task: $(touch hacked)")
    (tmp_path / "profile").write_text("")
    (tmp_path / "0/run.log").symlink_to(tmp_path / "profile")
    done = circuitkit("resume=0", cwd=tmp_path)
    assert done.returncode == 2 and "run.log there is a link that leads out of it" in last_line(done.stderr)
    assert (tmp_path / "profile").read_text() == "" and {path.name for path in (tmp_path / "0").iterdir()} == {"config.yaml", "run.log"}
