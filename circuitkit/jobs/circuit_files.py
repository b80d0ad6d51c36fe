"""The circuit files that a configuration names, under short labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError
from circuitkit.results import versions
from circuitkit.storage.literature import PublishedCircuit, read

_USUAL = ("circuit", "shared")


def read_listed(value: Any, key: str, *, least: int) -> dict[str, Circuit | PublishedCircuit]:
    """Reads the files of a setting, by label.

    Args:
        value: A list of paths.
        key: Of the setting, for errors.
        least: How many there must be.

    Raises:
        ConfigError: No such list, or a file twice.
        CircuitError: A file cannot be read.
    """
    if not isinstance(value, Sequence | ListConfig) or isinstance(value, str) or len(value) < least:
        wanted = "a list of at least two circuit files" if least == 2 else "a list of circuit files"
        raise ConfigError(f"{key} must be {wanted}, such as [a.json,b.json]; found {value}.")
    paths = [Path(str(path)) for path in value]
    return {name: read(path) for name, path in zip(labels(paths), paths, strict=True)}


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names: the file's own, or its folder's, or the whole path, whichever tells them apart.

    Raises:
        ConfigError: A file is named twice.
    """
    choices: tuple[Callable[[Path], str], ...] = (label, lambda path: path.absolute().parent.name, str)
    for choice in choices:
        found = [choice(path) for path in paths]
        if len(set(found)) == len(paths):
            return found
    raise ConfigError(f"A circuit file is named twice: {', '.join(map(str, paths))}. Name each file once.")


def label(path: Path) -> str:
    """The name of a file, or that of its folder where the file has a usual name."""
    return path.absolute().parent.name if path.stem in _USUAL else path.stem


def origin(circuits: Iterable[tuple[str, Circuit]]) -> dict[str, Any]:
    """Where circuits came from, to be kept with what is made of them."""
    kept = ("content_hash", "seed", "prompts_hash", "model", "published_list")
    return {
        "versions": versions(),
        "circuits": {name: {key: each.provenance[key] for key in kept if key in each.provenance} for name, each in circuits},
    }
