"""The plain files of a run folder, as anybody may have written them. Read leniently: what is missing or damaged is left out. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from circuitkit.core import plain
from circuitkit.core.errors import UserError
from circuitkit.storage.reading import raw_lines, read_json, read_text

CONFIG, METRICS, STATUS, JOB = "config.yaml", "metrics.jsonl", "status.json", "job.json"

TIMES = 4
"""How often the usual bound a file with a line a step may have."""

_STATUS = {"name": (str,), "status": (str,), "time": (str,), "duration": (int, float), "files": (list,)}
_JOB = {
    "number": (int,), "overrides": (list,), "status": (str,), "error": (str,), "exit_code": (int,), "started": (int, float),
    "ended": (int, float), "same_as": (str,), "content_hash": (str,),
}  # fmt: skip


def status(folder: Path) -> dict[str, Any]:
    """Name, status, time, duration and files of the run."""
    return _typed(mapping(folder / STATUS), _STATUS)


def job(folder: Path) -> dict[str, Any]:
    """What became of the job of a sweep: number, overrides, status, times, and the error or the run that was the same."""
    return _typed(mapping(folder / JOB), _JOB)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What was logged, a mapping a line."""
    try:
        for line in raw_lines(folder / METRICS, "metrics", times=TIMES):
            try:
                row = plain.parse(line.decode())
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
    except UserError:
        return


def text(path: Path) -> str:
    """The text of a file; none for one that cannot be read."""
    try:
        return read_text(path, "run")
    except UserError:
        return ""


def mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one for anything else."""
    try:
        found = read_json(path, "run")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _typed(body: Mapping[str, Any], schema: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The entries of a schema that are of their type; a list must hold texts."""
    found = {key: body[key] for key, kinds in schema.items() if key in body and type(body[key]) in kinds}
    return {key: value for key, value in found.items() if type(value) is not list or all(type(each) is str for each in value)}
