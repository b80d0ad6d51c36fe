"""How annotations are checked in the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is expected, as everywhere


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks every call but that of constructors: these judge what a user gives themselves, with a sentence."""
    return function if function.__name__ == "__init__" else _check(function)
