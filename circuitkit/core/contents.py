"""What is in a file or folder, as a hash. It stands in core, though it reads, because parts know no other room."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path

# Within this time a file may change twice and show one and the same time of change.
_TICK = 2.0

_seen: dict[tuple[str, int, int, int], str] = {}


def content(path: str) -> str | None:
    """SHA-256 of the bytes of a file, or of the names and bytes of the files of a folder; None if nothing can be read there.

    A large file that has not changed is read once a process.
    """
    place = Path(path)
    try:
        if not place.is_dir():
            return _of_file(place)
        digest = hashlib.sha256()
        for file in sorted(inner for inner in place.rglob("*") if inner.is_file()):
            digest.update(f"{file.relative_to(place).as_posix()}\0{_of_file(file)}\0".encode())
        return digest.hexdigest()
    except (OSError, ValueError):  # the part itself says what is wrong, when it comes to read it
        return None


def _of_file(file: Path) -> str:
    before = file.stat()
    if not stat.S_ISREG(before.st_mode):  # a named pipe would be waited for
        raise OSError(f"{file} is no regular file")
    key = (os.path.abspath(file), before.st_ino, before.st_size, max(before.st_mtime_ns, before.st_ctime_ns))
    if key in _seen:
        return _seen[key]
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if time.time() - key[-1] / 1e9 > _TICK:
        _seen[key] = digest.hexdigest()
    return digest.hexdigest()
