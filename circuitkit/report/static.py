"""Figures as SVG files, drawn by an installed Chrome or Chromium that kaleido drives, all in one session and without a network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuitkit.report.blocks import Drawing

# Mathjax would be asked for from a network, and the browser itself would call home: a proxy that is not there stops both.
_OFFLINE = {"mathjax": False, "proxy_server": "127.0.0.1:9"}
_TIMEOUT = 60.0  # seconds for all of them: a browser that hangs must not hold the report
_INSTALL = (
    "Figures as SVG need the package kaleido (pip install circuitkit-nnsight[report]) and Chrome or Chromium (for example apt-get install "
    "chromium, or kaleido_get_chrome)"
)


def write_svgs(drawings: Sequence[Drawing], folder: Path) -> tuple[list[Path], str]:
    """Writes each drawing as ``<name>.svg``.

    Returns:
        The files, and a sentence on why some are missing, or nothing.
    """
    if not drawings:
        return [], ""
    try:
        import kaleido
    except ImportError as error:
        return [], f"{_INSTALL}; {error}. So they were left out."
    logging.getLogger("kaleido").setLevel(logging.ERROR)
    logging.getLogger("choreographer").setLevel(logging.ERROR)
    paths = {drawing.name: folder / f"{drawing.name}.svg" for drawing in drawings}
    figures = [{"fig": drawing.plain, "path": str(paths[drawing.name]), "opts": {"format": "svg"}} for drawing in drawings]
    for path in paths.values():  # of an earlier report
        path.unlink(missing_ok=True)
    try:
        errors = asyncio.run(asyncio.wait_for(_write(kaleido, figures), _TIMEOUT))
        reason = f"{len(errors)} of them failed: {_line(errors[0])}" if errors else ""
    except Exception as error:  # whatever a browser throws, the page is worth more
        reason = _line(error)
    written = [path for path in paths.values() if path.is_file() and path.stat().st_size]
    return written, f"{_INSTALL}; here: {reason}. The rest of the report was made." if reason else ""


async def _write(kaleido: Any, figures: list[dict[str, Any]]) -> Sequence[Exception]:
    class OnePage(kaleido.Kaleido):  # type: ignore[misc]
        async def _return_kaleido_tab(self, tab: Any) -> None:
            await self.tabs_ready.put(tab)  # to load plotly.js anew for each figure would take most of the time

    async with OnePage(n=1, **_OFFLINE) as browser:
        return await browser.write_fig_from_object(figures) or ()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
