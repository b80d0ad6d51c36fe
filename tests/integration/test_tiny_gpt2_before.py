"""Every number that was committed for the first tiny_gpt2 is the same when it is made anew with the weights of then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "fixtures" / "tiny_gpt2_before"
RESULTS = BEFORE / "results"

WHOLE = "CIRCUITKIT_WHOLE_STUDY"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHOLE not in os.environ, reason=f"makes a whole study anew, minutes long: set {WHOLE}=1; .ci/run does"),
]


@pytest.fixture(scope="module")
def made_anew(tmp_path_factory):
    """The tables of the study as committed, but for where its model is."""
    folder = tmp_path_factory.mktemp("study of before")
    shutil.copytree(ROOT / "experiments" / "seqcont", folder / "seqcont", ignore=shutil.ignore_patterns("results", "__pycache__"))
    path = folder / "seqcont" / "conf" / "experiment" / "tiny_gpt2.yaml"
    experiment = yaml.safe_load(path.read_text())
    assert experiment["defaults"][0] == {"override /model": "tiny_gpt2"}
    experiment["defaults"][0] = {"override /model": "local"}
    experiment["model"] = {"path": str(BEFORE), "name": "tiny_gpt2"}
    path.write_text(f"# @package _global_\n{yaml.safe_dump(experiment, sort_keys=False)}")
    command = [sys.executable, str(folder / "seqcont/study.py"), "tiny_gpt2", "--dir", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ), timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / "tables"


@pytest.mark.parametrize("table", sorted(path.name for path in RESULTS.glob("*.csv")))
def test_every_printed_digit_is_the_same(made_anew, table):
    assert (made_anew / table).read_text() == (RESULTS / table).read_text()


def test_the_fixture_holds_every_table(made_anew):
    assert {path.name for path in RESULTS.glob("*.csv")} == {path.name for path in made_anew.glob("*.csv")} and len(
        list(RESULTS.iterdir())
    ) == 8
