"""What a ``_target_`` may name: the whitelist that stands between a text from elsewhere and code that runs.

A configuration is walked once, as plain values. Whatever it names is looked up and checked, all of it, before anything is made; and
what is made afterwards is what was looked up. Hydra makes nothing of ours.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from circuitkit import plugins
from circuitkit.core.errors import ConfigError, unknown_choice

GROUPS = {
    "task": "circuitkit.tasks.base.Task",
    "question": "circuitkit.tasks.questions.Questions",
    "patcher": "circuitkit.patchers.base.Patcher",
    "metric": "circuitkit.metrics.base.Metric",
    "method": "circuitkit.methods.base.Method",
    "engine": "circuitkit.engine.base.Engine",
    "units": "circuitkit.engine.units.base.Units",
    "callback": "circuitkit.callbacks.base.Callback",
    "logger": "circuitkit.loggers.base.Logger",
    "objective": "circuitkit.jobs.objectives.Objective",
}
"""The class of each group. A part inside of another is of one of them. By name, since the classes themselves load torch."""

MODEL, LOADERS = "circuitkit.models.hooked.HookedModel", ("circuitkit.models.loading.load_model",)
"""A model is loaded by a function: ours are these; one of a plugin says that it returns a ``HookedModel``."""

JOBS = "circuitkit.jobs"
"""A job of ours is the function ``run`` of a file here."""

# What Hydra would follow in a part. Arguments are given by name, as plain values or parts, so that there is nothing to follow.
_MARKS = ("_partial_", "_args_", "_recursive_", "_convert_")


@dataclass(frozen=True)
class Part:
    """A part that may be made. Final.

    Attributes:
        where: Its key in the configuration.
        maker: The class, or the function that loads it.
        arguments: Of the maker, by name: plain values, and parts.
    """

    where: str
    maker: Callable[..., Any]
    arguments: Mapping[str, Any]

    def make(self, **others: Any) -> Any:
        """The object, with arguments besides that no text can hold.

        Raises:
            ConfigError: The arguments are not what the maker takes.
        """
        arguments = _made(self.arguments)
        _check_fields(self, arguments)
        _check_complete(self, {*arguments, *others})
        return self.maker(**(arguments | others))  # what the program says counts

    def factory(self) -> partial[Any]:
        """What makes the object once it is given the arguments that are still missing.

        Raises:
            ConfigError: The arguments are not what the maker takes.
        """
        arguments = _made(self.arguments)
        _check_fields(self, arguments)
        return partial(self.maker, **arguments)


def looked_up(settings: Mapping[str, Any], where: str, expect: type, trusted: frozenset[str]) -> Part:
    """Checks a part and all parts inside of it. Makes nothing.

    Args:
        settings: Plain values with a ``_target_``, interpolations resolved.
        where: Their key.
        expect: What the part must be; those inside of it are of one of ``GROUPS``.
        trusted: Packages that may be named besides circuitkit and its plugins.

    Raises:
        ConfigError: Something is named that may not be made there.
    """
    for mark in _MARKS:
        if mark in settings:
            raise ConfigError(f"{where} has {mark}, which is not followed there. Give arguments by their names, and leave it out.")
    maker = _maker(settings["_target_"], where, (expect,), trusted)
    return Part(where, maker, {name: _inner(each, f"{where}.{name}", trusted) for name, each in settings.items() if name != "_target_"})


def job(target: Any, where: str, trusted: frozenset[str]) -> Callable[..., Any]:
    """The function that is a job.

    Raises:
        ConfigError: There is no such job.
    """
    found = _located(target, where, trusted)
    module, _, name = _name(found).rpartition(".")
    if not inspect.isfunction(found) or (_is_ours(found) and (module.rpartition(".")[0], name) != (JOBS, "run")):
        raise ConfigError(f"{where}._target_ is {target!r}, which is no job. `circuitkit job=list` shows all.")
    return found


def made_later(expect: type) -> bool:
    """Whether a part of that class may be a factory: an engine, which the run itself gives its model and prompts."""
    return _name(expect) == GROUPS["engine"]


def _inner(value: Any, where: str, trusted: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_inner(each, f"{where}[{place}]", trusted) for place, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {name: _inner(each, f"{where}.{name}", trusted) for name, each in value.items()}
    return looked_up(value, where, object, trusted)


def _made(value: Any) -> Any:
    if isinstance(value, Part):
        return value.make()
    if isinstance(value, Mapping):
        return {name: _made(each) for name, each in value.items()}
    return [_made(each) for each in value] if isinstance(value, list) else value


def _maker(target: Any, where: str, expect: tuple[type, ...], trusted: frozenset[str]) -> Callable[..., Any]:
    """The class, or the function that loads a model, that a name stands for, if it may stand there."""
    found: Any = _located(target, where, trusted)
    if expect == (object,):
        expect = _bases()
    if MODEL in map(_name, expect):
        says_so = inspect.isfunction(found) and not _is_ours(found) and _hints(found).get("return") in expect
        if _name(found) not in LOADERS and not says_so:
            raise ConfigError(f"{where}._target_ is {target!r}, which loads no model. Expected circuitkit.models.load_model.")
        return found  # type: ignore[no-any-return]
    wanted = " or a ".join(sorted(each.__name__ for each in expect))
    if not inspect.isclass(found) or not issubclass(found, expect):
        raise ConfigError(f"{where}._target_ is {target!r}, {_kind(found)}. Expected a {wanted}.")
    if inspect.isabstract(found):
        raise ConfigError(f"{where}._target_ is {target!r}, which says what others of its kind have in common. Expected one of those.")
    return found


def _kind(found: Any) -> str:
    if inspect.isclass(found):
        return f"which makes a {found.__name__}"
    return "a function, which would be called" if inspect.isroutine(found) else f"a {type(found).__name__}"


def _located(target: Any, where: str, trusted: frozenset[str]) -> Any:
    """What a dotted name stands for. Code is found by name only where the user installed or trusted it for that."""
    own = {"circuitkit", *plugins.packages()}
    package = str(target).partition(".")[0]
    if package not in own | trusted:
        raise ConfigError(
            f"{where}._target_ is {target!r}, which is outside of {', '.join(sorted(own))}. If you trust that package, add "
            f"allow_targets=[{package}] to this command: no file can say so, nor the folder of a run."
        )
    found = _followed(str(target), where)
    home = str(getattr(found, "__module__", None) or "")
    # A trusted package is taken with all that it imports.
    if package not in trusted and (not (inspect.isclass(found) or inspect.isroutine(found)) or home.partition(".")[0] not in own):
        raise ConfigError(
            f"{where}._target_ is {target!r}, which {', '.join(sorted(own))} does not define itself"
            f"{f', but {home}' if home else ''}. Expected the name of one of its own classes."
        )
    return found


def _followed(target: str, where: str) -> Any:
    """Names that a module merely imported lead out of the allowed packages, so they are not followed."""
    parts = target.split(".")
    try:
        found: Any = importlib.import_module(parts[0])
        for place, part in enumerate(parts[1:], start=2):
            if part.startswith("__") or not part.isidentifier():
                raise ConfigError(f"{where}._target_ is {target!r}. Expected a public name, found {part!r} in it.")
            if not hasattr(found, part) and inspect.ismodule(found):
                importlib.import_module(".".join(parts[:place]))
            found = getattr(found, part)
            if inspect.ismodule(found) and found.__name__ != ".".join(parts[:place]):
                raise ConfigError(f"{where}._target_ is {target!r}, which goes through the module {found.__name__}. Name its own module.")
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}._target_ is {target!r}, which cannot be loaded: {reason}") from error
    return found


@cache
def _bases() -> tuple[type, ...]:
    names = [name.rpartition(".") for name in GROUPS.values()]
    return tuple(getattr(importlib.import_module(module), name) for module, _, name in names)


def _name(thing: Any) -> str:
    """Where a class or function is defined; of anything else a text that is no such name."""
    return f"{thing.__module__}.{thing.__qualname__}" if inspect.isclass(thing) or inspect.isroutine(thing) else repr(type(thing))


def _is_ours(thing: Any) -> bool:
    return _name(thing).partition(".")[0] == "circuitkit"


def _check_fields(part: Part, arguments: Mapping[str, Any]) -> None:
    """Refuses what the maker does not take, or takes as another kind of value."""
    parameters = inspect.signature(part.maker).parameters
    fields = [name for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in arguments:
        if not isinstance(name, str) or (name not in fields and not is_open):
            raise ConfigError(unknown_choice(f"field of {part.where} ({_title(part)})", name, fields))
    for name, hint in _hints(part.maker).items():
        if name in arguments and not _fits(arguments[name], hint):
            found = arguments[name]
            shown = "<removed>" if name.lower().endswith(("token", "key", "password", "secret")) else repr(found)
            raise ConfigError(f"{part.where}.{name} is {shown}, a {type(found).__name__}. Expected {_hint_name(hint)}.")


def _check_complete(part: Part, given: set[str]) -> None:
    parameters = inspect.signature(part.maker).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(f"{part.where} ({_title(part)}) needs {', '.join(missing)}. Set it with {part.where}.{missing[0]}=...")


def _title(part: Part) -> str:
    return _name(part.maker).rpartition(".")[2]


def _hints(maker: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(maker.__init__ if inspect.isclass(maker) else maker)
    except (NameError, TypeError):  # a shape string, or a name that is imported for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; what is not plain is left to the constructor."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _hint_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    names = [_hint_name(choice) for choice in get_args(hint)] if get_origin(hint) is UnionType else []
    return " or ".join(names) or {NoneType: "null", int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
