"""What became of each job of a sweep: ``job.json`` in its folder, whatever process ran it. It loads no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from circuitkit.storage import run_folder
from circuitkit.storage.run_folder import JOB

_began: dict[str, Any] = {}  # folder and time of the sweep that this process launched


class JobFailed(Exception):
    """A job of a sweep failed, in words. Unlike the error itself it can always be sent to the process that launched the job."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence, exit_code)
        self.sentence = sentence
        self.exit_code = exit_code


class SweepWatch(Callback):
    """Told by Hydra when a sweep begins, in the process that launches its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes where and when. Also keeps Ray, should it be the launcher, from reporting its use to its makers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _began.update(folder=Path(config.hydra.sweep.dir), time=time.time())


@contextmanager
def launching() -> Iterator[None]:
    """Around Hydra. Removes the ``multirun.yaml`` that it leaves: its overrides and settings may hold secrets, which ours leave out."""
    _began.clear()  # of an earlier command of this process
    try:
        yield
    finally:
        if _began:
            (_began["folder"] / "multirun.yaml").unlink(missing_ok=True)


def in_sweep() -> bool:
    """Whether the running job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def recorded(in_words: Callable[[Exception], tuple[str, int]]) -> Iterator[None]:
    """Keeps ``job.json`` while a job of a sweep runs; does nothing for a single run.

    Args:
        in_words: The sentence and the exit code for an error.

    Raises:
        JobFailed: In place of the job's own error, in a sweep.
    """
    if not in_sweep():
        yield
        return
    from circuitkit.loggers.redaction import redacted

    hydra = HydraConfig.get()
    overrides = redacted(list(hydra.overrides.task))
    note(number=hydra.job.num, overrides=overrides, status="running", started=time.time())
    try:
        yield
    except Exception as error:
        sentence, code = in_words(error)
        note(status="failed", error=sentence, exit_code=code, ended=time.time())
        raise JobFailed(sentence, code) from None
    except BaseException:
        note(status="interrupted", ended=time.time())
        raise
    note(ended=time.time(), status="skipped" if "same_as" in run_folder.job(Path(hydra.runtime.output_dir)) else "finished")


def note(**fields: Any) -> None:
    """Adds to the ``job.json`` of the running job, if it is one of a sweep. A status ``running`` begins it anew."""
    if not in_sweep():
        return
    folder = Path(HydraConfig.get().runtime.output_dir)
    body = fields if fields.get("status") == "running" else run_folder.job(folder) | fields
    partial = folder / f"{JOB}.partial"
    partial.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / JOB)


def failures() -> list[dict[str, Any]]:
    """The failed jobs of the sweep that this process launched, by number, wherever they ran."""
    if not _began:
        return []
    found = [run_folder.job(path.parent) for path in _began["folder"].glob(f"*/{JOB}")]
    # A folder that is used again may hold jobs of an earlier sweep; a second is for file systems and clocks of other machines.
    mine = [job for job in found if job.get("status") == "failed" and job.get("started", 0) >= _began["time"] - 1]
    return sorted(mine, key=lambda job: job.get("number", 0))
