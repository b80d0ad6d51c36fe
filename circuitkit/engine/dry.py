"""A dry run: the very passes that the fast engine makes, on a model without weights, to say what they will cost.

Tensors on the ``meta`` device have shapes and no content, so a search over any model takes a moment and no memory, and its matrix
products are counted by ``torch.utils.flop_counter`` as they would be on a real device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.shapes import Masks
from circuitkit.engine.base import Baseline
from circuitkit.engine.memory import row_bytes
from circuitkit.engine.packed import PackedEngine


class DryEngine(PackedEngine):
    """Makes the passes of a search whose every score is assumed. Final.

    Args:
        model: A model on the ``meta`` device.
        assume: The performance score, in %, that every candidate is taken to have: above the threshold all are removed, below none.
    """

    def __init__(self, *args: Any, assume: float = 100.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.assume = assume

    def baseline(self) -> Baseline:
        """Makes the passes of a baseline; its numbers mean nothing."""
        if self._baseline is None:
            self.clean_logits()
            self.percent(self.graph.empty()[None])
            ones = torch.ones(len(self.prompts))
            self._baseline = Baseline(ones, 0 * ones, self.metric.floor, self.metric.unit)
        return self._baseline

    def percent(self, masks: Masks, base: Bool[Tensor, "node"] | None = None) -> Float[Tensor, "mask"]:
        """Makes the passes and returns what is assumed."""
        for _ in self.passes(self._checked(masks), base):
            pass
        return torch.full((len(masks),), self.assume)

    def certain(self, mask: Bool[Tensor, "node"]) -> float:
        return self.assume


@dataclass(frozen=True)
class Cost:
    """What a run will take.

    Attributes:
        evaluations: Masks scored.
        passes: Forward passes, whole or partial.
        rows: Layers x rows of these.
        flops: Of matrix products, a multiply-add counted as two.
        bytes_read: Weights read, once a pass.
        peak_bytes: Weights, held states and the largest pass, about.
    """

    evaluations: int
    passes: int
    rows: int
    flops: int
    bytes_read: int
    peak_bytes: int

    def seconds(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Time on a device with these measured rates: whichever binds, arithmetic or reading weights."""
        return max(self.flops / flops_a_second, self.bytes_read / bytes_a_second)


def cost(engine: DryEngine, evaluations: int, flops: int) -> Cost:
    """What the passes that an engine has made so far would have cost."""
    model, prompts = engine.model, engine.prompts
    weights = sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.hf.parameters())
    share = engine.work.layer_rows / max(1, engine.work.passes * model.n_layers * _rows_a_pass(engine))
    held = len(prompts) * prompts.n_pos * (model.d_model + model.n_heads * model.d_head) * model.dtype.itemsize * model.n_layers
    peak = weights + held + engine.budget.rows * row_bytes(model, prompts.n_pos)
    return Cost(evaluations, engine.work.passes, engine.work.layer_rows, flops, int(weights * share * engine.work.passes), peak)


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
