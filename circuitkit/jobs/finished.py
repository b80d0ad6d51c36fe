"""Runs that have finished, by content hash: what a sweep need not do again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from circuitkit.core import plain
from circuitkit.core.errors import UserError
from circuitkit.core.records import RunInfo
from circuitkit.jobs import folders
from circuitkit.runner import NotNeeded
from circuitkit.storage import run_folder
from circuitkit.storage.reading import read_lines

FILE = "finished.jsonl"


class AlreadyFinished(NotNeeded):
    """The very same run has finished before.

    Attributes:
        folder: Where its files are.
        content_hash: Of both.
    """

    def __init__(self, folder: Path, content_hash: str) -> None:
        super().__init__(
            f"Skipped: the same run (content hash {content_hash[:12]}) has finished in {folder}. Set rerun=true to run it again."
        )
        self.folder = folder
        self.content_hash = content_hash


class Finished:
    """An index of finished runs, ``finished.jsonl`` in a folder: a line a run, only ever appended to, by many processes.

    The index only says where to look. Whether a run is the same is decided by the content hash in the circuit or scores file itself.

    Attributes:
        root: The folder. Run folders in the index are relative to it where they lie below.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def refuse(self, info: RunInfo) -> None:
        """For a runner's ``check``.

        Raises:
            AlreadyFinished: The very same run has finished.
        """
        folder = self.find(info.content_hash)
        if folder is not None:
            raise AlreadyFinished(folder, info.content_hash)

    def find(self, content_hash: str) -> Path | None:
        """The folder of the finished run with this content hash. Lines that cannot be read, or whose run is gone, count for nothing."""
        try:
            lines = read_lines(self.root / FILE, "index")
        except UserError:
            return None
        for line in reversed(lines):
            if content_hash in line:
                folder = self._folder(line)
                if folder and run_folder.status(folder).get("status") == "finished" and folders.content_hash(folder) == content_hash:
                    return folder
        return None

    def add(self, content_hash: str, folder: str | Path) -> None:
        """Notes a finished run."""
        self.root.mkdir(parents=True, exist_ok=True)
        where, root = Path(folder).resolve(), self.root.resolve()
        line = json.dumps({"content_hash": content_hash, "folder": str(where.relative_to(root) if where.is_relative_to(root) else where)})
        # One write in append mode, so that lines of jobs that finish at the same time do not mix.
        file = os.open(self.root / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)

    def _folder(self, line: str) -> Path | None:
        try:
            return self.root / plain.parse(line)["folder"]
        except (ValueError, KeyError, TypeError):
            return None
