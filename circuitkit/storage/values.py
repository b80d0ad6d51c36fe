"""Circuits, scores and findings as files: what a value says as text, kept under a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

from circuitkit.core.findings import Finding
from circuitkit.storage.reading import read_text
from circuitkit.storage.writing import write_text


class Sealed(Protocol):
    """A value that knows itself as sealed text: ``Circuit``, ``Scores``, ``Finding``."""

    def to_json(self) -> str: ...

    @classmethod
    def from_json(cls: type[T], text: str, where: str = ...) -> T: ...


T = TypeVar("T", bound=Sealed)


def save(value: Sealed, path: str | Path) -> Path:
    """Writes a value as JSON, whole or not at all.

    Args:
        value: A circuit, scores, or a finding.
        path: Of the file; folders above it are made.

    Returns:
        The path.
    """
    return write_text(Path(path), value.to_json())


def save_finding(finding: Finding[Any], folder: str | Path) -> Path:
    """Writes ``<kind>.json``, the name by which a report knows a finding, into a folder. Returns its path."""
    return save(finding, Path(folder) / f"{finding.kind}.json")


def load(kind: type[T], path: str | Path) -> T:
    """Reads a value that ``save`` wrote, such as ``load(Circuit, "months.json")``.

    Args:
        kind: What it is expected to be.
        path: Of the file.

    Raises:
        CircuitError: No such file, no value of that kind, another format version, or damaged.
    """
    return kind.from_json(read_text(path, kind.__name__.lower()), where=str(path))
