"""Progress: how far a search is."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from circuitkit.callbacks.base import Callback
from circuitkit.core.records import Step

_log = logging.getLogger(__name__)


class Progress(Callback):
    """A bar on stderr while a person looks on; elsewhere (CI, a file, a notebook) a log line now and then and at the end of each sweep.

    Attributes:
        every_seconds: At least this long between two log lines of a sweep.
    """

    def __init__(self, every_seconds: float = 10.0, console: Console | None = None) -> None:
        self.every_seconds = every_seconds
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._last: Step | None = None
        self._done = 0
        self._sweep_began = self._last_line = time.monotonic()

    def on_baseline(self, baseline: Any) -> None:
        """Starts the clock of the first sweep."""
        self._sweep_began = self._last_line = time.monotonic()

    def on_step(self, step: Step) -> None:
        """Moves on by one candidate."""
        if self._last is not None and step.sweep != self._last.sweep:
            self._end_sweep()
        self._last, self._done = step, self._done + 1
        if self._console.is_terminal:
            self._draw(step)
        elif time.monotonic() - self._last_line >= self.every_seconds:
            self._last_line = time.monotonic()
            _log.info("%s, %s left", self._line(step), self._left(step))

    def on_discover_end(self, result: Any) -> None:
        """Ends the last sweep and takes the bar away."""
        self._end_sweep()
        self._stop()

    def on_exception(self, error: BaseException) -> None:
        """Takes the bar away, so that the error is not drawn over."""
        self._stop()

    def on_run_end(self, result: Any) -> None:
        """Takes the bar away where no search ended."""
        self._stop()

    def _draw(self, step: Step) -> None:
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[now]}"),
                console=self._console,
                transient=True,
                redirect_stdout=False,  # it may be a pipe, and the bar's console is stderr
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, now="")
        now = f"{step.node} {step.score:.2f} %, circuit {step.size}"
        self._bar.update(self._task, description=_title(step), total=step.total or None, completed=self._done, now=now)

    def _end_sweep(self) -> None:
        if self._last is None:
            return
        took = timedelta(seconds=round(time.monotonic() - self._sweep_began))
        line = f"{self._line(self._last)}, done in {took}"
        if self._bar is None:
            _log.info("%s", line)
        else:
            self._bar.console.print(line, highlight=False, markup=False)
            self._bar.reset(self._task)
        self._last, self._done = None, 0
        self._sweep_began = self._last_line = time.monotonic()

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        self._last, self._done = None, 0
        if bar is not None:
            bar.stop()

    def _line(self, step: Step) -> str:
        of_total = f"/{step.total}" if step.total else ""
        verdict = "kept" if step.kept else "removed"
        return f"{_title(step)}: {self._done}{of_total}, {step.node} {verdict} at {step.score:.2f} %, circuit {step.size}"

    def _left(self, step: Step) -> str:
        if not step.total:
            return "unknown time"
        a_candidate = (time.monotonic() - self._sweep_began) / self._done
        return str(timedelta(seconds=round(a_candidate * max(step.total - self._done, 0))))


def _title(step: Step) -> str:
    return f"sweep {step.sweep + 1} {step.direction}".rstrip()
