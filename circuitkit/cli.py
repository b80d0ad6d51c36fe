"""The command line: ``circuitkit group=name group.field=value``, read by Hydra. It loads no torch; jobs do."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from circuitkit import jobs, plugins
from circuitkit.config import conf_dir, in_words
from circuitkit.core.errors import ConfigError, UserError

log = logging.getLogger("circuitkit")

USER_ERROR, CONFIG_ERROR, OUR_BUG, INTERRUPTED, TERMINATED = 1, 2, 70, 130, 143

_failures: list[Exception] = []  # of the jobs of this process, already reported


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C: the run is marked as interrupted and its files are closed."""


def main() -> None:
    """Entry point of the console script."""
    debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, so that every error is worded here
    signal.signal(signal.SIGTERM, _terminate)
    try:
        plugins.register()
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_job)()
    except KeyboardInterrupt as stop:
        _say("Stopped before the end. What was written so far stays where it is.")
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    except Exception as error:
        sys.exit(_report(error, debug))
    if _failures:
        sys.exit(_exit_code(_failures[0]))


def _job(config: DictConfig) -> None:
    """One job of the command line, or one of a sweep. A failing job of a sweep fails alone."""
    try:
        jobs.run(config)
    except Exception as error:
        known = in_words(error)
        if known is None or config.debug:
            log.error("".join(traceback.format_exception(error)).rstrip())
        log.error(_one_line(known or error))
        _failures.append(error)
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra keeps it, runs the other jobs, and raises it at the end
            raise


def _report(error: Exception, debug: bool) -> int:
    known = in_words(error)
    reported = error in _failures
    if not reported and (debug or known is None):
        traceback.print_exception(error)
    sentence = _one_line(known or error)
    if reported:
        sentence = f"{len(_failures)} of the sweep's jobs failed, the others are done. The first failure: {sentence}"
    _say(sentence)
    return _exit_code(error)


def _exit_code(error: Exception) -> int:
    known = in_words(error)
    return OUR_BUG if known is None else CONFIG_ERROR if isinstance(known, ConfigError) else USER_ERROR


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"This is a bug of circuitkit, please report it: {type(error).__name__}: {text}"


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
