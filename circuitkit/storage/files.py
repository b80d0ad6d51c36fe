"""Text files: read with a sentence for what cannot be read, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from circuitkit.core.errors import CircuitError


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        CircuitError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CircuitError(f"The {what} file {path} cannot be read: {error}.") from error


def write_text(path: Path, text: str) -> Path:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
