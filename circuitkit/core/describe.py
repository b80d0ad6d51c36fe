"""What an object was made with, as plain values: for config files, provenance and hashes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any


def describe(thing: Any) -> Any:
    """The settings of an object whose attributes are named like its constructor's arguments, as nested plain values.

    A class or function becomes its name, an array or tensor its values, and any other object ``{"_target_": its class, argument: value,
    ...}``; values that are plain already stay as they are.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing.value if isinstance(thing, Enum) else thing
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        values = sorted(thing, key=str) if isinstance(thing, set | frozenset) else thing
        return [describe(value) for value in values]
    if hasattr(thing, "tolist"):
        return thing.tolist()
    if isinstance(thing, type) or inspect.isroutine(thing):
        return {"_target_": f"{thing.__module__}.{thing.__qualname__}"}
    arguments = [name for name, parameter in inspect.signature(type(thing)).parameters.items() if parameter.kind in _NAMED]
    settings = {name: describe(getattr(thing, name)) for name in arguments if hasattr(thing, name)}
    return {"_target_": f"{type(thing).__module__}.{type(thing).__qualname__}", **settings}


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
