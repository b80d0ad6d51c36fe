"""The one door for files that can come from elsewhere: what is no regular file, is too large, or is no text ends in a sentence.

Named pipes, devices and folders are never opened. What a file may take is bounded, in bytes and in values, so that a text of a few
megabytes cannot fill the memory; ``CIRCUITKIT_MAX_FILE_MB`` raises both bounds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from circuitkit.core import plain
from circuitkit.core.errors import CircuitError, ConfigError, UserError

LIMIT = "CIRCUITKIT_MAX_FILE_MB"
"""The environment variable that says how many megabytes a file may have."""
LIMIT_MB = 64

_BYTES_A_VALUE = 16  # a text with more values than that is all brackets and commas; each value takes up to 200 bytes of memory
_LINE_BYTES = 1 << 20
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # what was a file a moment ago may be a pipe now
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def max_bytes() -> int:
    """The largest file that is read.

    Raises:
        ConfigError: The environment variable is no number of megabytes.
    """
    given = os.environ.get(LIMIT, "")
    if given and not (given.isascii() and given.isdecimal() and 0 < int(given[:12]) < 10**9):
        raise ConfigError(f"{LIMIT} must be a whole number of megabytes, such as 512; found {given[:80]!r}.")
    return int(given or LIMIT_MB) * 2**20


def open_file(path: str | Path, what: str, error: type[UserError] = CircuitError, *, times: float = 1) -> BinaryIO:
    """Opens a regular file to be read; links are followed.

    Args:
        path: Of the file.
        what: What it should be, for the sentence, such as ``circuit``.
        error: The class of the sentence.
        times: How often the usual bound it may have.

    Raises:
        UserError: Of the class ``error``: it is missing, may not be read, is no regular file, or is too large.
    """
    try:
        mode = os.stat(path).st_mode  # before it is opened, for to open a device may do something
        if not stat.S_ISREG(mode):
            raise error(
                f"The {what} file {path} cannot be read: expected a regular file, found {_KINDS.get(stat.S_IFMT(mode), 'something else')}. "
                "Give the path of a file, or replace it."
            )
        file = os.fdopen(os.open(path, os.O_RDONLY | _WITHOUT_WAITING), "rb")
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"The {what} file {str(path)[:500]!r} cannot be read: {problem}. Check the path and its permissions.") from problem
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise error(f"The {what} file {path} cannot be read: it was exchanged for something that is no regular file.")
    if found.st_size > times * max_bytes():
        file.close()
        raise error(_too_large(path, what, found.st_size, times))
    return file


def read_bytes(path: str | Path, what: str, error: type[UserError] = CircuitError, *, times: float = 1) -> bytes:
    """The content of a regular file.

    Args:
        path: Of the file.
        what: What it should be, for the sentence.
        error: The class of the sentence.
        times: How often the usual bound it may have.

    Raises:
        UserError: Of the class ``error``: it cannot be read, or is too large.
    """
    most = int(times * max_bytes())
    with open_file(path, what, error, times=times) as file:
        try:
            content = file.read(most + 1)  # it may grow, or be of a file system that does not know its size
        except OSError as problem:
            raise error(f"The {what} file {path} cannot be read: {problem}. Check the path and its permissions.") from problem
    if len(content) > most:
        raise error(_too_large(path, what, len(content), times))
    return content


def read_text(path: str | Path, what: str, error: type[UserError] = CircuitError) -> str:
    """The text of a regular file in UTF-8, without a byte-order mark.

    Args:
        path: Of the file.
        what: What it should be, for the sentence.
        error: The class of the sentence.

    Raises:
        UserError: Of the class ``error``: it cannot be read, is too large, or is no text.
    """
    try:
        text = read_bytes(path, what, error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"The {what} file {path} cannot be read: {problem}. Expected a text in UTF-8.") from problem
    _check_values(text, ",[{", path, what, error)
    return text


def read_json(path: str | Path, what: str, error: type[UserError] = CircuitError) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: Of the class ``error``: it cannot be read, or ``plain.parse`` does not take it.
    """
    text = read_text(path, what, error)
    try:
        return plain.parse(text)
    except ValueError as problem:
        raise error(f"The {what} file {path} is not valid JSON: {problem}. It may have been cut off; make it again.") from problem


def read_lines(path: str | Path, what: str, error: type[UserError] = CircuitError) -> list[str]:
    """The lines of a text file, without their ends. Only a newline ends a line: a text within JSON may hold what else looks like one."""
    text = read_text(path, what, error)
    _check_values(text, ",[{\n", path, what, error)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def raw_lines(path: str | Path, what: str, error: type[UserError] = CircuitError, *, times: float = 1) -> Iterator[bytes]:
    """The lines of a file with their newlines, one after the other; one of more than a megabyte comes in pieces.

    Args:
        path: Of the file.
        what: What it should be, for the sentence.
        error: The class of the sentence.
        times: How often the usual bound the file may have.

    Raises:
        UserError: Of the class ``error``: it cannot be read.
    """
    with open_file(path, what, error, times=times) as file:
        try:
            yield from iter(lambda: file.readline(_LINE_BYTES), b"")
        except OSError as problem:
            raise error(f"The {what} file {path} cannot be read: {problem}. Check the path and its permissions.") from problem


def _check_values(text: str, marks: str, path: str | Path, what: str, error: type[UserError]) -> None:
    most = max_bytes() // _BYTES_A_VALUE
    if sum(map(text.count, marks)) > most:
        raise error(
            f"The {what} file {path} holds more than {most:,} values. If it is meant to be so large, set the environment variable {LIMIT}, "
            f"the bound in megabytes, to more than {max_bytes() >> 20}."
        )


def _too_large(path: str | Path, what: str, size: int, times: float) -> str:
    return (
        f"The {what} file {path} has {size / 2**20:,.0f} MB, expected at most {times * max_bytes() / 2**20:,.0f} MB. If it is meant to be "
        f"so large, set the environment variable {LIMIT}, the bound in megabytes, to more than {max_bytes() >> 20}."
    )
