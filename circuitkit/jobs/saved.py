"""The settings of a run that is gone on with, as its folder holds them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from circuitkit.core.errors import ConfigError
from circuitkit.loggers.redaction import REMOVED
from circuitkit.storage.run_folder import CONFIG
from circuitkit.storage.yaml_text import read_yaml

_PARTS = ("task", "model", "method", "patcher", "metric", "engine")

RUNS = "runs"

# What the running command says, and not the folder.
_OURS = ("job", "hydra", "dir", "resume", "overwrite", "rerun", "finished_in", "debug", "allow_targets")

# The texts that a folder may choose in parts that write files or send something. Any other text must be a place that is written anyway.
_HARMLESS = {
    "logger": {"_target_", "project", "experiment", "group", "name", "id", "tags", "mode"},
    "callback": {"_target_"},
    "model": {"_target_", "name", "path", "dtype", "device_map", "revision", "attention", "max_memory", "adapter", "quantization",
              "tp_plan"},
}


def saved(config: DictConfig) -> DictConfig:
    """The configuration of the run to go on with, under what this command line says.

    Its folder may come from elsewhere, so it is data: it cannot say itself whose code it may name (``allow_targets``), nothing in it is
    looked up (``${...}`` is a text like any other), and what it would have written or sent elsewhere must be said again.

    Args:
        config: Of this command line; ``resume`` is the folder.

    Raises:
        ConfigError: It cannot be read, lacks a secret, or asks for something that only the command line may.
    """
    path = Path(str(config.resume)) / CONFIG
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError("resume goes on with one run, in its own folder. Leave out -m, and give one folder a command.")
    values = literal(read_yaml(path, "settings"))
    if not _is_a_run(values):
        raise ConfigError(f"Expected the settings of a run in {path}, found something else. Start a new run in another folder.")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    made = OmegaConf.create(literal(plain) | {key: value for key, value in values.items() if key not in _OURS})
    said = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in HydraConfig.get().overrides.task]
    for key in said:
        OmegaConf.update(made, key, OmegaConf.select(config, key), merge=False, force_add=True)
    made.resume = None
    found: Any = OmegaConf.to_container(made, resolve=True)
    for key in _removed(found):
        raise ConfigError(f"{key} was a secret, so {path} does not hold it. Give it once more: resume={config.resume} {key}=...")
    again = [f"{key}={value}" for key, value in _elsewhere(found, path.parent) if not any(_covers(each, key) for each in said)]
    if again:
        raise ConfigError(
            f"The folder of a run cannot say what is written or sent outside of it and of {RUNS}, or whether a model's own code runs, and "
            f"{path} does. If you want that, say so yourself: resume={config.resume} {' '.join(again)}"
        )
    return made


def literal(value: Any) -> Any:
    """Plain values in which ``${`` is a text like any other."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    # A backslash before it is taken for an escape, unless it is doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _is_a_run(values: Any) -> bool:
    """Whether plain values have the form of settings, whatever they say."""
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        return False
    several = [values.get("logger", {}), values.get("callback") or {}]
    if not isinstance(values.get("name", ""), str) or not all(isinstance(each, dict) for each in (*map(values.get, _PARTS), *several)):
        return False
    parts = [part for each in several if "_target_" not in each for part in each.values()]
    return all(isinstance(part, dict | NoneType) for part in (*parts, values.get("objective")))


def _elsewhere(values: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """What settings say that reaches out of the folder of their run, by key."""
    inside = [os.path.realpath(place) for place in (folder, RUNS)]
    for group, harmless in _HARMLESS.items():
        for key, text in _texts(values.get(group), group, harmless):
            if "\0" in text or not any(Path(os.path.realpath(text)).is_relative_to(place) for place in inside):
                yield key, text
    if values["model"].get("trust_remote_code"):
        yield "model.trust_remote_code", values["model"]["trust_remote_code"]


def _texts(value: Any, key: str, harmless: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every text in plain values, by key, but for the fields of a part that are harmless."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not ("_target_" in value and name in harmless and _is_flat(inner)):
                yield from _texts(inner, f"{key}.{name}", harmless)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key, harmless)
    elif isinstance(value, str):
        yield key, value


def _is_flat(value: Any) -> bool:
    """Whether no part can be inside."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not any(isinstance(each, dict | list) for each in inner) and not (isinstance(value, dict) and "_target_" in value)


def _covers(said: str, key: str) -> bool:
    return key == said or key.startswith(f"{said}.")


def _removed(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _removed(inner, f"{key}.{name}" if key else str(name))
    elif value == REMOVED:
        yield key
