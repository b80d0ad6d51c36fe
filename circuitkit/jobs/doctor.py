"""Proves a model before it is trusted: every way in which circuitkit takes it apart, against the plain forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from circuitkit.config import build
from circuitkit.core.errors import MeasurementError
from circuitkit.core.prompts import PromptSet
from circuitkit.engine import Engine
from circuitkit.engine.proof.doctor import Patient, examine
from circuitkit.jobs.find import load
from circuitkit.jobs.map_tree import map_tree
from circuitkit.metrics import KL
from circuitkit.models.checks import Check, random_prompts
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.tasks import Task

N_PROMPTS = 4


def run(config: DictConfig) -> None:
    """Runs all checks and prints them; with ``dir`` set they are written there too.

    Raises:
        MeasurementError: A check failed.
    """
    engine = build(config.engine, Engine)
    task = build(config.task, Task) if OmegaConf.select(config, "task") else None
    model = load(config)
    drawn = prompts(model, task)
    pool: Literal["group", "all"] = "group" if drawn.is_padded else "all"
    patient = Patient(model, drawn, Zero(), Resample(), Mean(pool=pool), Mean("conditional", pool), KL(), engine)
    console = Console(highlight=False)
    checks: list[Check] = []
    with console.status("") as status:
        for check in examine(patient):
            checks.append(check)
            status.update(f"{check.name} done")
    show(model, checks, console)
    if config.dir:
        console.print(f"written: {write(model, checks, Path(config.dir))}", soft_wrap=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        names = ", ".join(check.name for check in failed)
        raise MeasurementError(
            f"{len(failed)} of {len(checks)} checks failed for {model.name} in {dtype_of(model)}: {names}. "
            "Expected all to pass; numbers measured on "
            "it may be wrong. Try model.attention=eager and model.dtype=float32, or engine=reference; if that "
            "does not help, report the table."
        )


def prompts(model: HookedModel, task: Task | None) -> PromptSet:
    """A few prompts of a task, or of random tokens."""
    if task is None:
        return random_prompts(model, N_PROMPTS)
    drawn = task.prompts(model.tokenizer)
    if not drawn.is_padded:
        return drawn.take(range(min(N_PROMPTS, len(drawn))))
    lengths, groups = drawn.lengths.unique(return_inverse=True)  # one of each length first; a group each, so that means are defined
    order = torch.stack([groups == group for group in range(len(lengths))]).int().cumsum(1).gather(0, groups[None])[0].argsort(stable=True)
    return replace(drawn, groups=groups, group_names=tuple(f"{length} tokens" for length in lengths.tolist())).take(order[:N_PROMPTS])


def show(model: HookedModel, checks: Sequence[Check], console: Console) -> None:
    """Prints a row a check."""
    table = Table("check", "what was compared", "largest difference", "allowed", "", box=None, pad_edge=False)
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        what = f"{check.what}\n  {check.detail}" if check.detail else check.what
        style = None if check.passed else "bold red"
        table.add_row(check.name, what, number(check.difference), number(check.tolerance), verdict, style=style)
    console.print(map_tree(model.map, model.name), soft_wrap=True)
    console.print(f"\n{model.name}: {model.map.family}, {model.n_layers} layers x {model.n_heads} heads, {dtype_of(model)}\n")
    console.print(table)
    console.print("\nDifferences of logits are relative to their standard deviation; 0 is equal bit for bit.")


def write(model: HookedModel, checks: Sequence[Check], folder: Path) -> Path:
    """Writes the checks as ``doctor.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(check) | {"difference": check.difference if math.isfinite(check.difference) else None} for check in checks]
    found = {
        "model": model.name,
        "family": model.map.family,
        "dtype": dtype_of(model),
        "fingerprint": model.fingerprint(),
        "passed": all(check.passed for check in checks),
        "checks": rows,
    }
    path = folder / "doctor.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return path


def dtype_of(model: HookedModel) -> str:
    """As it is configured."""
    return str(model.dtype).removeprefix("torch.")


def number(value: float) -> str:
    """Two digits; counts and exact zeros without any."""
    return f"{value:.0f}" if value == int(value if math.isfinite(value) else 1) else f"{value:.1e}"
