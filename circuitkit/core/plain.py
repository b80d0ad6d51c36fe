"""Plain values as text that anybody may have written, checked before anything is made of them. Nothing here touches a disk."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints, is_typeddict

MAX_DEPTH = 64
"""Levels of lists and mappings within each other; ours have about ten."""

_INTEGERS = range(-(2**63), 2**64)
_DIGITS = 20  # of the largest of them; more are not even converted, which takes quadratic time
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", dict: "a mapping",
          list: "a list"}  # fmt: skip
_ODD = re.compile("[\0\ud800-\udfff]")


def parse(text: str) -> Any:
    """The value of a JSON text.

    Unlike ``json.loads`` it takes no NaN, no infinity (also not as ``1e400``), no integer beyond 64 bits, no lone surrogate, no NUL, and
    no nesting without end.

    Raises:
        ValueError: It is no such text; says why.
    """
    try:
        value = json.loads(text, parse_int=integer, parse_float=_number, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    check(value, texts=_ODD_ESCAPE.search(text) is not None)
    return value


def check(value: Any, *, texts: bool = True) -> None:
    """Refuses a plain value that is nested too deeply, or holds what is no character.

    Args:
        value: Of plain values only.
        texts: Whether to look into texts.

    Raises:
        ValueError: Says what was found.
    """
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        if texts and any(_ODD.search(text) for each in level for text in _texts(each)):
            raise ValueError("a text in it holds a NUL or half of a surrogate pair, which no text may")
        inner = (each.values() if type(each) is dict else each for each in level)
        level = [each for values in inner for each in values if type(each) in (dict, list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def writable(value: Any) -> Any:
    """The same value as ``parse`` takes it: NaN and infinity become null, an integer beyond 64 bits its digits, and what is no character a
    replacement character."""
    if isinstance(value, dict):
        return {writable(key) if isinstance(key, str) else key: writable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [writable(inner) for inner in value]
    if isinstance(value, str):
        return _ODD.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if type(value) is int and value not in _INTEGERS else value


def integer(digits: str) -> int:
    """The whole number that stands there.

    Raises:
        ValueError: It needs more than 64 bits.
    """
    if len(digits) > _DIGITS or int(digits) not in _INTEGERS:
        raise ValueError(f"it holds an integer of {len(digits)} digits, which is beyond 64 bits")
    return int(digits)


def misfit(value: Any, declared: Any, at: str) -> str | None:
    """What is wrong with a value, or with the first part of it that is not as declared; None if all is.

    Args:
        value: Of plain values.
        declared: A ``TypedDict``, ``list[...]``, ``dict[str, ...]``, text, number, truth value, or a union of such. A mapping may hold more
            than is declared: that may be of a later version.
        at: What to call the value.
    """
    kind, inner = get_origin(declared) or declared, get_args(declared)
    if kind is UnionType:
        return None if any(misfit(value, each, at) is None for each in inner) else _unlike(at, value, inner)
    kind = dict if is_typeddict(declared) else kind
    if type(value) not in ((float, int) if kind is float else (kind,)):
        return _unlike(at, value, [kind])
    parts: Iterable[tuple[Any, Any, str]] = ()
    if is_typeddict(declared):
        missing = sorted(declared.__required_keys__ - value.keys())
        if missing:
            return f"{at} has no {missing[0]!r}"
        parts = ((value[key], each, f"{at}[{key!r}]") for key, each in _entries(declared).items() if key in value)
    elif kind is dict:
        parts = ((each, inner[1], f"{at}[{reprlib.repr(key)}]") for key, each in value.items())
    elif kind is list:
        parts = ((each, inner[0], f"{at}[{place}]") for place, each in enumerate(value))
    return next((wrong for part in parts if (wrong := misfit(*part)) is not None), None)


@lru_cache
def _entries(declared: type) -> dict[str, Any]:
    return get_type_hints(declared)


def _unlike(at: str, value: Any, kinds: Iterable[Any]) -> str:
    wanted = " or ".join(_WORDS[get_origin(kind) or kind] for kind in kinds)
    return f"{at} is {reprlib.repr(value)}, expected {wanted}"


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {digits[:20]}, which is beyond what a float can be")
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number in JSON")


def _texts(each: dict[Any, Any] | list[Any]) -> Iterator[str]:
    values = (*each, *each.values()) if isinstance(each, dict) else each
    return (value for value in values if isinstance(value, str))
