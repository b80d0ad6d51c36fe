"""Runner: conducts one run from prompts to files. Read top to bottom."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import circuitkit
from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.describe import describe
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import RunInfo, Step, TableArtifact, TextArtifact
from circuitkit.engine.base import Baseline, Engine
from circuitkit.engine.checks import quick_check
from circuitkit.engine.drift import drift_metrics
from circuitkit.engine.filtering import Solves
from circuitkit.engine.packed import PackedEngine
from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.methods.base import Method
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher
from circuitkit.tasks.base import Task

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "nnsight", "accelerate")


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        info: What the run was about.
        baseline: Scores of the untouched and of the fully patched model.
        circuit: What a search returned, with its score; None for methods that only score.
        scores: What a method that only scores returned.
        steps: Every evaluated candidate.
        prompts: On which.
        seconds: Wall time of the search.
    """

    info: RunInfo
    baseline: Baseline
    circuit: Circuit | None
    scores: Scores | None
    steps: tuple[Step, ...]
    prompts: PromptSet
    seconds: float


class Runner:
    """Conducts runs and tells callbacks and loggers.

    Args:
        loggers: Where numbers and files go.
        callbacks: Who else wants to be told.
    """

    def __init__(self, loggers: Iterable[Logger] = (), callbacks: Iterable[Callback] = ()) -> None:
        self.loggers = LoggerGroup(loggers)
        self.callbacks = Callbacks(callbacks)

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
    ) -> RunResult:
        """Finds, scores and writes.

        Args:
            model: The model.
            task: Makes the prompts.
            method: Chooses the masks.
            patcher: What removed components are replaced by.
            metric: What that costs.
            engine: Makes the engine from model, prompts, patcher and metric.
            name: Of the run; made from its parts if None.
            settings: What to log as its configuration; taken from the parts if None.

        Raises:
            UserError: Something that the user can put right; loggers are finalized as failed before.
        """
        parts = {"task": task, "method": method, "patcher": patcher, "metric": metric}
        status: Status = "failed"
        try:
            prompts = task.prompts(model.tokenizer, accept=Solves(model) if task.filter else None)
            scorer = engine(model, prompts, patcher, metric)
            info = run_info(name or f"{task.name}-{model.name}-{method.name}", model, scorer, parts, settings)
            self.loggers.log_config(info.name, info.settings)
            self.callbacks.notify("on_run_start", info)

            quick_check(scorer)
            baseline = scorer.baseline()
            self.loggers.log_metrics(baseline_metrics(baseline, metric) | {"run/prompts": len(prompts)})
            self.callbacks.notify("on_baseline", baseline)

            steps: list[Step] = []
            started = time.perf_counter()
            found = method.discover(scorer, on_step=lambda step: self._on_step(step, steps))
            result = RunResult(info, baseline, None, None, tuple(steps), prompts, time.perf_counter() - started)
            result = replace(result, circuit=found) if isinstance(found, Circuit) else replace(result, scores=found)
            self.callbacks.notify("on_discover_end", result)

            result = evaluated(result, scorer)
            self.loggers.log_metrics(summary_metrics(result) | drift_metrics(steps, scorer, getattr(method, "threshold", None)))
            self.callbacks.notify("on_evaluate_end", result)

            self.callbacks.notify("on_checkpoint", result)
            for artifact in artifacts(result):
                self.loggers.log_artifact(artifact)
            status = "finished"
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            self.callbacks.notify("on_exception", error)
            raise
        finally:
            self.loggers.finalize(status)
        self.callbacks.notify("on_run_end", result)
        return result

    def _on_step(self, step: Step, steps: list[Step]) -> None:
        steps.append(step)
        self.loggers.log_metrics(
            {"step/score": step.score, "step/size": step.size, "step/node": step.node, "step/kept": step.kept, "step/sweep": step.sweep},
            step=step.order,
        )
        self.callbacks.notify("on_step", step)


def run_info(name: str, model: HookedModel, engine: Engine, parts: Mapping[str, Any], settings: Mapping[str, Any] | None) -> RunInfo:
    """Everything that the result will depend on, with a hash of it."""
    described = {key: describe(part) for key, part in parts.items()}
    described["engine"] = {"_target_": f"{type(engine).__module__}.{type(engine).__qualname__}"}
    described["model"] = {"name": model.name, "revision": model.revision, "dtype": str(model.dtype).removeprefix("torch.")}
    provenance = {
        "settings": described,
        "seed": getattr(parts["task"], "seed", None),
        "model": described["model"] | {"fingerprint": model.fingerprint()},
        "prompts_hash": engine.prompts.content_hash(),
        "n_prompts": len(engine.prompts),
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    provenance["content_hash"] = digest
    return RunInfo(name, settings if settings is not None else described, provenance, digest, len(engine.prompts), len(engine.graph))


def versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers come from."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "circuitkit": circuitkit.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def evaluated(result: RunResult, engine: Engine) -> RunResult:
    """The result with its circuit scored once more, and with where it came from."""
    provenance = {
        **result.info.provenance,
        "metric_unit": result.baseline.unit,
        "baseline": result.baseline.clean.double().mean().item(),
        "patched": result.baseline.patched.double().mean().item(),
        "evaluations": len(result.steps),
    }
    if result.circuit is not None:
        score = engine.percent(result.circuit.mask(engine.graph)[None]).item()
        return replace(result, circuit=replace(result.circuit, score=score, provenance={**provenance, **result.circuit.provenance}))
    assert result.scores is not None
    return replace(result, scores=replace(result.scores, provenance={**provenance, **result.scores.provenance}))


def baseline_metrics(baseline: Baseline, metric: Metric) -> dict[str, float]:
    """The two runs that scores are held against, as numbers to log."""
    return {
        f"baseline/{metric.name}": baseline.clean.double().mean().item(),
        f"patched/{metric.name}": baseline.patched.double().mean().item(),
    }


def summary_metrics(result: RunResult) -> dict[str, float | int]:
    """What a run is summed up by."""
    numbers: dict[str, float | int] = {"run/seconds": round(result.seconds, 3), "run/evaluations": len(result.steps)}
    if result.circuit is not None:
        circuit = result.circuit
        assert circuit.score is not None
        numbers |= {
            "circuit/score": circuit.score,
            "circuit/size": len(circuit),
            "circuit/n_heads": len(circuit.heads),
            "circuit/n_mlps": len(circuit.mlps),
        }
    if result.scores is not None:
        values = list(result.scores.values.values())
        numbers |= {"scores/mean": sum(values) / len(values), "scores/lowest": min(values), "scores/highest": max(values)}
    return numbers


def artifacts(result: RunResult) -> list[TextArtifact | TableArtifact]:
    """The files that a run leaves."""
    files: list[TextArtifact | TableArtifact] = [TableArtifact("scores", [step.row() for step in result.steps])]
    if result.circuit is not None:
        files.append(TextArtifact("circuit.json", result.circuit.to_json()))
    if result.scores is not None:
        files.append(TextArtifact("scores.json", result.scores.to_json(), kind="scores"))
    return files
