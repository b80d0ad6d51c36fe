"""The settings of a run that is gone on with, as its folder holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from circuitkit.core.errors import ConfigError
from circuitkit.loggers.jsonl import CONFIG
from circuitkit.loggers.redaction import REMOVED
from circuitkit.storage.yaml_text import read_yaml

_PARTS = {"task", "model", "method", "patcher", "metric", "engine"}


def saved(config: DictConfig) -> DictConfig:
    """The configuration of the run to go on with, under what this command line says.

    Its folder may come from elsewhere, so it cannot say itself whose code it may name (``allow_targets``), and nothing in it is looked up.

    Args:
        config: Of this command line; ``resume`` is the folder.

    Raises:
        ConfigError: It cannot be read, or lacks a secret.
    """
    path = Path(str(config.resume)) / CONFIG
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("resume goes on with one run, in its own folder. Leave out -m, and give one folder a command.")
    values = read_yaml(path, "settings")
    if not isinstance(values, dict) or not values.keys() >= _PARTS:
        raise ConfigError(f"Expected the settings of a run in {path}, found something else. Start a new run in another folder.")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    made = OmegaConf.create(literal(plain | values))
    for override in ("allow_targets", *HydraConfig.get().overrides.task):
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        OmegaConf.update(made, key, OmegaConf.select(config, key), merge=False, force_add=True)
    made.resume = None
    for key in _removed(OmegaConf.to_container(made)):
        raise ConfigError(f"{key} was a secret, so {path} does not hold it. Give it once more: resume={config.resume} {key}=...")
    return made


def literal(value: Any) -> Any:
    """Plain values in which ``${`` is a text like any other."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    # A backslash before it is taken for an escape, unless it is doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _removed(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _removed(inner, f"{key}.{name}" if key else str(name))
    elif value == REMOVED:
        yield key
