"""Journal: writes every decision down as it is made, so that a run can be gone on with."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from circuitkit.callbacks.base import Callback
from circuitkit.core.errors import UserError
from circuitkit.core.records import RunInfo, Step
from circuitkit.storage.journal import FORMAT_VERSION, JOURNAL, JournalFile, Recorded


class Journal(Callback):
    """Writes ``journal.jsonl`` into a run folder: what the run is, its decisions, and how it ended.

    Attributes:
        folder: The run folder.
        resume: What an earlier process of the run left there, to go on from; None for a new run.
    """

    def __init__(self, folder: str | Path, resume: Recorded | None = None) -> None:
        self.folder = Path(folder)
        self.resume = resume
        self._file: JournalFile | None = None

    def on_run_start(self, info: RunInfo) -> None:
        """Writes what the run is, or that it goes on.

        Raises:
            UserError: The folder holds the journal of another run, or cannot be written.
        """
        self._file = JournalFile(self.folder / JOURNAL, after=self.resume)
        if self.resume is None:
            about = {"name": info.name, "content_hash": info.content_hash, "provenance": dict(info.provenance)}
            self._file.append("run", format_version=FORMAT_VERSION, time=_now(), **about)
        else:
            self._file.append("resumed", steps=len(self.resume.steps), time=_now())

    def on_step(self, step: Step) -> None:
        """Writes a decision.

        Raises:
            UserError: The disk is full or gone; what was written before is whole.
        """
        if self._file is not None:
            self._file.step(step)

    def on_exception(self, error: BaseException) -> None:
        """Writes why the run stopped, if that can be written."""
        with suppress(UserError):
            self._end("stopped", error=type(error).__name__)

    def on_run_end(self, result: Any) -> None:
        """Writes that the run has finished."""
        self._end("finished")

    def _end(self, kind: str, **content: Any) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.append(kind, time=_now(), **content)
            finally:
                file.close()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
