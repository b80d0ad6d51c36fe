"""One table of a sweep, whatever became of its jobs."""

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from pyarrow import parquet

from circuitkit.core.errors import ConfigError
from circuitkit.jobs.collect import collect, differing, run, summary
from circuitkit.jobs.sweep_table import page, write

NASTY = "<script>alert('x')</script> & \"more\""


def job(root, name, status, overrides, *, score=None, **fields):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"status": status, "overrides": overrides, **fields}))
    if score is not None:
        rows = [{"step": 0, "time": 1, "step/score": 99.0}, {"step": None, "time": 1, "circuit/score": score, "circuit/size": 4}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": null, "torn')
        (folder / "circuit.json").write_text(json.dumps({"provenance": {"content_hash": "abc"}}))
        (folder / "status.json").write_text(json.dumps({"status": "finished", "duration": 9.0}))
    return folder


@pytest.fixture
def sweep(tmp_path):
    root = tmp_path / "sweep"
    done = job(root, "0_a", "finished", ["task=months", "+method.threshold=0.8"], score=81.5, number=0, started=10.0, ended=12.5)
    job(root, "1_b", "failed", ["task=months", "method.threshold=1.5"], number=1, error=NASTY, started=1.0, ended=1.5)
    job(root, "2_c", "skipped", ["task=months", "method.threshold=0.8"], number=2, same_as="../0_a", content_hash="abc")
    job(root, "10_d", "running", ["task=months", "method.threshold=0.7"], number=10, started=1.0)
    job(root, ".submitit/1", "finished", [], number=0)
    (done / "previous-1").mkdir()
    (done / "previous-1/status.json").write_text(json.dumps({"status": "finished"}))
    (root / "11_e").mkdir()
    (root / "11_e/job.json").write_text("{")
    return root


def test_a_row_a_job(sweep):
    rows = collect(sweep)
    assert [row["folder"] for row in rows] == ["0_a", "1_b", "2_c", "10_d", "11_e"]
    first, failed, skipped, killed, broken = rows
    assert broken == {"folder": "11_e"}, "nothing can be read there, and it is still counted"
    assert first == {
        "run": 0, "folder": "0_a", "status": "finished", "task": "months", "method.threshold": "0.8", "circuit/score": 81.5,
        "circuit/size": 4, "seconds": 2.5, "content_hash": "abc",
    }  # fmt: skip
    assert failed["error"] == NASTY and "circuit/score" not in failed
    assert skipped["circuit/score"] == 81.5 and skipped["content_hash"] == "abc"
    assert killed["status"] == "running" and "seconds" not in killed
    assert differing(rows) == ["method.threshold"]
    assert summary(rows).startswith("5 jobs, 2 done: ")


def test_the_files_agree(sweep):
    rows = collect(sweep)
    write(rows, sweep, summary(rows))
    with (sweep / "collect.csv").open(newline="") as file:
        text = list(csv.DictReader(file))
    table = parquet.read_table(sweep / "collect.parquet").to_pylist()
    assert len(text) == len(table) == 5
    assert [row["circuit/score"] for row in table] == [81.5, None, 81.5, None, None]
    assert [row["circuit/score"] for row in text] == ["81.5", "", "81.5", "", ""]
    assert text[1]["error"] == table[1]["error"] == NASTY
    assert collect(sweep) == rows, "its own files are no jobs"


def test_a_column_of_numbers_and_texts_becomes_texts(tmp_path):
    write([{"a": 1, "b": 1}, {"a": "x", "b": 2.5}, {}], tmp_path, "")
    assert parquet.read_table(tmp_path / "collect.parquet").to_pydict() == {"a": ["1", "x", None], "b": [1.0, 2.5, None]}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for key, value in attributes if key in ("href", "src")]
        assert not [key for key, _ in attributes if key.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_escaped_and_needs_nothing_else():
    rows = [{"folder": NASTY, "status": '"><img src=x onerror=alert(1)>', "error": NASTY, NASTY: 1.0}, {"folder": "javascript:alert(1)"}]
    tags = Tags()
    tags.feed(page(rows, list(rows[0]), NASTY, NASTY))
    assert not {"script", "img", "link", "iframe"} & set(tags.seen)
    assert tags.seen.count("tr") == 3
    assert tags.text.count(NASTY) == 6, "title, heading, sentence, column and two cells, as they are"
    assert len(tags.links) == 2 and all(link.startswith("./") for link in tags.links)


def test_the_command_line(sweep, tmp_path):
    code = "import sys, circuitkit.cli as cli\ncli.main()\nassert not {'torch', 'transformers'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "job=collect", "dir=sweep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "99"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["0", "finished", "0.8", "81.5", "4", "2.5"] for line in lines), done.stdout
    assert f"1: {NASTY}" in lines
    assert "5 jobs, 2 done: " in done.stdout
    assert all((sweep / f"collect.{kind}").is_file() for kind in ("parquet", "csv", "html"))
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}


@pytest.mark.parametrize("folder", [None, "nowhere", "."])
def test_a_folder_without_jobs_is_refused(folder, tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="folder of a sweep|There are no jobs below"):
        run(OmegaConf.create({"dir": folder}))
    assert not list(tmp_path.iterdir())


def test_folders_of_single_runs_are_collected_too(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/status.json").write_text(json.dumps({"status": "interrupted", "duration": 3.5}))
    assert collect(tmp_path / "runs") == [{"folder": "a", "status": "interrupted", "seconds": 3.5}]
