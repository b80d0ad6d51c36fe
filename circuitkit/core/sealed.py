"""The text of result files: JSON with a format version and a checksum, refused in words when it is damaged. Nothing here touches a disk."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from circuitkit.core import plain
from circuitkit.core.errors import CircuitError, UserError

FORMAT_VERSION = 1

_LARGEST = 4096  # layers or heads; models have about a hundred
_LONG = 1000  # characters of what a sentence repeats from a file


class Savable:
    """A value that ``circuitkit.save`` writes to a file."""

    def save(self, *args: object, **settings: object) -> NoReturn:
        """Refuses. nnsight gives every object a method of this name, which would speak of traces here.

        Raises:
            UserError: Always; the text says how a value is saved.
        """
        name = type(self).__name__
        raise UserError(
            f"A {name} does not save itself: it is a value, and files are the affair of circuitkit.storage. Write it with "
            f"circuitkit.save(value, path), and read it with circuitkit.load({name}, path)."
        )


def seal(body: Mapping[str, Any]) -> str:
    """The text of a file with this content; what ``unseal`` would refuse, such as NaN, is written as ``plain.writable`` says."""
    content = plain.writable({"format_version": FORMAT_VERSION, **body})
    return json.dumps({**content, "checksum": checksum(content)}, indent=2) + "\n"


def unseal(text: str, where: str) -> dict[str, Any]:
    """The content of a file.

    Args:
        text: What ``seal`` returned.
        where: What to call it in an error.

    Raises:
        CircuitError: Not such a text, of another format version, or damaged.
    """
    try:
        body = plain.parse(text)
    except ValueError as error:
        raise CircuitError(f"{where} is not a whole JSON file ({error}). It may have been cut off; make it again.") from error
    if not isinstance(body, dict) or "format_version" not in body:
        raise CircuitError(
            f"{where} is not a file that circuitkit wrote: it has no format_version. Give one that a run "
            "left, such as circuit.json."
        )
    if body["format_version"] != FORMAT_VERSION:
        raise CircuitError(
            f"{where} has format {reprlib.repr(body['format_version'])}; this version reads format {FORMAT_VERSION}. Use the version that "
            "wrote it."
        )
    found = body.pop("checksum", None)
    if found != checksum(body):
        raise CircuitError(
            f"{where} was changed or damaged after it was written: its checksum does not match. Restore it, "
            "or make it again."
        )
    return body


@contextmanager
def reading(where: str, what: str) -> Iterator[Callable[..., Any]]:
    """Within this context, what is missing from a file or of the wrong kind becomes a sentence. Gives the function that reads an entry.

    Args:
        where: What to call the file in an error.
        what: The kind of file that was expected, such as ``circuit``.

    Raises:
        CircuitError: It is no file of that kind.
    """
    try:
        yield entry
    except CircuitError as error:
        raise CircuitError(f"{where}: {error}" if len(str(error)) < _LONG else f"{where}: {str(error)[:_LONG]} ...") from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CircuitError(f"{where} is not a {what} file: {type(error).__name__} at {str(error)[:_LONG]}.") from error


def entry(body: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """An entry of a file, which must be just of its kind: what is only like it, such as 2.7 layers, was written by something else."""
    if type(body[key]) not in kinds or (int in kinds and float not in kinds and body[key] < 0):
        raise ValueError(f"{key} is {reprlib.repr(body[key])}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return body[key]


def size(body: Mapping[str, Any], key: str) -> int:
    """An entry that counts the layers or heads of a model, of which later tables are made."""
    found: int = entry(body, key, int)
    if found > _LARGEST:
        raise ValueError(f"{key} is {found}, expected at most {_LARGEST}")
    return found


def checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
