"""What is typed, put as Hydra reads it: overrides and options in any order, and text in any script. It loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from circuitkit.core.errors import ConfigError

# Options of Hydra that are followed by a value; the last one only by one of these.
_WITH_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"}
_INFO, _INFOS = {"--info", "-i"}, {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
_RERUN = "--experimental-rerun"

# `~logger` would leave the runs without the setting that says which ones there are; this one has none besides the run folder.
_NO_LOGGER, _FOLDER_ALONE = "~logger", "logger=jsonl"

_QUOTED_OR_FOREIGN = re.compile(r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,\[\]{}():=]*[^\x00-\x7f,\[\]{}():=][^,\[\]{}():=]*""")


def arranged(arguments: Sequence[str]) -> list[str]:
    """The same command with the overrides before the options, each as Hydra can read it.

    Raises:
        ConfigError: It asks to open a file that can run code.
    """
    overrides: list[str] = []
    options: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.partition("=")[0] == _RERUN:
            raise ConfigError(f"{_RERUN} opens a pickle, which can run code, so it is not followed. Go on with a run by resume=<folder>.")
        if not word.startswith("-"):
            overrides.append(_FOLDER_ALONE if word == _NO_LOGGER else readable(word))
            continue
        options.append(word)
        if rest and (word in _WITH_VALUE or (word in _INFO and rest[0] in _INFOS)):
            options.append(rest.pop(0))
    return [*overrides, *options]


def readable(override: str) -> str:
    """An override in which text that is not ASCII stands in quotes, which Hydra's grammar wants."""
    key, equals, value = override.partition("=")
    if value.isascii() or "\\" in value:
        return override
    if not re.search(r"[,\[\]{}()'\"]", re.sub(r"\$\{[\w.]+\}", "", value)):
        return f"{key}{equals}'{value}'"
    return key + equals + _QUOTED_OR_FOREIGN.sub(lambda found: _in_quotes(found[0]), value)


def _in_quotes(text: str) -> str:
    return text if text[0] in "'\"" or "'" in text or '"' in text else f"'{text.strip()}'"
