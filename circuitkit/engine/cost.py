"""A dry run: the very passes that the fast engine makes, on a model without weights, to say what they will cost.

Tensors on the ``meta`` device have shapes and no content, so a search over any model takes a moment and no memory, and its matrix
products are counted by ``torch.utils.flop_counter`` as they would be on a real device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks, StepLogits, Values
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Baseline
from circuitkit.engine.featurizing import Featurizers
from circuitkit.engine.packed.engine import SATURATION, PackedEngine
from circuitkit.engine.packed.memory import TOKENS_A_PASS, free_bytes, row_bytes
from circuitkit.engine.packed.replacements import entries
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher


class DryEngine(PackedEngine):
    """Makes the passes of a search whose every score is assumed. Final.

    Args:
        model: A model on the ``meta`` device.
        assume: The performance score, in %, that every candidate is taken to have: above the threshold all are removed, below none.
        target: The device that the run is planned for: it decides how many rows a pass has.
    """

    unhashed = (*PackedEngine.unhashed, "target")

    def __init__(
        self,
        model: HookedModel,
        prompts: PromptSet,
        patcher: Patcher,
        metric: Metric,
        universe: NodeUniverse | None = None,
        featurizers: Featurizers | None = None,
        *,
        assume: float = 100.0,
        target: torch.device | None = None,
        max_rows: int | None = None,
    ) -> None:
        # A bound that always fits: a plan for a model that is too large is worth having too.
        super().__init__(model, prompts, patcher, metric, universe, featurizers, max_rows=max_rows or 1)
        self.assume = assume
        self._target = target or torch.device("cpu")
        n_pos = self.prompts.n_pos
        fitting = int(0.5 * (free_bytes(self._target) - weight_bytes(self.model)) // row_bytes(self.model, n_pos))
        useful = max(1, TOKENS_A_PASS.get(self._target.type, 4096) // n_pos)
        self.budget.rows = max(1, min(fitting if max_rows is None else max_rows, useful))

    @property
    def batch(self) -> int:
        useful = SATURATION.get(self._target.type, 2**16) // (len(self.prompts) * self.prompts.n_pos * self.model.d_model)
        return max(1, min(useful, self.budget.rows // len(self.prompts)))

    def baseline(self) -> Baseline:
        """Makes the passes of a baseline; its numbers mean nothing."""
        if self._baseline is None:
            self.score(self.universe.empty()[None])
            ones = torch.ones(len(self.prompts))
            self._baseline = Baseline(ones, 0 * ones, self.metric.floor, self.metric.unit)
        return self._baseline

    def percent(self, masks: Masks, base: Bool[Tensor, " node"] | None = None) -> Float[Tensor, " mask"]:
        """Makes the passes and returns what is assumed."""
        for _ in self._parts(self.checked(masks), base):
            pass
        return torch.full((len(masks),), self.assume)

    def certain(self, mask: Bool[Tensor, " node"]) -> float:
        return self.assume

    def check(self) -> None:
        """Nothing to compare: there are no weights."""

    def measure(self, logits: StepLogits, rows: slice) -> Values:
        axes = logits.shape[:-1] if self.prompts.n_scored == 1 else logits.shape[:-2]
        return torch.full(axes, self.assume / 100)

    def score(self, masks: Masks, base: Bool[Tensor, " node"] | None = None) -> Values:
        """Makes the passes and returns what is assumed."""
        _ = self.known_clean  # which a score needs too
        for _ in self._parts(self.checked(masks, base), base):
            pass
        return torch.full((len(masks), len(self.prompts)), self.assume / 100)


@dataclass(frozen=True)
class Memory:
    """What a run holds at its peak, about, in bytes.

    Attributes:
        weights: Of the model.
        slices: Copies of the attentions' weights for the heads that are in, at most, and what the other heads add.
        states: Held for all prompts: what enters the layers, the heads' outputs, keys and values, and what replaces components.
        a_row: What one row of a pass takes while it runs, without its logits.
        rows: Rows of the largest pass.
        logits: Of the largest pass, and of the untouched model.
    """

    weights: int
    slices: int
    states: int
    a_row: int
    rows: int
    logits: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.slices + self.states + self.a_pass

    @property
    def a_pass(self) -> int:
        """The largest pass, with its logits."""
        return self.rows * self.a_row + self.logits

    def fits(self, free: Mapping[str, int]) -> str:
        """Whether that fits a device, in words.

        Args:
            free: Free bytes of each device; the last one is the main memory.
        """
        alone = [name for name, there in free.items() if self.peak < there]
        if alone:
            return f"yes, {alone[0]}"
        # Each device needs room for its layers' share and for a pass.
        if sum(max(0, there - self.a_pass) for there in free.values()) > self.peak - self.a_pass:
            return "spread over all devices, with model.device_map=auto"
        return f"no, {', '.join(f'{there / 2**30:.1f} GiB are free on {name}' for name, there in free.items())}"


@dataclass(frozen=True)
class Cost:
    """What a run will take.

    Attributes:
        evaluations: Masks scored.
        passes: Forward passes, whole or partial.
        rows: Layers x rows of these.
        flops: Of matrix products, a multiply-add counted as two.
        bytes_read: Weights read, once a pass.
        memory: What it holds.
    """

    evaluations: int
    passes: int
    rows: int
    flops: int
    bytes_read: int
    memory: Memory

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Time on a device with these measured rates: whichever binds, arithmetic or reading weights."""
        return max(self.flops / flops_a_second, self.bytes_read / bytes_a_second)


def cost(engine: DryEngine, evaluations: int, flops: int) -> Cost:
    """What the passes that an engine has made so far would have cost."""
    work = engine.work
    share = work.layer_rows / max(1, work.passes * engine.model.n_layers * _rows_a_pass(engine))
    read = int(weight_bytes(engine.model) * share * work.passes)
    return Cost(evaluations, work.passes, work.layer_rows, flops, read, memory(engine))


def memory(engine: DryEngine) -> Memory:
    """What a run with this engine holds at its peak."""
    model, prompts, rows = engine.model, engine.prompts, engine.budget.rows
    logits = model.d_vocab * (model.dtype.itemsize + 8)
    outputs = model.d_model + model.d_heads
    sources = 0 if engine.patcher.needs.source == "none" else int(entries(engine.patcher.needs, prompts).unique().numel())
    # Of every source the patcher makes a value, and of those of an attention also what it adds to the residual stream.
    values = sources * outputs + max(1, sources) * (outputs + model.d_model)
    keys_values = len(prompts) * 2 * model.n_kv_heads * model.d_head if engine.holds_keys_values else 0
    states = model.n_layers * prompts.n_pos * model.dtype.itemsize * (len(prompts) * outputs + values + keys_values)
    slices = engine.sliced_bytes
    if slices:
        slices += model.n_layers * max(1, sources) * prompts.n_pos * model.d_model * model.dtype.itemsize
    clean = len(prompts) * model.d_vocab * 4
    return Memory(weight_bytes(model), slices, states, row_bytes(model, prompts.n_pos) - logits, rows, rows * logits + clean)


def weight_bytes(model: HookedModel) -> int:
    """What the weights take; those that are shared count once."""
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.hf.parameters())


def _rows_a_pass(engine: DryEngine) -> float:
    return max(1.0, engine.work.rows / max(1, engine.work.passes))


def measured_rates(device: torch.device, dtype: torch.dtype, size: int = 2048) -> tuple[float, float]:
    """FLOPs and bytes a second of a device, by a matrix product and a copy of moderate size.

    Args:
        device: The device.
        dtype: Of the product.
        size: Side of the matrices.
    """
    left = torch.randn(size, size, device=device).to(dtype)
    flops, copied = 2 * size**3, 2 * left.numel() * dtype.itemsize
    return flops / _quickest(lambda: left @ left, device), copied / _quickest(left.clone, device)


def _quickest(run: Any, device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
