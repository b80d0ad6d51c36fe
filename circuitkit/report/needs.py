"""Whether the packages that draw are there."""

from __future__ import annotations

from importlib import import_module

from circuitkit.core.errors import ConfigError

_PACKAGES = ("plotly", "jinja2", "networkx")


def check_installed() -> None:
    """Refuses in words where a package is missing that a report cannot be made without.

    Raises:
        ConfigError: One cannot be imported.
    """
    for name in _PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"job=report needs the package {name}, which cannot be imported ({error}). Install what reports need with "
                "`pip install circuitkit-nnsight[report]`."
            ) from error
