"""FolderLock: one process at a time in a run folder."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import sys
from pathlib import Path

from circuitkit.core.errors import UserError

_log = logging.getLogger(__name__)

LOCK = "run.lock"
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_ITSELF = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # what a link leads to is not ours
_FAR = 1 << 30  # Windows keeps others from reading what is locked, so a byte behind the text is


class FolderLock:
    """A lock of the system on a file in a folder: a process that dies, however it dies, holds it no longer. Final.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether it is held through this object."""
        return self._file is not None

    def take(self) -> None:
        """Takes the lock; does nothing where it is held through this object already.

        Raises:
            UserError: Another process holds it, or the folder cannot be written.
        """
        while self._file is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | _ITSELF, 0o666)
            except OSError as error:
                raise UserError(
                    f"Expected to be able to write into the run folder {self.folder}, but: {error}. Correct its permissions, or choose "
                    "another folder."
                ) from error
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise UserError(f"Expected a file at {self.folder / LOCK}, found something else. Remove it, or choose another folder.")
                self._lock(file)
            except BaseException:
                os.close(file)
                raise
            if self._is_current(file):
                self._file = file
            else:  # its last holder removed it between our opening and our locking
                os.close(file)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Gives the lock back, and removes its file."""
        if self._file is None:
            return
        file, self._file = self._file, None
        (self.folder / LOCK).unlink(missing_ok=True)  # before the lock goes, or a new holder's file would be removed
        os.close(file)

    def _lock(self, file: int) -> None:
        try:
            _lock_file(file)
        except OSError as error:
            if error.errno not in _HELD:
                _log.warning("The run folder %s cannot be locked (%s): see to it that only one process uses it.", self.folder, error)
                return
            holder = os.read(file, 200).decode(errors="replace").strip() or "which has just started"
            raise UserError(
                f"Expected a run folder that no other process uses, but {self.folder} is in use by process {holder}. Wait for it, stop "
                "it, or choose another folder."
            ) from error

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            return False


def _lock_file(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
