"""In which order callbacks hear of events, and the callbacks that come with the package."""

from __future__ import annotations

import io
import logging
import threading
from typing import get_args

import pytest
from rich.console import Console

from circuitkit.callbacks import Callback, Callbacks, NanGuard, Progress
from circuitkit.callbacks.dispatch import TEAR_DOWN, Event
from circuitkit.core.errors import MeasurementError
from circuitkit.core.records import Step

EVENTS = sorted(name for name in vars(Callback) if name.startswith("on_"))


def step(order: int, *, sweep: int = 0, score: float = 90.0, total: int = 4, **fields) -> Step:
    return Step(
        **{"sweep": sweep, "order": order, "node": f"a0.h{order}", "score": score, "kept": True, "size": 12, "total": total, **fields}
    )


class Noting(Callback):
    """Notes who was called with what."""

    def __init__(self, name: str, heard: list) -> None:
        self.name, self.heard = name, heard


def _noting(event: str):
    def hook(self, argument):
        self.heard.append((self.name, event, argument))

    return hook


for _event in EVENTS:
    setattr(Noting, _event, _noting(_event))


# Dispatch


def test_the_dispatcher_knows_every_event():
    assert sorted(get_args(Event)) == EVENTS and len(EVENTS) == 8
    assert set(TEAR_DOWN) <= set(EVENTS)


@pytest.mark.parametrize("event", EVENTS)
def test_hooks_are_called_in_list_order_and_tear_down_is_reversed(event):
    heard = []
    Callbacks([Noting("first", heard), Noting("second", heard)]).notify(event, "it")
    names = ["second", "first"] if event in ("on_exception", "on_run_end") else ["first", "second"]
    assert heard == [(name, event, "it") for name in names]


def test_an_error_in_a_hook_ends_the_round():
    class Raising(Callback):
        def on_step(self, step):
            raise MeasurementError("no")

    heard = []
    with pytest.raises(MeasurementError):
        Callbacks([Noting("first", heard), Raising(), Noting("last", heard)]).notify("on_step", 1)
    assert heard == [("first", "on_step", 1)]


def test_an_error_in_on_exception_hides_neither_the_first_error_nor_the_other_hooks(caplog):
    class Raising(Callback):
        def on_exception(self, error):
            raise ValueError("mine")

    heard, error = [], RuntimeError("the run's")
    Callbacks([Noting("first", heard), Raising(), Noting("last", heard)]).notify("on_exception", error)
    assert heard == [("last", "on_exception", error), ("first", "on_exception", error)]
    assert caplog.messages == ["Raising failed in on_exception (ValueError: mine)."]


def test_a_hook_that_would_never_be_called_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"Typo\.on_stepp is not an event of a run.*on_step"):
        type("Typo", (Callback,), {"on_stepp": lambda self: None})


def test_a_subclass_of_a_subclass_is_looked_at_too():
    with pytest.raises(TypeError, match="on_end"):
        type("Child", (NanGuard,), {"on_end": lambda self: None})


# NanGuard


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_ends_the_search(score):
    with pytest.raises(MeasurementError, match=r"found (nan|inf|-inf) for a0\.h3 in sweep 0.*float32"):
        NanGuard().on_step(step(3, score=score))


@pytest.mark.parametrize("score", [0.0, -250.0, 1e30])
def test_a_bad_score_is_still_a_score(score):
    assert NanGuard().on_step(step(0, score=score)) is None


# Progress


def run_two_sweeps(progress: Progress) -> None:
    progress.on_baseline(None)
    for order in range(4):
        progress.on_step(step(order, direction="backward", kept=order != 3, size=12 - (order == 3)))
    for order in range(4, 7):
        progress.on_step(step(order, sweep=1, direction="forward", total=3))
    progress.on_discover_end(None)
    progress.on_run_end(None)


def test_without_a_terminal_there_is_a_line_a_sweep_and_no_bar(caplog):
    file = io.StringIO()
    with caplog.at_level(logging.INFO):
        run_two_sweeps(Progress(console=Console(file=file)))
    assert file.getvalue() == ""
    assert [message.rpartition(",")[0] for message in caplog.messages] == [
        "sweep 1 backward: 4/4, a0.h3 removed at 90.00 %, circuit 11",
        "sweep 2 forward: 3/3, a0.h6 kept at 90.00 %, circuit 12",
    ]


def test_without_a_terminal_a_long_sweep_has_lines_now_and_then(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("circuitkit.callbacks.progress.time.monotonic", lambda: now[0])
    progress = Progress(every_seconds=10, console=Console(file=io.StringIO()))
    progress.on_baseline(None)
    with caplog.at_level(logging.INFO):
        for order in range(100):
            now[0] += 1.0
            progress.on_step(step(order, total=100))
    assert len(caplog.messages) == 10
    assert caplog.messages[2] == "sweep 1: 30/100, a0.h29 kept at 90.00 %, circuit 12, 0:01:10 left"


def test_on_a_terminal_the_bar_shows_where_the_search_is(caplog):
    file = io.StringIO()
    progress = Progress(console=Console(file=file, force_terminal=True, width=120, color_system=None))
    with caplog.at_level(logging.INFO):
        run_two_sweeps(progress)
    drawn = file.getvalue()
    assert "sweep 1 backward" in drawn and "a0.h" in drawn and "90.00 %, circuit 12" in drawn
    assert "sweep 1 backward: 4/4, a0.h3 removed at 90.00 %, circuit 11, done in 0:00:00" in drawn
    assert "sweep 2 forward: 3/3" in drawn
    assert caplog.messages == []


def test_the_bar_is_gone_after_an_exception():
    before = set(threading.enumerate())
    file = io.StringIO()
    progress = Progress(console=Console(file=file, force_terminal=True))
    progress.on_step(step(0))
    (drawing,) = set(threading.enumerate()) - before
    progress.on_exception(RuntimeError("no"))
    drawing.join(timeout=5)
    assert not drawing.is_alive()
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l") >= 0, "the cursor is shown again"


def test_an_exception_before_the_first_step_is_no_trouble():
    file = io.StringIO()
    Progress(console=Console(file=file, force_terminal=True)).on_exception(RuntimeError("no"))
    assert file.getvalue() == ""


def test_one_object_serves_two_runs(caplog):
    progress = Progress(console=Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO):
        run_two_sweeps(progress)
        run_two_sweeps(progress)
    assert len(caplog.messages) == 4
