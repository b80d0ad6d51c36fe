"""Commands of circuitkit as a user types them, without ten seconds of imports for each.

A process that has imported everything is forked for every command. What importing itself does, or does not, is tested with ``fresh``.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SERVER = Path(__file__).with_name("server_for_tests.py")
CLI = (sys.executable, "-m", "circuitkit.cli")


class Command:
    """A command that was started, as far as the tests need it like a ``subprocess.Popen``. One at a time. Final."""

    def __init__(self, args: tuple[str, ...], cwd: Path, env: Mapping[str, str]) -> None:
        self._server = _server()
        self._said = [Path(tempfile.mkstemp(prefix=f"circuitkit-{name}-")[1]) for name in ("stdout", "stderr")]
        stdout, stderr = map(str, self._said)
        self.args, self.returncode = args, None
        order = {"args": args, "cwd": str(cwd), "env": dict(env), "stdout": stdout, "stderr": stderr}
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.returncode = int(self._answer())
        return self.returncode

    def send_signal(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)

    def finished(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What it said and how it ended. Kills it where that takes too long."""
        late = self.returncode is None and not select.select([self._server.stdout], [], [], timeout)[0]
        if late:
            self.send_signal(signal.SIGKILL)
        self.returncode = int(self._answer()) if self.returncode is None else self.returncode
        stdout, stderr = (path.read_text() for path in self._said)
        for path in self._said:
            path.unlink()
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout, stdout, stderr)
        return subprocess.CompletedProcess(self.args, self.returncode, stdout, stderr)

    def _answer(self) -> bytes:
        line = self._server.stdout.readline()
        assert line, f"the server ended with {self._server.wait()}"
        return line


@cache
def _server() -> subprocess.Popen[bytes]:
    # Without a buffer, because a line that waits in one is not seen by select.
    # With one thread, because a process with several must not be forked.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)
    atexit.register(lambda: (server.stdin.close(), server.wait(60)))
    return server


def started(*args: str, cwd: Path, **env: str) -> Command:
    return Command(args, cwd, {**os.environ, **env})


def circuitkit(*args: str, cwd: Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    return started(*args, cwd=cwd, **env).finished(timeout)


def fresh(*args: str, cwd: Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own from the start."""
    return subprocess.run([*CLI, *args], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=timeout)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
