"""TensorBoardLogger: a run as TensorBoard event files. The only file that needs tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from circuitkit.core.errors import ConfigError
from circuitkit.core.records import Artifact, TableArtifact
from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.redaction import redacted

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Numbers as scalars; config, tables and files as texts.

    Attributes:
        folder: Where the event files are written. TensorBoard takes each folder for a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Opens the event file.

        Raises:
            ConfigError: The package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logger=tensorboard needs the package tensorboard, which cannot be imported ({error}). Install it with "
                "`pip install circuitkit-nnsight[tensorboard]`, or leave the logger out."
            ) from error
        self._writer = SummaryWriter(str(self.folder))
        self._writer.add_text("config", _code(yaml.safe_dump(redacted({"name": name, **settings}), sort_keys=False, allow_unicode=True)))

    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Adds numbers at that step, or at 0 where they belong to the whole run. Texts are added only there."""
        writer = self._started()
        for key, value in metrics.items():
            if not isinstance(value, str):
                writer.add_scalar(key, float(value), step or 0)
            elif step is None:
                writer.add_text(key, value)

    def log_artifact(self, artifact: Artifact) -> None:
        """Adds a table as a table of Markdown, and a file as code."""
        text = _markdown(artifact) if isinstance(artifact, TableArtifact) else _code(artifact.text)
        self._started().add_text(artifact.name, text)

    def finalize(self, status: Status) -> None:
        """Writes how the run ended and closes the file. Does nothing where it was never opened."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.add_text("status", status)
        finally:
            writer.close()

    def _started(self) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("the event file is not open: log_config comes first and finalize last")
        return self._writer


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown(table: TableArtifact) -> str:
    if not table.rows:
        return "no rows"
    columns = list(table.rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in table.rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
