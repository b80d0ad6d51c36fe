"""Runner: conducts one run from prompts to files. Read top to bottom."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.core.circuit import Circuit
from circuitkit.core.journal import Recorded, Replay
from circuitkit.core.part import unchanged
from circuitkit.core.records import RunInfo, Step
from circuitkit.engine.base import Engine
from circuitkit.engine.distributed import DistributedEngine, spread
from circuitkit.engine.filtering import Solves
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.drift import drift_metrics
from circuitkit.engine.proof.quick import quick_check
from circuitkit.loggers.base import Logger
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.methods.base import Method
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.patchers.base import Patcher
from circuitkit.results import RunResult, artifacts, baseline_metrics, evaluated, from_text, run_info, summary_metrics, to_text
from circuitkit.tasks.base import Task

_log = logging.getLogger(__name__)


class NotNeeded(Exception):
    """Raised by the ``check`` of a run that need not be made. Nobody is told of that run."""


class Runner:
    """Conducts runs and tells callbacks and loggers; in a launch of several processes only those of the first one.

    Args:
        loggers: Where numbers and files go.
        callbacks: Who else wants to be told.
    """

    def __init__(self, loggers: Iterable[Logger] = (), callbacks: Iterable[Callback] = ()) -> None:
        is_first = processes().is_first
        self.loggers = LoggerGroup(loggers if is_first else ())
        self.callbacks = Callbacks(callbacks if is_first else ())

    def run(
        self,
        *,
        model: HookedModel,
        task: Task,
        method: Method,
        patcher: Patcher,
        metric: Metric,
        engine: Callable[..., Engine] = PackedEngine,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        resume: Recorded | None = None,
        check: Callable[[RunInfo], None] | None = None,
    ) -> RunResult:
        """Finds, scores and writes.

        Args:
            model: The model.
            task: Makes the prompts.
            method: Chooses the masks.
            patcher: What removed components are replaced by.
            metric: What that costs.
            engine: Makes the engine from model, prompts, patcher, metric and universe.
            name: Of the run; made from its parts if None.
            settings: What to log as its configuration; taken from the parts if None.
            resume: What an earlier process of this run left in its journal, to go on from.
            check: Called when it is known what the run depends on, before anything is computed or written; may raise ``NotNeeded``.

        Raises:
            UserError: Something that the user can put right; loggers are finalized as failed before.
        """
        with self._closing(), ExitStack() as stack:
            prompts = task.prompts(model.tokenizer, accept=Solves(model) if task.filter else None)
            scorer = stack.enter_context(spread(engine(model, prompts, patcher, metric, method.units(model.universe, prompts))))
            if isinstance(scorer, DistributedEngine) and not scorer.leads:
                return from_text(scorer.serve(), scorer)
            parts = {"task": task, "method": method, "patcher": patcher, "metric": metric}
            info = run_info(name or f"{task.name}-{model.name}-{method.name}", scorer, parts, settings)
            replay = self._start(info, resume, check)
            quick_check(scorer)
            self._baseline(scorer)

            result = self._discover(method, scorer, info, replay)
            unchanged(parts)  # a file that a part reads
            self.callbacks.notify("on_discover_end", result)
            result = evaluated(result, scorer)
            self.loggers.log_metrics(summary_metrics(result) | drift_metrics(result.steps, scorer, getattr(method, "threshold", None)))
            self.callbacks.notify("on_evaluate_end", result)

            self._write(result)
            if isinstance(scorer, DistributedEngine):
                scorer.finish(to_text(result))
        self.callbacks.notify("on_run_end", result)
        return result

    def _start(self, info: RunInfo, resume: Recorded | None, check: Callable[[RunInfo], None] | None) -> Replay:
        replay = Replay.of(resume, info)
        if check is not None:
            check(info)
        self.loggers.log_config(info.name, info.settings)
        self.callbacks.notify("on_run_start", info)
        return replay

    def _baseline(self, engine: Engine) -> None:
        baseline = engine.baseline()
        self.loggers.log_metrics(baseline_metrics(baseline, engine.metric) | {"run/prompts": len(engine.prompts)})
        self.callbacks.notify("on_baseline", baseline)

    def _write(self, result: RunResult) -> None:
        self.callbacks.notify("on_checkpoint", result)
        for artifact in artifacts(result):
            self.loggers.log_artifact(artifact)

    def _discover(self, method: Method, engine: Engine, info: RunInfo, replay: Replay) -> RunResult:
        started = time.perf_counter()
        found = method.discover(engine, on_step=lambda step: self._on_step(step, replay), **_history(method, replay))
        replay.check_complete()
        seconds = time.perf_counter() - started
        result = RunResult(info, engine.baseline(), None, None, tuple(replay.steps), engine.prompts, seconds)
        return replace(result, circuit=found) if isinstance(found, Circuit) else replace(result, scores=found)

    def _on_step(self, step: Step, replay: Replay) -> None:
        if replay.is_new(step):  # the others were told of when they were made
            self.loggers.log_metrics(step.metrics(), step=step.order)
            self.callbacks.notify("on_step", step)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Finalizes the loggers, whatever happens; an error is shown to the callbacks first and then raised again."""
        try:
            yield
        except NotNeeded:
            raise
        except BaseException as error:
            self.callbacks.notify("on_exception", error)
            self.loggers.finalize("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
            raise
        self.loggers.finalize("finished")


def _history(method: Method, replay: Replay) -> dict[str, Any]:
    """What to hand to ``discover`` of an earlier process's steps."""
    if not replay.history:
        return {}
    if "history" in inspect.signature(method.discover).parameters:
        _log.info("Going on after %d decisions of an earlier process.", len(replay.history))
        return {"history": replay.history}
    _log.info("%s takes no history, so its %d decisions so far are made again.", type(method).__name__, len(replay.history))
    return {}
