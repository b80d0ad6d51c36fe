"""A misspelled name, a missing type and a false shape are seen, with the settings of this repository."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from circuitkit.core.universe import Universe
from circuitkit.metrics.functional import gather, kl_divergence

ROOT = Path(__file__).parents[2]
MISSPELLED = """from jaxtyping import Float
from torch import Tensor


def doubled(scores: Float[Tensor, " mask"], pairs: Float[Tensor, "mask prompt"]) -> Float[Tensor, " mask"]:
    return 2 * scroes
"""
UNTYPED = """def doubled(scores: float) -> float:
    return 2 * scroes


def halved(scores):
    return scores
"""


def test_ruff_sees_a_misspelled_name(tmp_path):
    (tmp_path / "planted.py").write_text(MISSPELLED)
    command = ["ruff", "check", "--no-cache", "--output-format=concise", f"--config={ROOT / 'pyproject.toml'}", "planted.py"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("planted.py")] == ["F821 Undefined name `scroes`"]


@pytest.mark.slow
def test_mypy_sees_a_misspelled_name_and_a_missing_type(tmp_path):
    (tmp_path / "planted.py").write_text(UNTYPED)
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'setup.cfg'}", "--no-incremental", "planted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    seen = {line.split("[")[-1].rstrip("]") for line in done.stdout.splitlines() if line.startswith("planted.py") and "error" in line}
    assert {"name-defined", "no-untyped-def"} <= seen


def test_mypy_checks_the_whole_package_strictly():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["mypy"]["packages"] == "circuitkit"
    assert settings["mypy"].getboolean("strict")
    assert settings["mypy"]["disable_error_code"] == "type-abstract"
    loosened = {name: dict(settings[name]) for name in settings.sections() if name.startswith("mypy-")}
    assert loosened == {
        "mypy-circuitkit.models.*,circuitkit.jobs.*,circuitkit.loggers.*,circuitkit.cli": {"warn_return_any": "false"},
        "mypy-circuitkit.engine.dense.*,circuitkit.models.rules": {"disallow_untyped_calls": "false"},
    }


@pytest.mark.skipif(os.environ.get("CIRCUITKIT_CHECKED") != "1", reason="needs CIRCUITKIT_CHECKED=1, as in .ci/run")
def test_shapes_are_checked():
    logits = torch.zeros(2, 3, 5)
    assert gather(logits, torch.zeros(3, dtype=torch.long)).shape == (2, 3)
    for wrong in (torch.zeros(1, dtype=torch.long), torch.zeros(3)):  # one token for three prompts; tokens that are no integers
        with pytest.raises(TypeCheckError):
            gather(logits, wrong)
    with pytest.raises(TypeCheckError):
        kl_divergence(logits, logits)
    with pytest.raises(TypeCheckError):
        Universe.of_nodes(2, "2")
