"""Jobs: what ``circuitkit job=<name>`` does.

A job is a function ``run(config)`` in a file here, and a YAML in conf/job that names it.
Nothing else has to know of it.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from circuitkit.config import function


def run(config: DictConfig) -> Any:
    """Runs the job that the configuration names, and returns the number that it has for a sweeper, if any."""
    return function(config.job)(config)
