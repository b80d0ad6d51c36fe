"""The run folder, the dispatcher, and what must never be written down."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

from circuitkit.core.errors import ConfigError, UserError
from circuitkit.core.records import Step, TableArtifact, TextArtifact
from circuitkit.loggers import JsonlLogger, Logger, LoggerGroup, redacted


def started(folder: Path, **fields) -> JsonlLogger:
    logger = JsonlLogger(folder, **fields)
    logger.log_config("months-tiny", {"seed": 0})
    return logger


def lines(folder: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


# The run folder


def test_a_run_can_be_read_back_from_its_folder(tmp_path):
    folder = tmp_path / "deep" / "run"
    logger = JsonlLogger(folder)
    settings = {"task": {"name": "months", "n": 8}, "tags": ("a", "b"), "model": None, "rate": 0.5}
    logger.log_config("months-tiny", settings)
    logger.log_metrics({"baseline/clean": 3.5})
    logger.log_metrics({"search/score": 97.25, "search/node": "a0.h1", "search/kept": True}, step=3)
    logger.log_artifact(TextArtifact("circuit.json", '{"nodes": ["é"]}\n'))
    steps = [Step(0, 0, "a0.h1", 97.25, True, 12, "backward", 12), Step(0, 1, "m0", float("nan"), False, 11, "backward", 12)]
    logger.log_artifact(TableArtifact("scores", [step.row() for step in steps]))
    logger.finalize("finished")

    assert yaml.safe_load((folder / "config.yaml").read_text()) == {**settings, "tags": ["a", "b"]}
    first, second = lines(folder)
    assert first["step"] is None and first["baseline/clean"] == 3.5
    assert {key: second[key] for key in second if key != "time"} == {
        "step": 3,
        "search/score": 97.25,
        "search/node": "a0.h1",
        "search/kept": True,
    }
    assert first["time"] <= second["time"]
    assert (folder / "circuit.json").read_text() == '{"nodes": ["é"]}\n'
    table = pandas.read_parquet(folder / "scores.parquet")
    assert list(table.columns) == list(steps[0].row())
    assert table["node"].tolist() == ["a0.h1", "m0"] and table["kept"].tolist() == [True, False]
    assert table["score"][0] == 97.25 and pandas.isna(table["score"][1])
    end = status(folder)
    assert end["status"] == "finished" and end["name"] == "months-tiny" and end["duration"] >= 0
    assert end["files"] == ["circuit.json", "scores.parquet"]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    numpy = pytest.importorskip("numpy")
    logger = started(tmp_path)
    logger.log_metrics({"nan": float("nan"), "inf": float("-inf"), "single": numpy.float32("nan"), "count": numpy.int64(7)})
    (row,) = lines(tmp_path)
    assert (row["nan"], row["inf"], row["single"], row["count"]) == (None, None, None, 7)


def test_each_line_is_on_disk_before_the_run_ends(tmp_path):
    logger = started(tmp_path)
    logger.log_metrics({"a": 1}, step=0)
    assert lines(tmp_path)[0]["a"] == 1
    assert status(tmp_path)["status"] == "running"


def test_a_finished_run_is_refused_and_left_as_it_was(tmp_path):
    logger = started(tmp_path)
    logger.log_metrics({"a": 1})
    logger.finalize("finished")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    second = JsonlLogger(tmp_path)
    with pytest.raises(ConfigError):
        second.check_unused()
    with pytest.raises(ConfigError, match=r"holds 'months-tiny' .*overwrite=true"):
        second.log_config("other", {"seed": 1})
    second.finalize("failed")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("ending", "overwrite"), [("finished", True), ("failed", False), ("interrupted", False), (None, False)])
def test_what_an_earlier_run_left_moves_aside(tmp_path, ending, overwrite):
    for number in (1, 2):
        logger = started(tmp_path, overwrite=overwrite)
        logger.log_metrics({"run": number})
        logger.log_artifact(TextArtifact("circuit.json", str(number)))
        if ending:
            logger.finalize(ending)
        logger.release()  # as the end of its process would
    (tmp_path / "journal.jsonl").write_text("of the run before")
    (tmp_path / "notes.txt").write_text("not the logger's")

    started(tmp_path, overwrite=overwrite).log_metrics({"run": 3})

    assert [row["run"] for row in lines(tmp_path)] == [3]
    assert not (tmp_path / "circuit.json").exists()
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "journal.jsonl").exists()
    assert (tmp_path / "previous-2" / "journal.jsonl").exists()
    for number in (1, 2):
        old = tmp_path / f"previous-{number}"
        assert [row["run"] for row in lines(old)] == [number]
        assert (old / "circuit.json").read_text() == str(number)
        assert status(old)["status"] == (ending or "running")
        assert (old / "config.yaml").exists()


@pytest.mark.parametrize("name", ["../out.json", "a/../../out.json", "/tmp/ck-out.json", "", ".", "config.yaml", "a/../metrics.jsonl"])
def test_names_outside_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "run"
    logger = started(folder)
    before = sorted(path for path in tmp_path.rglob("*"))
    config = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="inside the run folder"):
        logger.log_artifact(TextArtifact(name, "bad"))
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (folder / "config.yaml").read_text() == config
    assert not Path("/tmp/ck-out.json").exists()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "run"
    logger = started(folder)
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        logger.log_artifact(TextArtifact("link/out.json", "bad"))
    assert not (tmp_path / "out.json").exists()


def test_a_name_may_have_a_folder(tmp_path):
    logger = started(tmp_path)
    logger.log_artifact(TableArtifact("evaluation/curve", [{"size": 1}]))
    assert pandas.read_parquet(tmp_path / "evaluation" / "curve.parquet")["size"].tolist() == [1]


@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path, monkeypatch, crash):
    logger = started(tmp_path)
    logger.log_artifact(TextArtifact("circuit.json", "old"))

    def die(descriptor: int) -> None:
        raise crash

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(UserError if isinstance(crash, OSError) else KeyboardInterrupt):
        logger.log_artifact(TextArtifact("circuit.json", "new"))
    assert (tmp_path / "circuit.json").read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_sentence_and_the_status_is_still_written(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    group = LoggerGroup([started(tmp_path)])
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        group.log_metrics({"a": 1})
    group.finalize("failed")
    assert status(tmp_path)["status"] == "failed"


def test_metrics_outside_of_a_run_are_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="log_config comes first"):
        JsonlLogger(tmp_path).log_metrics({"a": 1})


# Secrets


def test_no_secret_reaches_the_folder(tmp_path):
    settings = {
        "model": {"hf_token": "SECRET1", "tokenizer": "gpt2", "n_tokens": 5, "pad_token": "<pad>", "token": None, "use_token": True},
        "logger": [{"wandb": {"api_key": "SECRET2", "apiKey": "SECRET3", "project": "p"}}],
        "database": {"password": 1234567, "credentials": {"user": "SECRET4"}, "clientSecret": "SECRET5", "secret": ["SECRET6"]},
        "overrides": ["task=months", "model.hf_token=SECRET7", "+WANDB_API_KEY=SECRET8"],
    }
    JsonlLogger(tmp_path).log_config("run", settings)
    text = (tmp_path / "config.yaml").read_text()
    assert "SECRET" not in text and "1234567" not in text
    kept = yaml.safe_load(text)
    assert kept["model"] == {
        "hf_token": "<removed>",
        "tokenizer": "gpt2",
        "n_tokens": 5,
        "pad_token": "<pad>",
        "token": None,
        "use_token": True,
    }
    assert kept["logger"][0]["wandb"]["project"] == "p"
    assert kept["overrides"] == ["task=months", "model.hf_token=<removed>", "+WANDB_API_KEY=<removed>"]
    assert settings["model"]["hf_token"] == "SECRET1", "the run still needs it"


def test_redacted_gives_plain_values():
    plain = redacted({"path": Path("/a"), 1: (2, {"x"}), "text": "a == b"})
    assert plain == {"path": "/a", "1": [2, ["x"]], "text": "a == b"}


# The dispatcher


class Recording(Logger):
    """Notes what it is told, and raises on demand."""

    def __init__(self, error: Exception | None = None, verbs: tuple[str, ...] = ("log_config", "log_metrics", "log_artifact", "finalize")):
        self.error, self.verbs, self.heard = error, verbs, []

    def _hear(self, verb, *args):
        self.heard.append((verb, *args))
        if self.error and verb in self.verbs:
            raise self.error

    def log_config(self, name, settings):
        self._hear("log_config", name, settings)

    def log_metrics(self, metrics, step=None):
        self._hear("log_metrics", metrics, step)

    def log_artifact(self, artifact):
        self._hear("log_artifact", artifact)

    def finalize(self, status):
        self._hear("finalize", status)


class Essential(Recording):
    """The same, and a run is worth nothing without it."""

    essential = True


def run_through(group: LoggerGroup) -> list[tuple]:
    artifact = TextArtifact("circuit.json", "{}")
    calls = [("log_config", "run", {"a": 1}), ("log_metrics", {"x": 1.0}, 4), ("log_artifact", artifact), ("finalize", "finished")]
    for verb, *args in calls:
        getattr(group, verb)(*args)
    return calls


def test_every_logger_hears_every_verb():
    loggers = [Recording(), Recording()]
    calls = run_through(LoggerGroup(loggers))
    assert loggers[0].heard == calls and loggers[1].heard == calls


def test_a_broken_logger_is_reported_once_and_the_others_go_on(caplog):
    broken, whole = Recording(RuntimeError("no route\nto host")), Recording()
    group = LoggerGroup([broken, whole])
    with caplog.at_level(logging.DEBUG):
        calls = run_through(group)
    assert whole.heard == calls
    assert group.failures == {0: 4}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("Recording failed in log_config (RuntimeError: no route).")


def test_two_broken_loggers_are_both_reported(caplog):
    run_through(LoggerGroup([Recording(ValueError("a")), Recording(ValueError("b"))]))
    assert len(caplog.records) == 2


def test_an_essential_loggers_error_is_raised_after_the_others_were_told():
    disk, tracker = Essential(UserError("disk full"), verbs=("log_metrics", "finalize")), Recording()
    group = LoggerGroup([tracker, disk])
    group.log_config("run", {})
    with pytest.raises(UserError, match="disk full"):
        group.log_metrics({"x": 1.0})
    with pytest.raises(UserError, match="disk full"):
        group.finalize("finished")
    assert [verb for verb, *_ in tracker.heard] == ["log_config", "log_metrics", "finalize"]
    assert group.failures == {}


def test_the_end_of_a_failed_run_does_not_hide_why_it_failed(caplog):
    LoggerGroup([Essential(UserError("disk full"))]).finalize("failed")
    (message,) = caplog.messages
    assert message.startswith("Essential failed in finalize (UserError: disk full).")


def test_a_refused_folder_ends_the_run_before_a_tracker_starts(tmp_path):
    started(tmp_path).finalize("finished")
    tracker = Recording()
    with pytest.raises(ConfigError):
        LoggerGroup([tracker, JsonlLogger(tmp_path)]).log_config("run", {})
    assert tracker.heard == []


def test_a_user_error_at_the_start_is_raised_whatever_the_logger():
    with pytest.raises(ConfigError, match="not logged in"):
        LoggerGroup([Recording(ConfigError("not logged in"))]).log_config("run", {})


def test_a_user_error_later_is_not(caplog):
    group = LoggerGroup([Recording(ConfigError("bad name"), verbs=("log_artifact",))])
    run_through(group)
    assert group.failures == {0: 1} and len(caplog.records) == 1


def test_an_interruption_goes_through():
    class Interrupting(Recording):
        def log_metrics(self, metrics, step=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LoggerGroup([Interrupting()]).log_metrics({})


def test_importing_the_loggers_imports_no_wandb_and_no_torch():
    code = "import sys, circuitkit.loggers; print([name for name in ('wandb', 'torch', 'pandas', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
