"""The command line: ``circuitkit group=name group.field=value``, read by Hydra. It loads no torch; jobs do."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from circuitkit import jobs, plugins
from circuitkit.arguments import arranged
from circuitkit.config import conf_dir, in_words
from circuitkit.core.errors import ConfigError, FailedElsewhere, UserError
from circuitkit.jobs import folders, launch, outcome

log = logging.getLogger("circuitkit")

USER_ERROR, CONFIG_ERROR, OUR_BUG, INTERRUPTED, TERMINATED = 1, 2, 70, 130, 143

_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"

_failures: list[Exception] = []  # of the jobs of this process, already reported


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C: the run is marked as interrupted and its files are closed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: Of the command line; those of the process if None. Given ones make a command in a process that goes on after it.

    Raises:
        SystemExit: The command failed, which it has said.
    """
    if arguments is not None:
        sys.argv[1:] = arguments
        _failures.clear()
    debug = "debug=true" in sys.argv or _FULL_ERROR
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, so that every error is worded here
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.argv[1:] = arranged([*sys.argv[1:], *launch.arguments()])
        plugins.register()
        with outcome.launching():
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(_job)()
    except KeyboardInterrupt as stop:
        _say("Stopped before the end. What was written so far stays where it is.")
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    except outcome.JobFailed as failure:
        sys.exit(_report_sweep([{"error": failure.sentence, "exit_code": failure.exit_code}]))
    except Exception as error:
        # Where every job has failed, a sweeper that looks for the best one fails too, which says less.
        sys.exit(_report_sweep([]) if outcome.failures() else _report(error, debug))
    if outcome.failures():  # a sweeper such as Optuna may go on in spite of them
        sys.exit(_report_sweep([]))
    if _failures:
        sys.exit(_exit_code(_failures[0]))


def _job(config: DictConfig) -> Any:
    """One job of the command line, or one of a sweep, which may run in another process. A failing job of a sweep fails alone."""
    with outcome.recorded(lambda error: (_one_line(in_words(error) or error), _exit_code(error))):
        try:
            return jobs.run(config)
        except FailedElsewhere:
            return None
        except Exception as error:
            known = in_words(error)
            if known is None or config.debug:
                log.error("".join(traceback.format_exception(error)).rstrip())
            log.error(_one_line(known or error))
            _failures.append(error)
            if known is not None:
                folders.leave_no_log_alone(Path(HydraConfig.get().runtime.output_dir))
            if outcome.in_sweep():  # Hydra keeps it, runs the other jobs, and raises it at the end
                raise


def _report(error: Exception, debug: bool) -> int:
    error = folders.not_writable(error) or error
    known = in_words(error)
    if debug or known is None:
        traceback.print_exception(error)
    _say(_one_line(known or error))
    return _exit_code(error)


def _report_sweep(caught: list[dict[str, Any]]) -> int:
    failed = outcome.failures() or caught
    _say(f"{len(failed)} of the sweep's jobs failed, the others are done. The first failure: {failed[0]['error']}")
    return failed[0]["exit_code"]


def _exit_code(error: Exception) -> int:
    known = in_words(error)
    return OUR_BUG if known is None else CONFIG_ERROR if isinstance(known, ConfigError) else USER_ERROR


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"This is a bug of circuitkit, please report it: {type(error).__name__}: {text}"


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler that says it twice would cut the tidying up short
    raise Terminated


if __name__ == "__main__":
    main()
