"""The journal of a run: every decision as a line of JSON, so that a run that was killed goes on where it was.

Each line holds a record and the end of a chain of checksums over all records up to it, so that no line can be lost, doubled or changed
unseen. The last line may be torn, as a crash leaves it, and is then dropped; damage anywhere else is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any

from circuitkit.core import plain
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError, UserError
from circuitkit.core.records import RunInfo, Step
from circuitkit.storage.reading import read_bytes
from circuitkit.storage.run_folder import TIMES

FORMAT_VERSION = 1
JOURNAL = "journal.jsonl"

_LINE = re.compile(rb'\{"chain": "([0-9a-f]{16})", "record": (\{.*\})\}', re.DOTALL)
_SYNC_SECONDS = 10.0  # against power cuts; a record outlives its process at once
_HEADER = {"name": str, "content_hash": str, "provenance": dict}
_TYPES = {"sweep": int, "order": int, "node": str, "score": float, "kept": bool, "size": int, "direction": str, "total": int}


@dataclass(frozen=True)
class Recorded:
    """What a journal says.

    Attributes:
        path: Of the file.
        header: Name, content hash and provenance of the run.
        steps: Its decisions so far.
        size: Bytes of the whole records; what lies behind is torn.
        chain: The checksum of the last whole record.
    """

    path: Path
    header: Mapping[str, Any]
    steps: tuple[Step, ...]
    size: int
    chain: str

    def check(self, info: RunInfo) -> None:
        """Refuses to go on with a run whose result would depend on something that has changed.

        Raises:
            ConfigError: Another content hash; the text says what differs.
        """
        if self.header["content_hash"] == info.content_hash:
            return
        if "code" in info.provenance and "code" not in self.header["provenance"]:
            raise ConfigError(
                f"The run in {self.path.parent} was started by an earlier version of circuitkit, which did not note all that a result "
                "depends on, so it cannot be said whether its decisions would fit. Start a new run in another folder, or use that version."
            )
        found = [difference for difference in differences(self.header["provenance"], info.provenance) if "content_hash" not in difference]
        listed = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise ConfigError(
            f"Expected what the run in {self.path.parent} was started with, but this has changed since: "
            f"{listed or 'a setting that is not written down, such as a secret'}. "
            "Its decisions would not fit the new ones. Put that back, or start a new run in another folder."
        )

    def confirmed(self, place: int, step: Step) -> Step:
        """The recorded step instead of the same one made again.

        Args:
            place: Its place among the steps.
            step: As this process has made it.

        Raises:
            MeasurementError: This process has decided otherwise.
        """
        known = self.steps[place]
        if _decision(known) != _decision(step):
            raise MeasurementError(
                f"Expected decision {place} of {self.path} again, {_in_words(known)}; found {_in_words(step)}. "
                "The search is not deterministic here, so the run cannot go on. Start a new run in another folder."
            )
        return known


def read(path: Path) -> Recorded | None:
    """Reads and verifies a journal.

    Args:
        path: Of the file.

    Returns:
        What it says up to its last whole record; None where there is no whole record, or no file.

    Raises:
        CircuitError: It is damaged before its last line, of another format version, or no journal at all.
    """
    if not os.path.lexists(path):
        return None
    data = read_bytes(path, "journal", times=TIMES)
    end, n_lines = data.rfind(b"\n") + 1, data.count(b"\n")  # behind the last newline is nothing, or a torn record
    header: dict[str, Any] | None = None
    steps: list[Step] = []
    size, chain = 0, ""
    for number, line in enumerate(BytesIO(data), start=1):
        if size + len(line) > end:
            break
        try:
            record, chain_now = _verified(line.removesuffix(b"\n"), chain)
            if record["kind"] == "step":
                steps.append(_step(record))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if number == n_lines:
                break
            raise CircuitError(
                f"{path} is damaged: line {number} of {n_lines} is not what was written there ({str(error)[:300]}). A crash damages no "
                "line but the last, so something else has changed the file. Restore it, or start a new run in another folder."
            ) from error
        header = _checked_header(record, path) if header is None else header
        size, chain = size + len(line), chain_now
    return None if header is None else Recorded(path, header, tuple(steps), size, chain)


class JournalFile:
    """A journal that is being written. Final.

    Args:
        path: Of the file; it must not exist, unless it is gone on with.
        after: What it holds, to go on with it. A torn record at its end is cut off.

    Raises:
        UserError: It exists, or cannot be written.
    """

    def __init__(self, path: Path, after: Recorded | None = None) -> None:
        self.path = path
        self._chain, self._size = ("", 0) if after is None else (after.chain, after.size)
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0) | (os.O_CREAT | os.O_EXCL if after is None else 0), 0o666)
            if after is not None:
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
        except FileExistsError as error:
            raise UserError(
                f"Expected no journal of another run, but there is {path}. Go on with that run (resume={path.parent}), or choose another "
                "folder."
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, kind: str, **content: Any) -> None:
        """Writes a record, whole or not at all; it is the system's when this returns.

        Raises:
            UserError: The disk is full or gone. The records before are whole.
        """
        text = json.dumps(plain.writable({"kind": kind, **content}))
        chain = _digest(self._chain, text.encode())
        line = f'{{"chain": "{chain}", "record": {text}}}\n'.encode()
        try:
            left = line
            while left:  # a full disk takes a part of it and refuses the rest
                left = left[os.write(self._file, left) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._unwritable(error) from error
        self._chain, self._size = chain, self._size + len(line)

    def step(self, step: Step) -> None:
        """Writes a decision."""
        score = step.score if math.isfinite(step.score) else str(step.score)  # JSON itself knows no NaN
        self.append("step", **(vars(step) | {"score": score}))

    def close(self) -> None:
        """Ends the writing."""
        os.close(self._file)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"Expected to be able to write the journal {self.path}, but: {error}. What it holds is whole: free some space or correct its "
            f"permissions, and go on with resume={self.path.parent}."
        )


@dataclass
class Replay:
    """Steps of a run that may have begun in an earlier process. Final.

    Attributes:
        recorded: What the earlier process left; None where there was none.
        steps: All steps so far, the earlier ones included.
    """

    recorded: Recorded | None = None
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, recorded: Recorded | None, info: RunInfo) -> Replay:
        """Goes on from a journal, if there is one.

        Raises:
            ConfigError: It is that of another run.
        """
        if recorded is not None:
            recorded.check(info)
        return cls(recorded)

    @property
    def history(self) -> tuple[Step, ...]:
        """The steps of the earlier process."""
        return () if self.recorded is None else self.recorded.steps

    def is_new(self, step: Step) -> bool:
        """Takes a step, and says whether it was not yet made before.

        Raises:
            MeasurementError: It was made before, and otherwise.
        """
        place = len(self.steps)
        old = self.recorded is not None and place < len(self.history)
        self.steps.append(self.recorded.confirmed(place, step) if self.recorded is not None and old else step)
        return not old

    def check_complete(self) -> None:
        """To be called when the search is done.

        Raises:
            MeasurementError: The earlier process had made more steps than there are.
        """
        if len(self.steps) < len(self.history):
            raise MeasurementError(
                f"Expected at least the {len(self.history)} decisions that the journal holds; the search ended after {len(self.steps)}. "
                "It is not deterministic here, so the run cannot go on. Start a new run in another folder."
            )


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """What differs between two nested values, a text for each, such as ``settings.method.threshold was 0.8, is 0.9``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif json.dumps(before, default=str) != json.dumps(now, default=str):
        yield f"{key} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(chain: str, text: bytes) -> str:
    return hashlib.sha256(chain.encode() + text).hexdigest()[:16]


def _verified(line: bytes, chain: str) -> tuple[dict[str, Any], str]:
    """The record of a line, and the chain up to it."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("it is no record")
    if match[1].decode() != _digest(chain, match[2]):
        raise ValueError("its checksum does not match")
    return plain.parse(match[2].decode()), match[1].decode()


def _checked_header(record: dict[str, Any], path: Path) -> dict[str, Any]:
    if record["kind"] != "run" or record.get("format_version") != FORMAT_VERSION:
        raise CircuitError(
            f"{path} has journal format {str(record.get('format_version'))[:20]}; this version reads format {FORMAT_VERSION}. "
            "Use the version that wrote it, or start a new run in another folder."
        )
    for key, kind in _HEADER.items():
        if type(record.get(key)) is not kind:
            raise CircuitError(
                f"{path} is no journal of a run: its {key} is {str(record.get(key))[:80]!r}, expected a {kind.__name__}. Start a new "
                "run in another folder."
            )
    return record


def _step(record: dict[str, Any]) -> Step:
    values = {each.name: record[each.name] for each in fields(Step)}
    values["score"] = float(values["score"])
    for name, kind in _TYPES.items():
        if type(values[name]) is not kind:
            raise TypeError(f"{name} is {values[name]!r}")
    return Step(**values)


def _decision(step: Step) -> tuple[object, ...]:
    return step.sweep, step.order, step.node, step.kept, step.size, step.direction


def _in_words(step: Step) -> str:
    return f"{step.node} {'kept' if step.kept else 'removed'} at {step.score:.4g} % in sweep {step.sweep} {step.direction}".rstrip()
