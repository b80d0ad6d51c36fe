"""``circuitkit.cli.main`` called several times in one process, as the studies in experiments/ do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from circuitkit.core.circuit import Circuit
from circuitkit.storage import load

pytestmark = pytest.mark.slow

SCRIPT = """
import os, sys
from circuitkit.cli import main
from circuitkit.jobs.model_shelf import SHELF

taken, take = [], SHELF.take
SHELF.take = lambda key, load: take(key, lambda: taken.append(key) or load())

def call(name, *arguments):
    print(f"=== {name}", flush=True)
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    print(f"--- {code} {len(taken)} {os.environ.get('HYDRA_FULL_ERROR')}", flush=True)

SMALL = ["task.n=4", "method.max_sweeps=1", "logger=jsonl"]
call("list", "job=list")
call("first", *SMALL, "dir=first")
call("misspelt", "task=montsh")
call("missing", "job=evaluate", "circuit=none.json", "logger=jsonl", "dir=missing")
call("taken", *SMALL, "dir=first")
call("second", *SMALL, "dir=second")
call("sweep", "-m", *SMALL, "task=numerals,months", "method.threshold=7", "dir=sweep")
call("after", "job=compare", "circuits=[first/circuit.json,second/circuit.json]")
SHELF._model.hf.register_forward_hook(lambda *_: None)
call("changed", *SMALL, "dir=changed")
call("again", *SMALL, "dir=again")
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What each call said, its exit code and how many models had been loaded; and the folder."""
    folder = tmp_path_factory.mktemp("calls")
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout
    found = {}
    for part in done.stdout.split("=== ")[1:]:
        name, _, rest = part.partition("\n")
        said, _, end = rest.rpartition("--- ")
        code, loaded, full_error = end.split()
        assert full_error == "1", "which the first call sets, and which would make Hydra print tracebacks"
        found[name] = (said.strip(), int(code), int(loaded))
    return found, folder


def test_a_command_after_another_says_what_it_would_have_said_alone(calls):
    found, folder = calls
    assert [found[name][1] for name in ("list", "first", "second", "after", "changed", "again")] == [0] * 6
    first = load(Circuit, folder / "first/circuit.json")
    for name in ("second", "changed", "again"):
        assert load(Circuit, folder / name / "circuit.json").names == first.names
        assert load(Circuit, folder / name / "circuit.json").score == first.score
        assert f"folder    {folder / name}" in found[name][0]


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("misspelt", 2, "There is no task named 'montsh'. Did you mean 'months'?"),
        ("missing", 1, "The circuit file 'none.json' cannot be read"),
        ("taken", 2, "Expected a folder without a finished run"),
    ],
)
def test_a_mistake_in_a_later_command_is_one_sentence(calls, name, code, sentence):
    said, found, _ = calls[0][name]
    assert found == code
    assert said.startswith(sentence)
    assert len(said.splitlines()) == 1


def test_nothing_has_a_traceback(calls):
    assert not any("Traceback" in said for said, _, _ in calls[0].values())


def test_a_failure_is_forgotten_by_the_next_command(calls):
    """Of a single command, and of a sweep, whose failures are read from its folder."""
    found, _ = calls
    assert found["sweep"][1] == 2
    assert "2 of the sweep's jobs failed" in found["sweep"][0]
    assert found["after"][1] == 0
    assert "sweep" not in found["after"][0]


def test_the_model_is_loaded_once(calls):
    found, _ = calls
    assert {name: loaded for name, (_, _, loaded) in found.items()} == {
        "list": 0, "first": 1, "misspelt": 1, "missing": 1, "taken": 1, "second": 1, "sweep": 1, "after": 1, "changed": 2, "again": 2,
    }  # fmt: skip
    assert "The model of the last job is used again" in found["second"][0]


def test_a_model_that_was_changed_is_loaded_again(calls):
    found, _ = calls
    assert "The last job left something behind in the model (hooks of" in found["changed"][0]
    assert "The model of the last job is used again" in found["again"][0]
