"""With which ablation and score circuits were found: said aloud where they are measured, or held against each other, with others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from circuitkit.core.circuit import Circuit
from circuitkit.core.describe import describe
from circuitkit.loggers.redaction import redacted
from circuitkit.metrics import Metric
from circuitkit.patchers import Patcher

_log = logging.getLogger(__name__)

FoundWith = Mapping[str, str]
"""By setting (``patcher``, ``edge_patcher``, ``metric``, ``score.zero``), with its arguments and for people."""


def found_with(circuit: Circuit) -> FoundWith:
    """What a circuit's provenance says; nothing of what it does not say, as in files of other tools."""
    settings = circuit.provenance.get("settings", {})
    method = settings.get("method", {})
    edge_patcher = settings.get("edge_patcher") or (method.get("edge_patcher") or settings.get("patcher") if method else None)
    zero = circuit.provenance.get("score", {}).get("zero")
    return _spoken(settings.get("patcher"), edge_patcher if circuit.level.of_edges else None, settings.get("metric"), zero)


def measured_with(patcher: Patcher, edge_patcher: Patcher | None, metric: Metric) -> FoundWith:
    """What a measurement is made with; edges are removed by the patcher where no other is given for them."""
    of_nodes, of_edges, of_metric = (redacted(describe(part)) for part in (patcher, edge_patcher or patcher, metric))
    return _spoken(of_nodes, of_edges, of_metric, metric.floor.value)


def warn_of_others(name: str, found: FoundWith, other: FoundWith, other_name: str) -> None:
    """One line of warning where two sets of parts differ; what one of them does not say counts as the same.

    Args:
        name: Of the circuit.
        found: With what it was found.
        other: With what it is held against.
        other_name: What that is, with its verb, such as ``is measured here``.
    """
    differs = [key for key in found if key in other and found[key] != other[key]]
    if differs:
        theirs, ours = (", ".join(f"{key}={each[key]}" for key in differs) for each in (found, other))
        _log.warning("%s was found with %s, and %s with %s: the scores are of different questions. Set %s alike to compare them.",
                     name, theirs, other_name, ours, ", ".join(differs))  # fmt: skip


def _spoken(patcher: Any, edge_patcher: Any, metric: Any, zero: Any) -> FoundWith:
    if isinstance(metric, Mapping):
        metric = {key: value for key, value in metric.items() if key != "zero"}  # said on its own, as what it comes to
    parts = {"patcher": patcher, "edge_patcher": edge_patcher, "metric": metric, "score.zero": zero}
    return {key: _name(part) for key, part in parts.items() if part is not None}


def _name(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    own = str(part.get("_target_", "")).rpartition(".")[2]
    arguments = ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in part.items() if key != "_target_")
    return own + (f"({arguments})" if arguments else "")
