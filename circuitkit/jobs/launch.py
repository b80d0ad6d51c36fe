"""Launches of several processes: only the first one speaks and writes. It loads no torch; ``models/processes.py`` joins them."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile


def arguments() -> list[str]:
    """What a process that is not the first of its launch adds to the command line, so that it leaves no folder and no log behind.

    From then on its standard output is not shown either. Errors still are.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2 or int(os.environ.get("RANK") or 0) == 0:
        return []
    folder = tempfile.mkdtemp(prefix="circuitkit-process-")  # a run wants a folder, so it gets one that goes with the process
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    silence = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process
    sys.stdout = silence
    places = [f"{key}={folder}" for key in ("hydra.run.dir", "hydra.sweep.dir", "finished_in")]
    return ["hydra/job_logging=none", "hydra/hydra_logging=none", *places]
