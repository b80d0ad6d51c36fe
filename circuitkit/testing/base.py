"""What the suites share: a part is made anew for each test, and each of its arguments changes its hash."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

from circuitkit.core.describe import describe, identity
from circuitkit.core.errors import UserError
from circuitkit.core.part import Part, kept
from circuitkit.core.records import Step

ONLY = object()
"""In ``others`` of a conformance suite: the argument takes no value but the one that it has."""


STEP = Step(0, 0, "a0.h0", 91.5, False, 11, "backward", 12)
"""A step of a search, for suites of those that are told of one."""


class Conformance(ABC):
    """Of anything that is made."""

    @abstractmethod
    def make(self) -> Any:
        """Makes what is tested, anew at each call."""


class PartConformance(Conformance):
    """Of a part: its settings are its hash."""

    def others(self) -> Mapping[str, Any]:
        """Other values for arguments of the constructor, where they cannot be guessed from the value and type that they have.

        Returns:
            By argument a value that the constructor takes in place of the one that ``make`` gave; or two parts that differ in that
            argument alone, where it cannot be changed by itself; or ``ONLY``, where there is no other.
        """
        return {}

    def test_its_settings_are_plain_values(self) -> None:
        """They go into config files, provenance and hashes."""
        settings = describe(self.make())
        assert json.loads(json.dumps(settings)) == settings, f"expected settings that JSON can hold, found {settings}"
        assert describe(self.make()) == settings, "expected the same settings from two objects that were made alike"

    def test_every_argument_changes_the_hash(self) -> None:
        """Else a run with another value would be skipped as one that was made before."""
        assert hashed(self.make()) == hashed(self.make()), "expected the same hash from two objects that were made alike"
        for name, one, other in variants(self.make(), self.others()):
            assert hashed(one) != hashed(other), f"two objects that differ in {name} have the same hash"

    def test_what_is_in_a_file_changes_the_hash(self, tmp_path: Path) -> None:
        """And where it lies does not."""
        part = self.make()
        for name, parameter in inspect.signature(type(part)).parameters.items():
            declared = name in (*part.reads_files, *part.unhashed)
            assert declared or not re.search(r"\bPath\b", str(parameter.annotation)), f"{name} takes a path: add it to reads_files"
        for name in part.reads_files:
            given, here, there = self.others().get(name), tmp_path / "here", tmp_path / "there"
            base, path = (given[0], kept(given[0])[name]) if _are_parts(given) else (part, given or kept(part)[name])
            if isinstance(path, str | Path) and Path(path).is_file():
                shutil.copy(path, here)
            else:
                here.write_text("{}", encoding="utf-8")
            shutil.copy(here, there)
            first = hashed(_with(base, name, str(here)))
            assert hashed(_with(base, name, str(there))) == first, f"the same file under another path ({name}) has another hash"
            with there.open("a", encoding="utf-8") as opened:
                opened.write("\n")
            assert hashed(_with(base, name, str(there))) != first, f"a file with something else in it ({name}) has the same hash"


def variants(part: Part, others: Mapping[str, Any]) -> Iterator[tuple[str, Part, Part]]:
    """Two parts for each argument of a constructor, which differ in that argument alone.

    Args:
        part: To begin with.
        others: As ``others`` of a conformance suite returns them.

    Yields:
        The argument, and the two parts.

    Raises:
        AssertionError: Another value for an argument can neither be guessed nor is it among the others.
    """
    hints = _hints(type(part))
    for name, value in kept(part).items():
        given = others.get(name)
        if _are_parts(given):
            yield name, given[0], given[1]
            continue
        guesses = [given] if name in others else [guess for guess in _guesses(value, hints.get(name)) if guess != value]
        made = [made for made in (_tried(part, name, guess) for guess in guesses if guess is not ONLY) if made is not None]
        assert made or given is ONLY, f"no other value than {value!r} was found that {name} can have: give one in others()"
        yield from ((name, part, other) for other in made[:1])


def _guesses(value: Any, hint: Any) -> Iterator[Any]:
    """Values that an argument may have in place of the one that it has."""
    for choice in (hint, *get_args(hint)):
        if get_origin(choice) is Literal:
            yield from get_args(choice)
        if value is None and choice in (bool, int, float):
            yield choice(1)
    if isinstance(value, Enum):
        yield from type(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value - 1, value / 2) if isinstance(value, float) else (value + 1, value - 1)
    elif isinstance(value, list | tuple):
        yield from (value[:-1], value[::-1])
    if NoneType in get_args(hint):
        yield None


def _hints(cls: type[Part]) -> dict[str, Any]:
    try:
        return get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    except (NameError, TypeError):  # a shape string, or a name that is imported for type checkers only
        return {}


def _with(part: Part, name: str, value: Any) -> Part:
    signature = inspect.signature(type(part))
    bound = inspect.BoundArguments(signature, OrderedDict(kept(part) | {name: value}))
    return type(part)(*bound.args, **bound.kwargs)


def _tried(part: Part, name: str, value: Any) -> Part | None:
    try:
        return _with(part, name, value)
    except UserError:
        return None


def hashed(part: Part) -> Any:
    found = identity({"part": part})
    return found.settings, found.code


def _are_parts(given: Any) -> TypeGuard[tuple[Part, Part]]:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, Part) for each in given)
