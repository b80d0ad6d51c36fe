"""What there is to choose from: the files of conf/ and of plugins, a line each, without loading any of it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console

ORDER = ("job", "model", "task", "question", "patcher", "metric", "method", "units", "engine", "callback", "logger", "sweep")


def run(config: DictConfig) -> None:
    """Prints every choice with the first line of its file's comment."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for group in groups():
        console.print(f"{group}=")
        for name in choices(group):
            console.print(f"  {name:<20} {first_comment(group, name)}".rstrip())


def groups() -> list[str]:
    """The groups of the configuration: the known ones first, then those that plugins add."""
    found = [name for name in _loader().list_groups("") if name != "hydra"]
    return [name for name in ORDER if name in found] + sorted(set(found) - set(ORDER))


def choices(group: str) -> list[str]:
    """The names that a group can be set to."""
    return sorted(_loader().get_group_options(group))


def first_comment(group: str, name: str) -> str:
    """The first line of comment in a file of the configuration."""
    for text in _texts(f"{group}/{name}.yaml"):
        for line in text.splitlines():
            if line.startswith("#") and "@package" not in line:
                return line.strip("# ")
    return ""


def _texts(file: str) -> Iterator[str]:
    for element in _loader().get_search_path().get_path():
        scheme, _, place = (element.path if "://" in element.path else f"file://{element.path}").partition("://")
        if place and scheme in ("file", "pkg"):
            found = (Path(place) if scheme == "file" else resources.files(place)).joinpath(file)
            if found.is_file():
                yield found.read_text(encoding="utf-8")


def _loader() -> Any:  # Hydra does not name the type in public
    return GlobalHydra.instance().config_loader()
