"""WandbLogger: a run on Weights & Biases. The only file that imports wandb."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.records import Artifact, FigureArtifact, TableArtifact
from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.redaction import redacted

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

# W&B is told what circuitkit measured, and nothing about the machine, its packages or its code.
_QUIET = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "host": "",
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
_FINISH_TIMEOUT = 300.0  # seconds; without it a lost network would hold a finished run for ever
_MAX_NAME, _MAX_TAG = 128, 64  # characters that W&B accepts


class WandbLogger(Logger):
    """Config, history, summary, tables and circuits as a W&B run.

    Attributes:
        project: W&B project.
        group: What the runs of one sweep have in common.
        name: Of the run; None takes the name that circuitkit gives it.
        tags: Labels to filter by.
        mode: ``online``, ``offline`` or ``disabled``. None follows ``WANDB_MODE``, and without it is online where you are logged in
            and the server answers, else offline.
        folder: Where the ``wandb`` folder with the local copy is made.
        entity: W&B user or team; None is your default one.
        init_timeout: Seconds to wait for the server at the start.
        id: Of the W&B run. One that exists is gone on with; None makes a new one. Offline each process of a run leaves a folder of its
            own, all with this id, which ``wandb sync`` puts together in the order of their start.
    """

    def __init__(
        self,
        project: str = "circuitkit",
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        mode: Mode | None = None,
        folder: str | Path = "runs",
        entity: str | None = None,
        init_timeout: float = 20.0,
        id: str | None = None,
    ) -> None:
        if mode is not None and mode not in get_args(Mode):
            raise ConfigError(unknown_choice("W&B mode", mode, get_args(Mode), "Leave it empty to go online only where you are logged in."))
        self.project = project
        self.group = group
        self.name = name
        self.tags = tuple(tags)
        self.mode = mode
        self.folder = Path(folder)
        self.entity = entity
        self.init_timeout = init_timeout
        self.id = id
        self._run: wandb.Run | None = None

    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Starts the W&B run; never asks for a password.

        Raises:
            ConfigError: ``mode`` is online and nobody is logged in.
        """
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers, and a line a try where they do not answer
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        config = redacted(settings)
        wanted = self.mode or os.environ.get("WANDB_MODE") or None
        why_offline = "" if wanted in ("offline", "disabled") else _login_problem(wandb)
        if why_offline and wanted is not None:
            raise ConfigError(
                f"Expected to be logged in to W&B, since its mode is {wanted!r}, but {why_offline}. "
                "Run `wandb login`, set WANDB_API_KEY, or choose the mode 'offline'."
            )
        try:
            self._run = self._init(wandb, wanted or ("offline" if why_offline else "online"), name, config)
        except wandb.errors.Error as error:
            if wanted is not None:
                raise
            why_offline = f"its server did not let us in ({str(error).splitlines()[0]})"
            self._run = self._init(wandb, "offline", name, config)
        self._run.define_metric("*", step_metric="step")
        if why_offline:
            where = Path(self._run.dir).parent
            _log.warning("W&B: %s, so this run is recorded offline. To upload it later: wandb login && wandb sync %s", why_offline, where)
        elif not self._run.offline and self._run.url:
            _log.info("W&B: this run is at %s", self._run.url)

    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Adds to the history at that step, or to the summary where there is none."""
        # "step" is a metric of ours: W&B's own counter only ever grows, while each phase of a run counts from 0.
        if step is None:
            self._started().summary.update(dict(metrics))
        else:
            self._started().log({**metrics, "step": step})

    def log_artifact(self, artifact: Artifact) -> None:
        """Sends a table as a W&B table, a figure as W&B media, and a file as a W&B artifact named after it and the run."""
        import wandb

        run = self._started()
        if isinstance(artifact, TableArtifact):
            columns = list(artifact.rows[0]) if artifact.rows else []
            data = [[row[column] for column in columns] for row in artifact.rows]
            run.log({artifact.name: wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)})
            return
        if isinstance(artifact, FigureArtifact):
            run.log({artifact.name.rpartition(".")[0] or artifact.name: wandb.Plotly(artifact.figure)})
            return
        stem = re.sub(r"[^\w.-]", "-", artifact.name.rpartition(".")[0] or artifact.name)
        sent = wandb.Artifact(f"{stem}-{run.id}", type=artifact.kind)
        with sent.new_file(artifact.name, encoding="utf-8") as file:
            file.write(artifact.text)
        run.log_artifact(sent)

    def finalize(self, status: Status) -> None:
        """Ends the W&B run, as failed unless it finished. Does nothing where it was never started."""
        if self._run is None:
            return
        run, self._run = self._run, None
        run.summary["status"] = status
        run.finish(exit_code=0 if status == "finished" else 1)

    def _init(self, wandb: Any, mode: str, name: str, config: dict[str, Any]) -> wandb.Run:
        settings = {**_QUIET, "init_timeout": self.init_timeout, "finish_timeout": _FINISH_TIMEOUT}
        # W&B may rename the ones that start with x_, and refuses a run for one that it does not know.
        known = {key: value for key, value in settings.items() if key in wandb.Settings.model_fields}
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group[-_MAX_NAME:] if self.group else None,
            name=(self.name or name)[:_MAX_NAME],
            tags=[tag[:_MAX_TAG] for tag in self.tags],
            mode=mode,
            dir=str(self.folder.resolve()),  # the hint on how to upload holds in any directory
            config=config,
            id=self.id,
            resume=None if self.id is None else "allow",
            reinit="create_new",  # leaves alone a run of the user's own, and that of another job in this process
            settings=wandb.Settings(**known),
        )

    def _started(self) -> wandb.Run:
        if self._run is None:
            raise RuntimeError("the W&B run is not open: log_config comes first and finalize last")
        return self._run


def _login_problem(wandb: Any) -> str:
    """Why this process cannot go online, or nothing."""
    if wandb.run is not None and not wandb.run.offline:
        return ""
    try:
        return "" if wandb.login(prompt=False, verify=False) else "nobody is logged in"
    except wandb.errors.Error as error:
        return f"the login cannot be used ({str(error).splitlines()[0]})"
