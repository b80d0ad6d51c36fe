"""What an object was made with, as plain values: for config files and provenance, and as what its hash is taken of."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitkit.core.errors import ConfigError
from circuitkit.core.part import Part, kept, known
from circuitkit.core.sources import sources


def describe(thing: Any) -> Any:
    """The settings of an object as nested plain values.

    A class or function becomes its name, with what a function made by another one holds; a tensor or array its type, shape and hash; any
    other object ``{"_target_": its class, argument: value, ...}`` by its attributes of the names of its constructor's arguments. Values
    that are plain already stay as they are.

    Raises:
        ConfigError: Something in it does not keep its arguments, or has no name to be described with.
    """
    return _described(thing, _Walk(lambda path, content: path))


@dataclass(frozen=True)
class Identity:
    """What a result depends on in some parts: equal identity, equal result.

    Attributes:
        settings: As ``describe`` has them, with what is in a file in place of its path. Nothing is redacted: never to be written down.
        files: SHA-256 of what is in each file that a part reads, by the path of its setting.
        code: SHA-256 of the sources of circuitkit and of everything from outside of it, by package or module.
    """

    settings: Any
    files: Mapping[str, str]
    code: Mapping[str, str]


def identity(parts: Mapping[str, Any]) -> Identity:
    """What a result depends on.

    Args:
        parts: By name, such as ``{"patcher": Mean()}``.

    Raises:
        ConfigError: As ``describe``, or of a class or function from outside of circuitkit no source is to be had.
    """
    walk = _Walk(lambda path, content: path if content is None else {"sha256": content})
    settings = {name: walk.into(name, part) for name, part in parts.items()}
    return Identity(settings, walk.files, sources(walk.code))


@dataclass
class _Walk:
    """Through everything that an object was made with. Final.

    Attributes:
        shown: What stands for a file, made from its path and the hash of what is in it.
        files: Hash of what is in each file that was met.
        code: Every class and function that was met.
    """

    shown: Callable[[str, str | None], Any]
    files: dict[str, str] = field(default_factory=dict)
    code: list[Any] = field(default_factory=list)
    _place: tuple[str, ...] = ()
    _inside: tuple[int, ...] = ()

    def into(self, name: object, thing: Any) -> Any:
        """Describes what lies under a name in what is being described now."""
        if id(thing) in self._inside:
            raise ConfigError(f"{'.'.join(self._place)} holds itself, so it cannot be described. Give it without that.")
        self._place, self._inside = (*self._place, str(name)), (*self._inside, id(thing))
        try:
            return _described(thing, self)
        finally:
            self._place, self._inside = self._place[:-1], self._inside[:-1]

    def each(self, things: Any) -> list[Any]:
        """Describes several in order."""
        return [self.into(place, thing) for place, thing in enumerate(things)]

    def file(self, name: object, part: Part, value: Any) -> Any:
        """Describes an argument that names files; where an object stands in place of a path, that."""
        if isinstance(value, str | Path):
            path = str(value)
            content = known(part, path)
            if content is not None:
                self.files[".".join((*self._place, str(name)))] = content
            return self.shown(path, content)
        if isinstance(value, Mapping):
            return {str(key): self.file(f"{name}.{key}", part, inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.file(f"{name}.{place}", part, inner) for place, inner in enumerate(value)]
        return self.into(name, value)


@singledispatch
def _described(thing: Any, walk: _Walk) -> Any:
    """Any other object: by its arguments and, where it has not promised that they say all, by everything that it holds."""
    walk.code.append(type(thing))
    holds = kept(thing) | getattr(thing, "__dict__", {})
    return {"_target_": _name(type(thing)), **{name: walk.into(name, value) for name, value in holds.items()}}


@_described.register
def _(thing: Part, walk: _Walk) -> Any:
    walk.code.append(type(thing))
    files = thing.reads_files
    settings = {name: walk.file(name, thing, value) if name in files else walk.into(name, value) for name, value in kept(thing).items()}
    learned = {"_state_": walk.into("_state_", dict(thing.state_dict()))} if isinstance(thing, torch.nn.Module) else {}
    return {"_target_": _name(type(thing)), **settings, **learned}


@_described.register
def _(thing: None, walk: _Walk) -> None:
    return None


@_described.register
def _(thing: bool, walk: _Walk) -> bool:
    return thing


@_described.register
def _(thing: int, walk: _Walk) -> int:
    return int(thing)


@_described.register
def _(thing: float, walk: _Walk) -> float:
    return float(thing)


@_described.register
def _(thing: str, walk: _Walk) -> str:
    return str.__str__(thing)  # of an enum of texts, its value


@_described.register
def _(thing: bytes, walk: _Walk) -> Any:
    return {"_target_": "builtins.bytes", "sha256": hashlib.sha256(thing).hexdigest()}


@_described.register
def _(thing: Enum, walk: _Walk) -> Any:
    return walk.into("value", thing.value)


@_described.register
def _(thing: Path, walk: _Walk) -> str:
    return str(thing)


@_described.register(Mapping)
def _(thing: Mapping[Any, Any], walk: _Walk) -> Any:
    if all(isinstance(key, str) for key in thing):
        return {str.__str__(key): walk.into(key, value) for key, value in thing.items()}
    return [[walk.into("key", key), walk.into(key, value)] for key, value in thing.items()]  # 1 and "1" would become one


@_described.register(list)
@_described.register(tuple)
def _(thing: Any, walk: _Walk) -> list[Any]:
    return walk.each(thing)


@_described.register(set)
@_described.register(frozenset)
def _(thing: Any, walk: _Walk) -> list[Any]:
    return walk.each(sorted(thing, key=str))


@_described.register
def _(thing: range, walk: _Walk) -> Any:
    return {"_target_": "builtins.range", "start": thing.start, "stop": thing.stop, "step": thing.step}


@_described.register
def _(thing: np.generic, walk: _Walk) -> Any:
    return walk.into("value", thing.item())


@_described.register
def _(thing: np.ndarray, walk: _Walk) -> Any:
    if thing.dtype.hasobject:
        return {"_target_": "numpy.ndarray", "shape": list(thing.shape), "values": walk.each(thing.ravel().tolist())}
    digest = hashlib.sha256(thing.tobytes()).hexdigest()
    return {"_target_": "numpy.ndarray", "dtype": str(thing.dtype), "shape": list(thing.shape), "sha256": digest}


@_described.register
def _(thing: Tensor, walk: _Walk) -> Any:
    values = thing.detach().to_dense().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"_target_": "torch.Tensor", "dtype": str(thing.dtype).removeprefix("torch."), "shape": list(thing.shape), "sha256": digest}


@_described.register(torch.dtype)
@_described.register(torch.device)
def _(thing: Any, walk: _Walk) -> str:
    return str(thing)


@_described.register
def _(thing: torch.nn.Module, walk: _Walk) -> Any:
    """By everything that it holds: its weights may have been learned since it was made, and layers do not keep their arguments."""
    walk.code.append(type(thing))
    return {"_target_": _name(type(thing)), **{name: walk.into(name, value) for name, value in vars(thing).items()}}


@_described.register
def _(thing: type, walk: _Walk) -> Any:
    walk.code.append(thing)
    return {"_target_": _name(thing)}


@_described.register
def _(thing: types.FunctionType, walk: _Walk) -> Any:
    """A function that is made by another one is told from its like by where it is written, its defaults and what it holds."""
    if thing.__name__ == "<lambda>":
        raise ConfigError(
            f"{'.'.join(walk._place) or 'A setting'} is a function without a name (lambda), so two of them would pass for the same. Write "
            "it with def, and give it a name."
        )
    walk.code.append(thing)
    found: dict[str, Any] = {"_target_": _name(thing)}
    if "<locals>" in thing.__qualname__:
        found |= {"line": thing.__code__.co_firstlineno, "defaults": walk.into("defaults", [thing.__defaults__, thing.__kwdefaults__])}
    if thing.__closure__:
        held = {name: cell.cell_contents for name, cell in zip(thing.__code__.co_freevars, thing.__closure__, strict=True)}
        found["holds"] = walk.into("holds", {name: value for name, value in held.items() if value is not thing})
    return found


@_described.register(types.BuiltinFunctionType)
@_described.register(types.MethodDescriptorType)
@_described.register(types.WrapperDescriptorType)
@_described.register(types.MethodWrapperType)
@_described.register(np.ufunc)
def _(thing: Any, walk: _Walk) -> Any:
    """Written in C: it counts with the version of what it comes from."""
    owner = getattr(thing, "__self__", None)
    found = {"_target_": _name(thing)}
    return found if owner is None or isinstance(owner, types.ModuleType | type) else found | {"self": walk.into("self", owner)}


@_described.register
def _(thing: types.MethodType, walk: _Walk) -> Any:
    return {**walk.into("function", thing.__func__), "self": walk.into("self", thing.__self__)}


@_described.register(partial)
def _(thing: partial[Any], walk: _Walk) -> Any:
    return {"_target_": "functools.partial", **{name: walk.into(name, getattr(thing, name)) for name in ("func", "args", "keywords")}}


def _name(thing: Any) -> str:
    module = getattr(thing, "__module__", None) or "builtins"
    return f"{module}.{getattr(thing, '__qualname__', thing.__name__)}"
