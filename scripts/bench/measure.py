"""How every table measures: rounds in which all contenders take turns, counted FLOPs, peak memory, and markdown."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Contender = Callable[[], float | None]
"""Does a job, or a random part of it, and says which share of the whole that was; None for all of it."""


@dataclass(frozen=True)
class Options:
    """What the command line sets.

    Attributes:
        quick: Tiny shapes and one round, to see that a table runs.
        rounds: How often each contender is timed.
        prompts: Prompts; None for the table's own default.
        part: Share of its candidates that a slow competitor runs in each round, drawn anew each time.
        peer: Whether TransformerLens takes part, if it is installed.
    """

    quick: bool = False
    rounds: int = 3
    prompts: int | None = None
    part: float = 0.25
    peer: bool = True

    def n_prompts(self, default: int) -> int:
        """Prompts to run."""
        return self.prompts or (2 if self.quick else default)


@dataclass
class Table:
    """Rows with the same columns, and what has to be known to read them."""

    title: str
    rows: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as text."""
        lines = [f"### {self.title}", ""]
        if self.rows:
            columns = list(dict.fromkeys(column for row in self.rows for column in row))
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


class Times:
    """Seconds of each contender, round by round, for the whole of its job."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self._seconds = seconds

    def median(self, name: str) -> float:
        """Of the rounds."""
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """How many times longer ``name`` takes than ``to``: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self._seconds[name], self._seconds[to], strict=True))


def interleaved(contenders: Mapping[str, Contender], rounds: int, device: torch.device | None = None, *, warm: bool = True) -> Times:
    """Times contenders in turns, every other round in reverse order, so that a slow spell of the machine hits all of them.

    Args:
        contenders: By name.
        rounds: How often each is timed.
        device: Waited for, if it computes on its own.
        warm: Whether each runs once untimed before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values() if warm else ():
        contender()
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            _wait(device)
            start = time.perf_counter()
            share = contenders[name]()
            _wait(device)
            seconds[name].append((time.perf_counter() - start) / (share or 1.0))
    return Times(seconds)


class Uncomputed(TorchDispatchMode):
    """Matrix products return zeros at once: for counting the FLOPs of long jobs whose course does not depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.default:
            return args[0].new_zeros(args[1].shape[0], args[2].shape[1])
        if func is torch.ops.aten.mm.default:
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        return func(*args, **(kwargs or {}))


def flops(job: Callable[[], Any], *, compute: bool = False) -> int:
    """Matrix FLOPs of a job, counted by torch's flop counter.

    Args:
        job: What to count.
        compute: Whether the products are computed too; needed where later work depends on values.
    """
    with ExitStack() as stack:
        if not compute:
            stack.enter_context(Uncomputed())
        counter = stack.enter_context(FlopCounterMode(display=False))
        job()
    return counter.get_total_flops()


def peak_bytes(job: Callable[[], Any], device: torch.device | None = None) -> int | None:
    """Peak memory of a job above what was held before: allocated on a GPU, resident elsewhere; None where it cannot be told."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except (OSError, AttributeError):
        job()
        return None
    job()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(value: float) -> str:
    """Seconds with three figures."""
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def gflop(value: float) -> str:
    """Billions of FLOPs."""
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:,.3g}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def mib(value: int | None) -> str:
    """Mebibytes."""
    return "-" if value is None else f"{value / 2**20:,.0f}"


def heading(command: str) -> str:
    """Where, when and how: the line above a table."""
    processor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{date.today()} · {machine} · {torch.get_num_threads()} threads · {versions} · `{command}`"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_section(path: Path, name: str, text: str) -> None:
    """Puts text under the heading ``## name`` of a file, in place of what is there."""
    old = path.read_text() if path.exists() else "# Measured\n\nHow to read this: `python scripts/bench/run.py --help`.\n"
    before, found, after = (old.rstrip() + "\n").partition(f"## {name}\n")
    _, next_heading, rest = after.partition("\n## ") if found else ("", "", "")
    body = f"{before.rstrip()}\n\n## {name}\n\n{text.strip()}\n"
    path.write_text(f"{body}\n## {rest}" if next_heading else body)


def say(text: str) -> None:
    """Tells the person who waits what is going on."""
    print(text, file=sys.stderr, flush=True)
