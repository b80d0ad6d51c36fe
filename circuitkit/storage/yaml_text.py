"""YAML that anybody may have written: plain values only, and an alias counts as all that it stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from circuitkit.core import plain
from circuitkit.core.errors import ConfigError, UserError
from circuitkit.storage.reading import read_text

MAX_ITEMS = 100_000
"""Most values in a file of settings, with aliases written out."""

MAX_CHARACTERS = 4_000_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LONG_NUMBER = re.compile(r"[-+.0-9][-+.:_0-9a-fA-FxXoO]{99,}")  # YAML counts to the base 60 too, which takes quadratic time
_PLAIN = (dict, list, str, int, float, bool, type(None))


def read_yaml(path: str | Path, what: str, error: type[UserError] = ConfigError) -> Any:
    """The value in a YAML file.

    Args:
        path: Of the file.
        what: What it should be, for the sentence.
        error: The class of the sentence.

    Raises:
        UserError: Of the class ``error``: it cannot be read, or ``parse`` does not take it.
    """
    text = read_text(path, what, error)
    try:
        return parse(text)
    except ValueError as problem:
        raise error(
            f"The {what} file {path} cannot be read: {problem}. Expected YAML of plain values, as circuitkit writes it."
        ) from problem


def parse(text: str) -> Any:
    """The value of a YAML text: mappings of texts or numbers, lists, texts, numbers, booleans and null; no tags, no dates.

    Raises:
        ValueError: It is no such text; says why.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, OverflowError) as problem:
        raise ValueError(" ".join(str(problem).split())) from problem
    plain.check(value)
    _check_plain(value)
    return value


def _check_events(text: str) -> None:
    """Refuses what would take long or fill the memory, before anything is made of it."""
    sizes: dict[str, int] = {}  # of what each anchor stands for
    counted, open_items = 0, list[tuple[str | None, int]]()
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!"):
            raise ValueError(f"it holds the tag {event.tag!r}")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for nothing, or for what it is a part of")
            counted += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            counted += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
            if event.implicit[0] and _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"it holds a number of {len(event.value)} characters")
        elif isinstance(event, yaml.CollectionStartEvent):
            open_items.append((event.anchor, counted))
            counted += 1
            if len(open_items) > plain.MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {plain.MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_items.pop()
            sizes |= {anchor: counted - before} if anchor else {}
        if counted > MAX_ITEMS:
            raise ValueError(f"it holds more than {MAX_ITEMS:,} values, an alias counted as all that it stands for")


def _check_plain(value: Any) -> None:
    if type(value) not in _PLAIN:
        raise ValueError(f"it holds a {type(value).__name__}, {str(value)[:40]!r}")
    if type(value) is int:
        plain.integer(str(value))
    for key in value if type(value) is dict else ():
        if type(key) not in (str, int):
            raise ValueError(f"it holds the key {str(key)[:40]!r}, which is no text")
    for inner in value.values() if type(value) is dict else value if type(value) is list else ():
        _check_plain(inner)
