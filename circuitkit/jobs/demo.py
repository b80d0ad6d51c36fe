"""The circuits of several tasks in one model, and what they share."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from circuitkit.core.circuit import Circuit
from circuitkit.jobs import compare
from circuitkit.jobs.find import check_parts, find, load


def run(config: DictConfig) -> None:
    """Runs the main job for each of ``tasks``, each in a folder of its own, then compares the circuits."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    for task in config.tasks:
        check_parts(for_task(config, task))
    model = load(config)
    circuits: dict[str, Circuit] = {}
    for task in config.tasks:
        one = for_task(config, task)
        one.dir = str(folder / task)
        found = find(one, model).circuit
        assert found is not None
        circuits[task] = found
    compare.show(circuits, compare.write(circuits, folder))
    console = Console(soft_wrap=True, highlight=False)
    for task in config.tasks:
        console.print(f"written: {folder / task}{os.sep}")


def for_task(config: DictConfig, task: str) -> DictConfig:
    """The same configuration with another task, and with the task's fields that the user set."""
    fields = [override for override in HydraConfig.get().overrides.task if override.startswith("task.")]
    one = deepcopy(config)
    one.name = f"{config.name}-{task}"
    one.task = compose("config", overrides=[f"task={task}", *fields]).task
    return one
