"""How many rows a forward pass may have: from measured free memory, halved when it was too many."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psutil
import torch

from circuitkit.core.errors import MeasurementError
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import least

_log = logging.getLogger(__name__)
_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

# Above this many tokens a pass is bound by arithmetic everywhere we measured, and larger passes only take more memory.
TOKENS_A_PASS = {"cpu": 2048, "cuda": 65536}


class RowBudget:
    """Rows that fit one pass. Final.

    Args:
        model: Whose passes.
        n_pos: Tokens per row.
        max_rows: The user's bound; None to use free memory.
        held: Bytes that each row holds besides what a pass takes, such as keys and values.

    Attributes:
        rows: Rows that a pass may have now.
    """

    def __init__(self, model: HookedModel, n_pos: int, max_rows: int | None = None, *, held: int = 0) -> None:
        if max_rows is not None and max_rows < 1:
            raise MeasurementError(f"engine.max_rows must be at least 1, found {max_rows}. Leave it out to use the free memory.")
        room = free_room(model)
        a_row = row_bytes(model, n_pos) + held
        fitting = int(0.5 * room // a_row)
        if fitting < 1 and max_rows is None:
            raise MeasurementError(
                f"Not even one prompt of {n_pos} tokens fits the free memory ({room / 2**20:.0f} "
                "MiB, one row takes about "
                f"{a_row / 2**20:.0f} MiB). Free some, take a smaller model or dtype, or set engine.max_rows=1 to try."
            )
        useful = max(1, TOKENS_A_PASS.get(model.device.type, 4096) // n_pos)
        # Above what is useful a pass gets slower (scripts/bench/RESULTS.md), so a larger bound changes nothing.
        self.rows = min(fitting if max_rows is None else max_rows, useful)
        self._is_shared = model.is_shared

    def slices(self, within: slice) -> Iterator[slice]:
        """Some prompts, in passes that fit."""
        for first in range(within.start, within.stop, self.rows):
            yield slice(first, min(first + self.rows, within.stop))

    def halve(self, error: BaseException) -> None:
        """Makes passes half as large after one did not fit.

        Raises:
            MeasurementError: A pass already had one row, or other processes wait in the middle of that pass.
        """
        if self._is_shared:
            raise MeasurementError(
                "Memory ran out in a process of a launch that holds one model together, and the others cannot start that pass again. Start "
                f"anew with engine.max_rows={max(1, self.rows // 2)} or less."
            ) from error
        if self.rows == 1:
            raise MeasurementError(
                "Memory ran out in a pass with a single prompt. Take a smaller model or dtype "
                "(model.dtype=bfloat16), shorter prompts, or more "
                "devices (model.device_map=auto)."
            ) from error
        self.rows = max(1, self.rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("Memory ran out; going on with at most %d rows a pass.", self.rows)


def within_memory(
    work: Iterable[_Piece], run: Callable[[_Piece], _Result], budget: RowBudget, split: Callable[[_Piece], Iterable[_Piece]]
) -> Iterator[tuple[_Piece, _Result]]:
    """Does pieces of work in order. When memory runs out, passes are halved, and what is left is split and tried again.

    Args:
        work: The pieces.
        run: Does one; leaves nothing half-done behind when it fails.
        budget: Rows that a pass may have.
        split: A piece as pieces that fit the budget.

    Yields:
        Each piece with its result.

    Raises:
        MeasurementError: A pass with a single row does not fit.
    """
    waiting = deque(work)
    while waiting:
        piece = waiting.popleft()
        try:
            result = run(piece)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            budget.halve(error)
            waiting = deque(part for other in (piece, *waiting) for part in split(other))
            continue
        yield piece, result


def in_slices(n_rows: int, run: Callable[[slice], _Result], budget: RowBudget) -> Iterator[tuple[slice, _Result]]:
    """Runs all prompts in passes that fit, likewise.

    Yields:
        Each slice of the prompts with its result.
    """
    return within_memory(budget.slices(slice(0, n_rows)), run, budget, budget.slices)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "out of memory" in str(error))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def free_room(model: HookedModel) -> int:
    """Memory that can be had now where a model computes; the least of all processes that hold it together, whose passes are the same."""
    free = free_bytes(model.device)
    return least(free) if model.is_shared else free


def row_bytes(model: HookedModel, n_pos: int) -> int:
    """What one row of a pass takes at its peak, about: the MLP's and attention's working set and the logits in float32."""
    width = 8 * model.d_model + 4 * model.n_heads * model.d_head + 3 * model.d_mlp
    attention = model.n_heads * n_pos
    return model.dtype.itemsize * n_pos * (width + attention) + model.d_vocab * (model.dtype.itemsize + 8)
