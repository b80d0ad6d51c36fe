"""Has everything imported that jobs import, and forks itself for every command that it reads: see ``commands_for_tests.py``.

Each command is a process of its own from then on, with its folder, its environment, its standard streams and its way to end.
"""

import beartype  # noqa: F401, I001  before nnsight

import importlib
import json
import os
import pkgutil
import sys
import threading
from pathlib import Path

import circuitkit.cli
import circuitkit.jobs
import circuitkit.report

for package in (circuitkit.jobs, circuitkit.report):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def become(order):
    """Makes this process what a new one would be that was started so."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[:0] = filter(None, order["env"].get("PYTHONPATH", "").split(os.pathsep))
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in order["env"]
    sys.argv = ["circuitkit", *order["args"]]


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    assert threading.active_count() == len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            become(json.loads(line))
            answers.close()
            return circuitkit.cli.main()
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
