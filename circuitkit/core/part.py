"""What a run is put together from, and the promise that the settings of such a part can be read back."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from circuitkit.core.contents import content
from circuitkit.core.errors import ConfigError, MeasurementError
from circuitkit.core.sources import remember

_STARS: Mapping[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class _Checked(ABCMeta):
    """Looks at every part when it is made.

    A metaclass and not a wrapper of ``__init__``: a dataclass gets its constructor after ``__init_subclass__`` has run, a subclass need not
    call its parent's, and what is seen here is whole. Copies and pickles do not pass here; they hold what the original held.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        part = super().__call__(*args, **kwargs)
        if isinstance(part, Part):
            settings = kept(part)
            _check_declarations(type(part), settings)
            remember(type(part))  # now: in the minutes until a large model is loaded its source may be edited
            if type(part).reads_files:
                object.__setattr__(part, "_contents", {path: content(path) for _, path in _paths(part, settings)})
        return part

    @property
    def __signature__(cls) -> inspect.Signature:
        """Of the constructor, which ``inspect.signature`` would else take from ``__call__`` above."""
        return _signature(cls)


class Part(metaclass=_Checked):
    """Something that a result depends on: a task, patcher, metric, method, engine.

    Whatever a constructor takes, ``*args`` and ``**kwargs`` among it, is an attribute of the same name afterwards. So a part can be
    described and hashed, and one that cannot is refused when it is made, since two that differ would be taken for the same.

    Attributes:
        reads_files: Names of the arguments that are paths of files or folders which the part reads. A run's content hash covers what is in
            them, and not where they are.
        unhashed: Names of the arguments that no result depends on by more than rounding, or that are hashed elsewhere. They are left out
            of descriptions and hashes, and need not be kept.

    Raises:
        ConfigError: A constructor's argument was not kept, or there is no argument of a name in ``reads_files``.
    """

    reads_files: ClassVar[tuple[str, ...]] = ()
    unhashed: ClassVar[tuple[str, ...]] = ()


def kept(thing: Any) -> dict[str, Any]:
    """The arguments that an object was made with, from its attributes of the same names.

    Raises:
        ConfigError: One of them is no attribute of the object; the text says which to add.
    """
    left_out = thing.unhashed if isinstance(thing, Part) else ()
    names = {name: star for name, star in arguments(type(thing)).items() if name not in left_out}
    for name, star in names.items():
        if not _keeps(thing, name):
            cls, found = type(thing).__qualname__, ", ".join(getattr(thing, "__dict__", ())) or "none"
            other = " Or write out the arguments that it stands for, and keep each of them." if star else ""
            raise ConfigError(
                f"{cls} takes the argument {star}{name}, but an object of it does not keep it as an attribute of that name (found: "
                f"{found}), so two that differ in it would pass for the same. Add self.{name} = {name} to its __init__.{other}"
            )
    return {name: getattr(thing, name) for name in names}


def _keeps(thing: object, name: str) -> bool:
    """Whether it has the attribute, of its own: one of its class, unless a property, would be there whatever the argument was."""
    if name in getattr(thing, "__dict__", ()):
        return True
    of_class = inspect.getattr_static(type(thing), name, None)
    return (of_class is None or inspect.isdatadescriptor(of_class)) and hasattr(thing, name)


def arguments(cls: type) -> Mapping[str, str]:
    """Names of the arguments of a class's constructor, each with its stars, if it has any.

    Raises:
        ConfigError: It does not tell, as some classes that are not written in Python.
    """
    try:
        return _arguments(cls)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"A {cls.__module__}.{cls.__qualname__} does not say what it was made with, so it cannot be part of a run's settings. Give "
            "plain values, tensors, functions with a name, or an object of a class that keeps its arguments as attributes."
        ) from error


@cache
def _arguments(cls: Any) -> Mapping[str, str]:
    return {name: _STARS.get(each.kind, "") for name, each in _signature(cls).parameters.items()}


def unchanged(parts: Mapping[str, Any]) -> None:
    """Looks at the files of parts once more: before a run is told what it depends on, and again when it is done.

    Raises:
        MeasurementError: One has changed since its part was made.
    """
    for where, part in parts.items():
        for argument, path in _paths(part, kept(part)) if isinstance(part, Part) else ():
            if content(path) != known(part, path):
                raise MeasurementError(
                    f"The file {path} ({where}.{argument}) has changed since it was given, so it cannot be said which content of it the "
                    "result depends on. Leave it alone while a run goes on, and run once more."
                )


def known(part: Part, path: str) -> str | None:
    """What was in a file when the part that reads it was made; as it is now, for a path that the part was given later."""
    contents: dict[str, str | None] = vars(part).setdefault("_contents", {})
    return contents.setdefault(path, content(path))


def paths_in(value: Any) -> Iterator[str]:
    """The paths in an argument that names files: one, several, or by name; an object in place of a path has none."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from paths_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from paths_in(inner)


def _paths(part: Part, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in part.reads_files:
        for path in paths_in(settings[name]):
            yield name, path


def _check_declarations(cls: type[Part], settings: Mapping[str, Any]) -> None:
    for name in cls.reads_files:
        if name not in settings:
            raise ConfigError(
                f"{cls.__qualname__}.reads_files names {name!r}, which is no argument of its constructor. Choices: {', '.join(settings)}."
            )
    for name, value in settings.items():
        if isinstance(value, Path) and name not in cls.reads_files:
            raise ConfigError(
                f"{cls.__qualname__} was given the path {name}={str(value)!r}, and does not say whether it reads what is there. Add "
                f"reads_files = ({name!r},) to the class, or unhashed = ({name!r},) if no result depends on it."
            )


def _signature(cls: type) -> inspect.Signature:
    if not isinstance(cls, _Checked):
        return inspect.signature(cls)
    made_by: Any = getattr(cls, "__init__")  # noqa: B009  of the class, which mypy takes for an object
    made_by = made_by if made_by is not object.__init__ else cls.__new__
    if made_by in (object.__init__, object.__new__):
        return inspect.Signature()
    signature = inspect.signature(made_by)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
