"""What a run folder says about its run. Read leniently: whatever is missing or damaged is left out. It loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS, STATUS = "metrics.jsonl", "status.json"
RESULTS = ("circuit.json", "scores.json")


def status(folder: Path) -> dict[str, Any]:
    """Name, status, time, duration and files of the run."""
    return _mapping(folder / STATUS)


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers that belong to the whole run, such as ``circuit/score``."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        row = _parsed(line)
        if row and row.get("step") is None:
            found |= {key: value for key, value in row.items() if key not in ("step", "time")}
    return found


def content_hash(folder: Path) -> str | None:
    """The content hash of the run that left its result here."""
    for name in RESULTS:
        provenance = _mapping(folder / name).get("provenance")
        if isinstance(provenance, dict) and "content_hash" in provenance:
            return str(provenance["content_hash"])
    return None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
