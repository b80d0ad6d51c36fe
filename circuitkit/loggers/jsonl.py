"""JsonlLogger: a run as a folder of plain files."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import yaml

from circuitkit.core import plain
from circuitkit.core.errors import ConfigError, UserError
from circuitkit.core.records import Artifact, TableArtifact, TextArtifact
from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.redaction import redacted
from circuitkit.storage import journal, run_folder
from circuitkit.storage.folder_lock import LOCK, FolderLock
from circuitkit.storage.reading import raw_lines
from circuitkit.storage.run_folder import CONFIG, METRICS, STATUS, TIMES

_OWN = (CONFIG, METRICS, STATUS, journal.JOURNAL, LOCK)


class JsonlLogger(Logger):
    """Owns a run folder: ``config.yaml``, ``metrics.jsonl``, ``status.json``, text files as they are, tables as ``<name>.parquet``.

    ``status.json`` says ``running`` from the start, so a run that was killed can be told from one that finished.
    A folder with a finished run, or in use by another process, is refused; what an unfinished run left moves into ``previous-<n>/``
    first, or is gone on with.

    Attributes:
        folder: The run folder; made when the run starts.
        overwrite: Use the folder of a finished run too. Its files move aside like those of an unfinished one.
        resume: Go on with the unfinished run whose journal is in the folder: metrics of the steps in it stay, whatever was logged
            besides is logged again.
    """

    essential = True

    def __init__(self, folder: str | Path, overwrite: bool = False, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.resume = resume
        self._lock = FolderLock(self.folder)
        self._name = ""
        self._started = 0.0
        self._files: list[str] = []
        self._metrics: TextIO | None = None

    def check_unused(self) -> None:
        """Refuses a folder with a finished run; writes nothing. For those who want to know before they load a model.

        Raises:
            ConfigError: The folder holds a finished run.
        """
        before = run_folder.status(self.folder)
        if before.get("status") == "finished" and not self.overwrite:
            raise ConfigError(
                f"Expected a folder without a finished run, but {self.folder} holds {before.get('name')!r} of {before.get('time')}. "
                f"Choose another folder, or set overwrite=true: its files are then moved into {self.folder}/previous-<n>."
            )

    @property
    def has_finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return bool(run_folder.status(self.folder).get("status") == "finished")

    def claim(self) -> None:
        """Takes the folder for this process, until ``release`` or ``finalize``; before a large model is loaded.

        Raises:
            ConfigError: The folder holds a finished run.
            UserError: Another process uses it, or it cannot be written.
        """
        self.check_unused()
        self._lock.take()

    def release(self) -> None:
        """Gives the folder back; does nothing where it was not taken."""
        self._lock.release()

    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Takes the folder and writes ``config.yaml``.

        Raises:
            ConfigError: The folder holds a finished run. Nothing was written.
            UserError: The folder cannot be written, or another process uses it.
        """
        self.claim()
        with self._writing():
            recorded = journal.read(self._path(journal.JOURNAL)) if self.resume else None
            if recorded is None:
                self._move_aside([*run_folder.status(self.folder).get("files", ()), CONFIG, METRICS, STATUS, journal.JOURNAL])
            else:
                self._replace(METRICS, _rows_before(self._path(METRICS), len(recorded.steps)))
            self._name, self._started, self._files = name, time.time(), []
            self._metrics = self._path(METRICS).open("a", encoding="utf-8")
            self._write_status("running")
            self._replace(CONFIG, yaml.safe_dump(redacted(settings), sort_keys=False, allow_unicode=True).encode())

    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Appends one line. Numbers that JSON does not know (NaN, infinity) become null.

        Raises:
            UserError: The disk is full or gone.
        """
        if self._metrics is None:
            raise RuntimeError("JsonlLogger.log_metrics was called outside of a run: log_config comes first and finalize last.")
        row = {"step": step, "time": round(time.time(), 3), **{key: _plain(value) for key, value in metrics.items()}}
        with self._writing():
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self._metrics.flush()

    def log_artifact(self, artifact: Artifact) -> None:
        """Writes a text as the file of that name, a table as ``<name>.parquet``, whole or not at all.

        Raises:
            ConfigError: The name lies outside of the run folder, or is one that the logger itself uses.
            UserError: The disk is full or gone.
        """
        if isinstance(artifact, TextArtifact):
            name, content = artifact.name, artifact.text.encode()
        else:
            name, content = f"{artifact.name}.parquet", _parquet(artifact)
        self._check_name(name)
        with self._writing():
            # Noted first: a file that is listed and missing does no harm, one that is there and unlisted would outlive its run.
            if name not in self._files:
                self._files.append(name)
                self._write_status("running")
            self._replace(name, content)

    def finalize(self, status: Status) -> None:
        """Writes how the run ended, and gives the folder back. Writes nothing for a run that was refused at its start."""
        if self._metrics is None:
            self.release()
            return
        metrics, self._metrics = self._metrics, None
        with self._writing():
            try:
                metrics.close()
            finally:
                try:
                    self._write_status(status)
                finally:
                    self.release()

    def _write_status(self, status: str) -> None:
        now = datetime.now(timezone.utc)
        body = {
            "name": self._name,
            "status": status,
            "time": now.isoformat(timespec="seconds"),
            "duration": round(now.timestamp() - self._started, 3),
            "files": self._files,
        }
        self._replace(STATUS, json.dumps(body, indent=2).encode() + b"\n")

    def _move_aside(self, names: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        present = [name for name in names if self._inside(name) and self._path(name).is_file()]
        if not present:
            return
        number = 1
        while (self.folder / f"previous-{number}").exists():
            number += 1
        for name in present:
            target = self.folder / f"previous-{number}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._path(name).rename(target)

    def _check_name(self, name: str) -> None:
        if not self._inside(name) or self._path(name) in {self._path(own) for own in _OWN}:
            raise ConfigError(
                f"Expected the name of a file inside the run folder {self.folder}, found {name!r}. "
                f"Choose a relative name without '..' that is none of {', '.join(_OWN)}."
            )

    def _inside(self, name: str) -> bool:
        path, root = self._path(name), self.folder.resolve()
        return path != root and path.is_relative_to(root)

    def _path(self, name: str) -> Path:
        return (self.folder / name).resolve()

    def _replace(self, name: str, content: bytes) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name with no content
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Expected to be able to write into the run folder {self.folder}, but: {error}. "
                "Free some space or correct its permissions, or choose another folder."
            ) from error


def _rows_before(metrics: Path, step: int) -> bytes:
    """The lines of a file of metrics that belong to earlier steps; a torn one belongs to none."""
    kept = []
    for line in raw_lines(metrics, "metrics", times=TIMES) if metrics.exists() else ():
        try:
            row = plain.parse(line.decode())
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] < step and line.endswith(b"\n"):
            kept.append(line)
    return b"".join(kept)


def _parquet(table: TableArtifact) -> bytes:
    # Slow to import, and needed only when a run has something to leave.
    import pyarrow
    from pyarrow import parquet

    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in table.rows]), buffer)
    return buffer.getvalue().to_pybytes()


def _plain(value: Any) -> Any:
    # Numbers of numpy and torch have item(); they look like floats and are not.
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
