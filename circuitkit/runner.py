"""Runner: conducts one run from prompts to files. Read top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.core.errors import noted
from circuitkit.core.part import unchanged
from circuitkit.core.records import RunInfo, Step
from circuitkit.engine.base import Engine
from circuitkit.engine.distributed import spread
from circuitkit.engine.filtering import Solves
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.drift import drift_metrics
from circuitkit.loggers.base import Logger
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.methods.base import Method
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.patchers.base import Patcher
from circuitkit.results import RunResult, artifacts, baseline_metrics, evaluated, from_text, run_info, summary_metrics, to_text
from circuitkit.storage.journal import Recorded, Replay
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
        parts = {"task": task, "method": method, "patcher": patcher, "metric": metric}
        name = name or f"{task.name}-{model.name}-{method.name}"
        with self._closing(name):
            prompts = task.prompts(model.tokenizer, accept=Solves(model) if task.filter else None)
            featurizers = method.featurizers()
            options = {"featurizers": featurizers} if featurizers else {}  # an engine of one's own need not know them
            nodes = engine(model, prompts, patcher, metric, method.universe(model, prompts), **options)

            def conduct(scorer: Engine) -> RunResult:
                info = run_info(name, scorer, parts, settings)
                replay = self._start(info, resume, check)
                scorer.check()
                scorer.prepare()
                self._baseline(scorer)
                result = self._discover(method, scorer, info, replay)
                unchanged(parts)  # a file that a part reads
                self.callbacks.notify("on_discover_end", result)
                result = evaluated(result, scorer)
                self.loggers.log_metrics(summary_metrics(result) | drift_metrics(result.steps, scorer, method.threshold))
                self.callbacks.notify("on_evaluate_end", result)
                self._write(result)
                return result

            result = spread(method.over(nodes), conduct, to_text, lambda text: from_text(text, nodes))
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
        if replay.history:
            _log.info("Going on after %d decisions of an earlier process.", len(replay.history))
        found = method.discover(engine, on_step=lambda step: self._on_step(step, replay), history=replay.history)
        replay.check_complete()
        seconds = time.perf_counter() - started
        return RunResult(info, engine.baseline(), found, tuple(replay.steps), engine.prompts, seconds)

    def _on_step(self, step: Step, replay: Replay) -> None:
        if replay.is_new(step):  # the others were told of when they were made
            self.loggers.log_metrics(step.metrics(), step=step.order)
            self.callbacks.notify("on_step", step)

    @contextmanager
    def _closing(self, name: str) -> Iterator[None]:
        """Finalizes the loggers, whatever happens; an error is shown to the callbacks first and then raised again."""
        try:
            yield
        except NotNeeded:
            raise
        except BaseException as error:
            noted(error, f"in the run {name}")
            self.callbacks.notify("on_exception", error)
            self.loggers.finalize("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
            raise
        self.loggers.finalize("finished")
