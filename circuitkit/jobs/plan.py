"""What a run will cost, before anything runs: the same passes on a model without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from circuitkit.config import build
from circuitkit.core.errors import ConfigError, ModelNotAtHand
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.cost import Cost, DryEngine, cost, measured_rates
from circuitkit.engine.packed.memory import free_bytes
from circuitkit.jobs.metrics import metric_of
from circuitkit.methods import EdgePruning, IterativePruning, Method
from circuitkit.metrics import Metric
from circuitkit.models import HUB_MODELS, HookedModel, known_shape, load_shape
from circuitkit.patchers import Patcher
from circuitkit.tasks import Task

_PLACEMENT = ("device_map", "max_memory", "offload_folder", "adapter", "quantization", "tp_plan")


def run(config: DictConfig) -> None:
    """Prints what the configured run will take. With ``dir=...`` it is also written there as plan.json."""
    task, patcher = build(config.task, Task), build(config.patcher, Patcher)  # small parts first, as in a run
    metric, method = metric_of(config), build(config.method, Method)
    model, told = planned(config)
    prompts = task.prompts(model.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measured_rates(device, model.dtype)
    plans = {
        label: dry_run(model, prompts, patcher, metric, method, assume=assume, max_rows=config.engine.get("max_rows"), target=device)
        for label, assume in outcomes(method).items()
    }
    show(plans, rates, device, told)
    if config.dir is not None:
        folder = Path(config.dir)
        folder.mkdir(parents=True, exist_ok=True)
        body: dict[str, Any] = {
            label: asdict(plan) | {"seconds": plan.seconds(*rates), "peak_bytes": plan.memory.peak, "fits": plan.memory.fits(free())}
            for label, plan in plans.items()
        }
        body |= {"told": told} if told else {}
        (folder / "plan.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def planned(config: DictConfig) -> tuple[HookedModel, str]:
    """The configured model without weights, and what to know about its shape: empty if it is that of its own config.json."""
    left_out = [f"model.{key}" for key in ("adapter", "quantization", "tp_plan") if config.model.get(key)]
    whole = f"This plan leaves {' and '.join(left_out)} aside: it is for the plain weights in one process. " if left_out else ""
    try:
        return shape(config), whole.rstrip()
    except ModelNotAtHand as error:
        name = str(config.model.get("name"))
        if name not in HUB_MODELS or config.model.get("path") is not None or config.model.get("revision") is not None:
            raise
        reason = str(error).partition(". ")[0]
    told = (
        f"{whole}{reason}. So this plan takes the shape of {name} from circuitkit's own table, as its authors published it, "
        "and cuts prompts as tiny_gpt2 does: their length, and all that grows with it, is an estimate."
    )
    return known_shape(name, dtype=config.model.get("dtype", "auto"), attention=config.model.get("attention", "auto")), told


def shape(config: DictConfig) -> HookedModel:
    """The configured model without weights."""
    node: Any = OmegaConf.to_container(config.model, resolve=True)
    if not str(node.pop("_target_", "")).endswith(".load_model"):
        raise ConfigError("job=plan can size models that circuitkit.models.load_model loads, such as model=gpt2 or model=local.")
    return load_shape(**{key: value for key, value in node.items() if key not in _PLACEMENT})


def outcomes(method: Method) -> dict[str, float]:
    """The decisions between which the cost of a search lies, as scores that every candidate is assumed to have."""
    if isinstance(method, IterativePruning) or (isinstance(method, EdgePruning) and method.rule == "cumulative"):
        return {"if everything is removed": 100.0, "if everything is kept": 0.0}
    return {"exactly": 100.0}


def dry_run(
    model: HookedModel,
    prompts: PromptSet,
    patcher: Patcher,
    metric: Metric,
    method: Method,
    *,
    assume: float,
    max_rows: int | None,
    target: torch.device | None = None,
) -> Cost:
    """Makes the passes of a run, with every score assumed, and counts them."""
    parts = (model, prompts, patcher, metric, method.universe(model, prompts), method.featurizers())
    engine = DryEngine(*parts, max_rows=max_rows, assume=assume, target=target)
    steps: list[Any] = []
    with FlopCounterMode(display=False) as counter:
        engine.baseline()
        method.discover(method.over(engine), on_step=steps.append)
    return cost(engine, len(steps), counter.get_total_flops())


def free() -> dict[str, int]:
    """Free bytes of every card, then of the main memory."""
    cards = {f"cuda:{index}": free_bytes(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
    return {**cards, "cpu": free_bytes(torch.device("cpu"))}


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def show(plans: dict[str, Cost], rates: tuple[float, float], device: torch.device, told: str = "") -> None:
    """Prints a column a case, and what to know about the model."""
    table = Table("", *plans, box=None, pad_edge=False)
    rows: dict[str, Callable[[Cost], str]] = {
        "evaluations": lambda plan: f"{plan.evaluations:,}",
        "forward passes": lambda plan: f"{plan.passes:,}",
        "layers x rows": lambda plan: f"{plan.rows:,}",
        "matmul FLOPs": lambda plan: f"{plan.flops:.3g}",
        "weights read": lambda plan: f"{plan.bytes_read / 2**30:.2f} GiB",
        "memory: weights": lambda plan: _size(plan.memory.weights),
        "memory: weights of single heads": lambda plan: _size(plan.memory.slices),
        "memory: states held": lambda plan: _size(plan.memory.states),
        "memory: a pass": lambda plan: f"{_size(plan.memory.rows * plan.memory.a_row)} ({plan.memory.rows} x {_size(plan.memory.a_row)})",
        "memory: logits": lambda plan: _size(plan.memory.logits),
        "peak memory": lambda plan: _size(plan.memory.peak),
        "fits": lambda plan: plan.memory.fits(free()),
        "seconds, at least": lambda plan: f"{plan.seconds(*rates):.3g}",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(plan) for plan in plans.values()))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"on {device} at {rates[0] / 1e9:.0f} GFLOP/s and {rates[1] / 1e9:.1f} GB/s, measured now", soft_wrap=True)
    if told:
        console.print(told, soft_wrap=True)
