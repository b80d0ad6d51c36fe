"""What a run folder says about its run. Read leniently: whatever is missing or damaged is left out. It loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuitkit.storage import run_folder

RESULTS = ("circuit.json", "scores.json")


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers that belong to the whole run, such as ``circuit/score``."""
    found: dict[str, Any] = {}
    for row in run_folder.rows(folder):
        if row.get("step") is None:
            found |= {key: value for key, value in row.items() if key not in ("step", "time")}
    return found


def content_hash(folder: Path) -> str | None:
    """The content hash of the run that left its result here."""
    for name in RESULTS:
        provenance = run_folder.mapping(folder / name).get("provenance")
        if isinstance(provenance, dict) and "content_hash" in provenance:
            return str(provenance["content_hash"])
    return None
