"""Plugins: other distributions that add models, tasks, patchers and the like to the command line.

A plugin announces a package of YAML files, laid out like conf/, under the entry-point group ``circuitkit.conf``:

    [options.entry_points]
    circuitkit.conf =
        demo = ck_plugin_demo.conf

The YAML names its class with ``_target_``. ``python -m circuitkit.plugins`` shows what is installed.
"""

from __future__ import annotations

from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from circuitkit.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # newer than Python 3.10

GROUP = "circuitkit.conf"


class CircuitkitSearchPath(SearchPathPlugin):
    """Appends the YAML files of every plugin to Hydra's search path. Appended: a plugin can add, and not shadow."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra when the search path is made."""
        for plugin in installed():
            search_path.append(f"circuitkit-plugin-{plugin.name}", f"pkg://{plugin.value}")


def register() -> None:
    """Makes Hydra see the plugins. Calling it twice is harmless."""
    _refuse_duplicates()
    Plugins.instance().register(CircuitkitSearchPath)
    # Hydra copies its whole store for every look-up, of which it then only reads; with launchers installed that is half of `--help`.
    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010  mypy knows no such method


def installed() -> tuple[EntryPoint, ...]:
    """The plugins of this environment, by name."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name))


def packages() -> frozenset[str]:
    """Top-level packages of the plugins, whose classes a ``_target_`` may name."""
    return frozenset(plugin.value.partition(".")[0] for plugin in installed())


def provided(plugin: EntryPoint) -> tuple[str, ...]:
    """What a plugin adds, such as ``patcher/twice``.

    Raises:
        ConfigError: Its package cannot be imported.
    """
    try:
        folder = resources.files(plugin.value)
    except ImportError as error:
        raise ConfigError(
            f"The plugin {plugin.name!r} names the package {plugin.value!r}, which cannot be imported ({error}). Repair or uninstall it."
        ) from error
    return tuple(sorted(_yaml_names(folder)))


def _yaml_names(folder: Traversable, prefix: str = "") -> list[str]:
    names = []
    for item in folder.iterdir():
        if item.is_dir() and not item.name.startswith("__"):
            names += _yaml_names(item, f"{prefix}{item.name}/")
        elif item.name.endswith(".yaml"):
            names.append(prefix + item.name.removesuffix(".yaml"))
    return names


def _refuse_duplicates() -> None:
    owners: dict[str, str] = {}
    for plugin in installed():
        for name in provided(plugin):
            if name in owners:
                raise ConfigError(
                    f"The plugins {owners[name]!r} and {plugin.name!r} both provide {name!r}, so that name is ambiguous. "
                    "Uninstall one of them."
                )
            owners[name] = plugin.name


def main() -> None:
    """Prints each plugin with its distribution, its version and what it adds."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for plugin in installed():
        origin = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown distribution"
        console.print(f"{plugin.name} ({origin}): {', '.join(provided(plugin)) or 'nothing'}")
    if not installed():
        console.print(f"No plugins are installed: no distribution has an entry point in the group {GROUP!r}.")


if __name__ == "__main__":
    main()
