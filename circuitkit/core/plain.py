"""Plain values as text that anybody may have written, checked before anything is made of them. Nothing here touches a disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Levels of lists and mappings within each other; ours have about ten."""

_INTEGERS = range(-(2**63), 2**64)
_DIGITS = 20  # of the largest of them; more are not even converted, which takes quadratic time
_ODD_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
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
