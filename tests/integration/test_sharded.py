"""One model over two processes: the circuit file of one process, to the last byte that a result depends on."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from test_distributed import BIN, free_port, launched

pytestmark = pytest.mark.slow

SMALL = ["model=tiny_llama", "task=months", "task.n=4", "logger=jsonl"]


def command(*overrides: str, processes: int = 2) -> list[str]:
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", str(processes), "--master-port", free_port()]
    return [*(torchrun if processes > 1 else [sys.executable]), "-m", "circuitkit.cli", *overrides]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of the same searches, by one process and by two that hold the model together."""
    folder = tmp_path_factory.mktemp("sharded")
    made = {}
    for name, processes, extra in (("one", 1, []), ("two", 2, ["model.tp_plan=auto"])):
        made[name] = folder / name
        done = launched(*command(*SMALL, f"dir={made[name]}", *extra, processes=processes), cwd=folder)
        assert done.returncode == 0, done.stderr
        edges = ["method=edge_pruning", f"method.circuit={made['one'] / 'circuit.json'}", f"dir={made[name]}-edges"]
        done = launched(*command(*SMALL, *edges, *extra, processes=processes), cwd=folder)
        assert done.returncode == 0, done.stderr
        assert not extra or re.search(r"2 processes hold one model: \d\d % of its weights are split", done.stdout + done.stderr)
    return made


@pytest.mark.parametrize("what", ["", "-edges"])
def test_the_circuit_file_is_that_of_one_process(runs, what):
    one, two = (json.loads(Path(f"{runs[name]}{what}/circuit.json").read_text()) for name in ("one", "two"))
    assert one["score"] is not None and (len(one["nodes"]) > 3 or one["edges"])
    assert one == two
    assert "fingerprint" in one["provenance"]["model"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=tiny_gpt2", "model.tp_plan=auto"], "splits linear maps, and GPT2LMHeadModel has none in its layers"),
        (["model.tp_plan=auto", "model.device_map=cpu"], "places the model itself. Leave out device_map"),
        (["model.tp_plan=quick"], "no tp_plan named 'quick'. Choices: auto"),
    ],
)
def test_refusals(tmp_path, overrides, sentence):
    done = launched(*command(*SMALL, f"dir={tmp_path / 'run'}", *overrides), cwd=tmp_path)
    assert done.returncode != 0 and sentence in done.stderr


def test_one_process_cannot_share(tmp_path):
    done = launched(*command(*SMALL, "model.tp_plan=auto", f"dir={tmp_path / 'run'}", processes=1), cwd=tmp_path)
    assert done.returncode == 1 and "there is one. Start them with `torchrun" in done.stderr
    assert not os.path.exists(tmp_path / "run" / "circuit.json")


def test_neither_swept_nor_gone_on_with(tmp_path):
    done = launched(*command(*SMALL, "-m", "task.n=4,6", "model.tp_plan=auto", f"dir={tmp_path / 'sweep'}"), cwd=tmp_path)
    assert done.returncode != 0 and "can neither be swept over nor gone on with" in done.stderr
