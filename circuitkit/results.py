"""What a run is about, what it found, and the numbers and files that it leaves."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import circuitkit
from circuitkit.core.bodies import EdgeSearch
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.describe import describe, identity
from circuitkit.core.findings import Finding
from circuitkit.core.node import Level
from circuitkit.core.part import unchanged
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import RunInfo, Step, TableArtifact, TextArtifact
from circuitkit.core.sources import BY_VERSION
from circuitkit.engine.base import Baseline, Engine
from circuitkit.loggers.redaction import redacted
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel

_STRETCHED = 200_000


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        info: What the run was about.
        baseline: Scores of the untouched and of the fully patched model.
        found: What the method returned: a circuit, or scores.
        steps: Every evaluated candidate.
        prompts: On which.
        seconds: Wall time of the search.
    """

    info: RunInfo
    baseline: Baseline
    found: Circuit | Scores
    steps: tuple[Step, ...]
    prompts: PromptSet
    seconds: float

    @property
    def circuit(self) -> Circuit | None:
        """What a search returned, with its score; None for methods that only score."""
        return self.found if isinstance(self.found, Circuit) else None

    @property
    def scores(self) -> Scores | None:
        """What a method that only scores returned; None for a search."""
        return self.found if isinstance(self.found, Scores) else None


def run_info(name: str, engine: Engine, parts: Mapping[str, Any], settings: Mapping[str, Any] | None) -> RunInfo:
    """Everything that the result will depend on, with a hash of it.

    Raises:
        ConfigError: A part, or something in it, cannot be described, or its source cannot be read.
        MeasurementError: A file that a part reads has changed since the part was made.
    """
    parts = {**parts, "engine": engine.local}
    unchanged(parts)
    exact = identity(parts)
    model = engine.model
    loaded = {"name": model.name, "revision": model.revision, "dtype": str(model.dtype).removeprefix("torch.")}
    described = {key: redacted(describe(part)) for key, part in parts.items()}  # it is written into every file that the run leaves
    described["model"] = loaded
    provenance: dict[str, Any] = {
        "settings": described,
        "seed": getattr(parts["task"], "seed", None),
        "model": loaded | {"fingerprint": model.fingerprint(), "config": _config_hash(model), **model.origin},
        "prompts_hash": engine.prompts.content_hash(),
        "n_prompts": len(engine.prompts),
        "score": {"zero": engine.metric.floor.value, "formula": engine.metric.floor.formula},
        "versions": versions(),
        "code": dict(exact.code),
        "files": dict(exact.files),
    }
    if engine.universe.level not in (Level.NODE, Level.EDGE, Level.EDGE_QKV):
        provenance["universe"] = engine.universe.digest()  # a circuit of other units means nothing without those that it was found among
    digest = _digest(provenance | {"settings": exact.settings, "files": None}, secret=redacted(exact.settings) != exact.settings)
    provenance |= {"task": parts["task"].name, "content_hash": digest}
    return RunInfo(name, settings if settings is not None else described, provenance, digest, len(engine.prompts), len(engine.universe))


def _digest(content: Mapping[str, Any], *, secret: bool) -> str:
    """SHA-256 of what a result depends on, nothing redacted.

    It is published with all other settings, so a short secret could be found by trying. Where there is one, each try is made to take a
    tenth of a second; a real key is safe at any speed. The order of a mapping counts, because a part may go by it.
    """
    text = json.dumps(content).encode()
    return hashlib.pbkdf2_hmac("sha256", text, b"circuitkit", _STRETCHED).hex() if secret else hashlib.sha256(text).hexdigest()


def _config_hash(model: HookedModel) -> str:
    """Of what weights do not say, such as the base of rotary positions; where the model lies is left out."""
    settings = {key: value for key, value in model.settings.items() if not key.startswith("_") and key != "transformers_version"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers come from."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "circuitkit": circuitkit.__version__}
    for package in BY_VERSION:
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
    found = replace(result.found, provenance={**provenance, **result.found.provenance})
    if isinstance(found, Circuit):
        found = replace(found, score=engine.percent(found.mask(engine.universe)[None]).item())
    return replace(result, found=found)


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
        numbers |= {"circuit/n_edges": len(circuit.edges)} if circuit.level.of_edges else {}
    if result.scores is not None:
        values = list(result.scores.values.values())
        numbers |= {"scores/mean": sum(values) / len(values), "scores/lowest": min(values), "scores/highest": max(values)}
    return numbers


def artifacts(result: RunResult) -> list[TextArtifact | TableArtifact]:
    """The files that a run leaves."""
    files: list[TextArtifact | TableArtifact] = [TableArtifact("scores", [step.row() for step in result.steps])]
    if result.circuit is not None:
        files.append(TextArtifact("circuit.json", result.circuit.to_json()))
        if result.circuit.level.of_edges:
            files.append(TextArtifact("edges.json", edge_finding(result).to_json(), kind="edges"))
    if result.scores is not None:
        files.append(TextArtifact("scores.json", result.scores.to_json(), kind="scores"))
    return files


def edge_finding(result: RunResult) -> Finding[EdgeSearch]:
    """What a search for edges found, for the report."""
    circuit = result.circuit
    assert circuit is not None
    told = circuit.provenance
    members = list(dict.fromkeys([*circuit.names, *told.get("dropped_nodes", ())]))
    searched = ("rule", "mlps", "threshold", "node_score", "dropped_nodes")
    body: EdgeSearch = {
        "task": told.get("task", ""),
        "model": circuit.model,
        "nodes": members,
        "level": circuit.level.value,
        "rule": told.get("rule"),
        "mlps": told.get("mlps"),
        "threshold": told.get("threshold"),
        "node_score": told.get("node_score"),
        "dropped_nodes": told.get("dropped_nodes"),
        "score": circuit.score,
        "edges": dict(told.get("edge_scores", {})),
        "kept": [str(edge) for edge in circuit.edges],
    }
    where_from = {key: value for key, value in told.items() if key not in ("edge_scores", *searched)}
    return Finding("edges", f"Edges of {result.info.name}", body, where_from)


def to_text(result: RunResult) -> str:
    """A result as the text that the other processes of a launch are given."""
    body = {
        "info": asdict(result.info),
        "baseline": [result.baseline.clean.tolist(), result.baseline.patched.tolist()],
        "kind": type(result.found).__name__,
        "found": result.found.to_json(),
        "steps": [asdict(step) for step in result.steps],
        "seconds": result.seconds,
    }
    return json.dumps(body, default=str)


def from_text(text: str, engine: Engine) -> RunResult:
    """The result that a text of ``to_text`` stands for, in a process with the same prompts and metric."""
    body = json.loads(text)
    clean, patched = (torch.tensor(values) for values in body["baseline"])
    return RunResult(
        RunInfo(**body["info"]),
        Baseline(clean, patched, engine.metric.floor, engine.metric.unit),
        {kind.__name__: kind for kind in (Circuit, Scores)}[body["kind"]].from_json(body["found"]),
        tuple(Step(**step) for step in body["steps"]),
        engine.prompts,
        body["seconds"],
    )
