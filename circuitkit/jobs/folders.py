"""What a run folder says about its run, and one that says nothing. Read leniently: whatever is missing or damaged is left out. It loads
no torch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from circuitkit.core.errors import ConfigError
from circuitkit.storage import run_folder

LOG = "run.log"
RESULTS = ("circuit.json", "scores.json")


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers that belong to the whole run, such as ``circuit/score``."""
    found: dict[str, Any] = {}
    for row in run_folder.rows(folder):
        if row.get("step") is None:
            found |= {key: value for key, value in row.items() if key not in ("step", "time")}
    return found


def content_hash(folder: Path) -> str | None:
    """The content hash of the run that left its result here."""
    for name in RESULTS:
        provenance = run_folder.mapping(folder / name).get("provenance")
        if isinstance(provenance, dict) and "content_hash" in provenance:
            return str(provenance["content_hash"])
    return None


def not_writable(error: BaseException) -> ConfigError | None:
    """What it means that Hydra could not make the folder of a run or open its log; None for any other error."""
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.filename is not None):
        found = found.__cause__
    if not isinstance(found, OSError):
        return None
    return ConfigError(
        f"Expected to be able to write the folder of the run, but {found.filename} cannot be made ({found.strerror}). Choose another one "
        "with dir=..., or correct its permissions."
    )


def leave_no_log_alone(folder: Path) -> None:
    """Removes the folder of a command that was refused before it left anything but its log."""
    if [path.name for path in folder.glob("*")] != [LOG]:
        return
    for handler in [each for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]:
        if Path(handler.baseFilename) == folder / LOG:
            logging.getLogger().removeHandler(handler)
            handler.close()
    try:
        (folder / LOG).unlink()
        folder.rmdir()
        if folder.parent.name == "runs":
            folder.parent.rmdir()
    except OSError:  # other runs are there
        return
