"""Which code a result depends on, as hashes of its source.

Covered are circuitkit itself, and for every class and function from outside of it that a part is made of: all files of the package that it
comes from, or the one file of a module that is in no package, or the cells of a notebook in which it is written. So a helper beside it
counts. Not covered are other modules and packages that it imports, and what it reads or downloads by itself. The standard library
and the packages in ``BY_VERSION`` count with their versions.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from circuitkit.core.errors import ConfigError

BY_VERSION = ("torch", "transformers", "nnsight", "accelerate")

_OWN = __name__.partition(".")[0]
# Of circuitkit itself: what only tells of a run, or starts it, changes none of its numbers.
_TELLING = {"report", "loggers", "callbacks", "jobs", "conf", "cli.py", "config.py", "plugins.py", "testing.py"}
_SUFFIXES = (".py", *EXTENSION_SUFFIXES)
_MOST_ENTRIES, _MOST_BYTES = 20_000, 32 * 2**20


def remember(cls: type) -> None:
    """Takes the sources of a class as they are now; what cannot be had is an error not before it is asked for."""
    for each in cls.__mro__:
        _source(each)


def sources(definitions: Iterable[type | FunctionType]) -> dict[str, str]:
    """A hash for circuitkit and for each package or module outside of it from which one of these classes, a base of one, or one of these
    functions comes.

    Raises:
        ConfigError: Of one of them no source is to be had.
    """
    found: dict[str, set[str]] = {_OWN: {_own()}}
    for definition in definitions:
        for each in definition.__mro__ if isinstance(definition, type) else (definition,):
            if (name := _home(each)) is not None:
                source = _source(each)
                if source is None:
                    raise ConfigError(
                        f"{each.__module__}.{each.__qualname__} has no source that can be read, so a run with it could not be told from "
                        "one with another version of it. Put it into a file of its own and import it from there."
                    )
                found.setdefault(name, set()).add(source)
    # More than one where a module was loaded again, or a notebook has it in several cells.
    return {name: _digest(sorted(hashes)) if len(hashes) > 1 else min(hashes) for name, hashes in sorted(found.items())}


def _home(definition: type | FunctionType) -> str | None:
    """The package from outside that something is defined in; None for circuitkit's own, and for what counts with its version."""
    name = _module_name(definition).partition(".")[0]
    return None if name == _OWN or name in BY_VERSION or name in sys.stdlib_module_names else name


def _module_name(definition: type | FunctionType) -> str:
    name = definition.__module__ or "builtins"
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec.name if name == "__main__" and spec is not None else name  # python -m package.module


@cache  # a class that is loaded again is another one
def _source(definition: type | FunctionType) -> str | None:
    name = _home(definition)
    if name is None:
        return _own()
    module = sys.modules.get(definition.__module__)
    package = sys.modules.get(name)
    for folder in getattr(package, "__path__", ()):
        if files := _files(Path(folder)):
            return _digest(_contents(Path(folder), files))
    return _of_module(module) if getattr(module, "__file__", None) else _of_cells(definition)


@cache
def _own() -> str:
    """Of the installed circuitkit: its version alone would be that of an edited checkout too."""
    folder = Path(__file__).parents[1]
    return _digest(_contents(folder, [file for file in _files(folder) if file.relative_to(folder).parts[0] not in _TELLING]))


def _files(folder: Path) -> list[Path]:
    """The source files of a package, in order; none if they are too many, as in a folder of much else that serves as a package."""
    found, entries, size = [], 0, 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        entries += len(names)
        found += [Path(place, name) for name in sorted(names) if name.endswith(_SUFFIXES)]
        if entries > _MOST_ENTRIES:
            return []
    size = sum(file.stat().st_size for file in found)
    return sorted(found) if size <= _MOST_BYTES else []


def _contents(folder: Path, files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield file.relative_to(folder).as_posix()
        yield hashlib.sha256(file.read_bytes()).hexdigest()


def _of_module(module: Any) -> str | None:
    assert isinstance(module, ModuleType) and module.__file__ is not None
    try:
        return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    except OSError:  # inside of a zip file
        lines = linecache.getlines(module.__file__, vars(module))
        return _digest(lines) if lines else None


def _of_cells(definition: type | FunctionType) -> str | None:
    """Of something that was written into a notebook: the cells that hold it or, for a class, its methods."""
    functions = [definition] if isinstance(definition, FunctionType) else list(vars(definition).values())
    cells = {each.__code__.co_filename for each in functions if isinstance(each, FunctionType)}
    lines = [line for cell in sorted(cells) for line in linecache.getlines(cell)]
    return _digest(lines) if lines else None


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
