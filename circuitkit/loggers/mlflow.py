"""MlflowLogger: a run on an MLflow server. The only file that imports mlflow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from circuitkit.core.errors import ConfigError
from circuitkit.core.records import Artifact, TableArtifact
from circuitkit.loggers.base import Logger, Status
from circuitkit.loggers.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_VALUE, _MAX_PARAMS, _MAX_METRICS = 6000, 100, 500  # characters of a value, and entries of a request, that MLflow accepts
_FLUSH_SECONDS = 5.0
_RETRIES = "1"


class MlflowLogger(Logger):
    """Settings as parameters, numbers as metrics, texts as tags, tables and circuits as artifacts of an MLflow run.

    Steps are sent a few hundred at a time. After the first error the server is left alone, so that a run does not wait for it again.

    Attributes:
        tracking_uri: Of the server; None follows ``MLFLOW_TRACKING_URI``.
        experiment: Name of the MLflow experiment; made if there is none.
        group: What the runs of one sweep have in common, as the tag ``group``.
        name: Of the run; None takes the name that circuitkit gives it.
        tags: Labels to filter by.
        timeout: Seconds to wait for an answer of the server.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "circuitkit",
        group: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        timeout: int = 10,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.group = group
        self.name = name
        self.tags = dict(tags or {})
        self.timeout = timeout
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._waiting: list[tuple[str, float, int, int]] = []  # key, value, milliseconds, step
        self._flushed = 0.0
        self._broken = False

    def log_config(self, name: str, settings: Mapping[str, Any]) -> None:
        """Starts the MLflow run.

        Raises:
            ConfigError: The package is not installed.
        """
        # MLflow is told what circuitkit measured, and nothing about its use. Its own defaults wait for many minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self.timeout))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
        except ImportError as error:
            raise ConfigError(
                f"logger=mlflow needs the package mlflow, which cannot be imported ({error}). Install it with "
                "`pip install circuitkit-nnsight[mlflow]`, or leave the logger out."
            ) from error
        with self._reporting():
            client = MlflowClient(tracking_uri=self.tracking_uri)
            tags = self.tags | ({"group": self.group} if self.group else {})
            run = client.create_run(self._experiment_id(client), tags=tags, run_name=self.name or name)
            self._client, self._run_id, self._flushed = client, run.info.run_id, time.monotonic()
            params = [Param(key, value[:_MAX_VALUE]) for key, value in _flat(redacted(settings))]
            for start in range(0, len(params), _MAX_PARAMS):
                client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def log_metrics(self, metrics: Mapping[str, float | int | str | bool], step: int | None = None) -> None:
        """Adds numbers at that step, or at 0 where they belong to the whole run. Texts become tags there."""
        if self._broken:
            return
        now = int(time.time() * 1000)
        self._waiting += [(key, float(value), now, step or 0) for key, value in metrics.items() if not isinstance(value, str)]
        if step is None:
            with self._reporting() as client:
                for key, value in metrics.items():
                    if isinstance(value, str):
                        client.set_tag(self._run_id, key, value)
        if step is None or len(self._waiting) >= _MAX_METRICS or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def log_artifact(self, artifact: Artifact) -> None:
        """Sends a table as a JSON file of columns and rows, which MLflow shows as a table, and a file as it is."""
        if self._broken:
            return
        with self._reporting() as client:
            if isinstance(artifact, TableArtifact):
                columns = list(artifact.rows[0]) if artifact.rows else []
                body = {"columns": columns, "data": [[row[column] for column in columns] for row in artifact.rows]}
                client.log_text(self._run_id, json.dumps(body), f"{artifact.name}.json")
            else:
                client.log_text(self._run_id, artifact.text, artifact.name)

    def finalize(self, status: Status) -> None:
        """Ends the MLflow run. Does nothing where it was never started, or the server is left alone."""
        if self._client is None or self._broken:
            return
        self._flush()
        with self._reporting() as client:
            client.set_terminated(self._run_id, _STATUS[status])
        self._client = None

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        try:
            return client.create_experiment(self.experiment)
        except MlflowException:  # another job of the sweep was faster
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return found.experiment_id

    def _flush(self) -> None:
        from mlflow.entities import Metric

        with self._reporting() as client:
            while self._waiting:
                client.log_batch(self._run_id, metrics=[Metric(*each) for each in self._waiting[:_MAX_METRICS]])
                del self._waiting[:_MAX_METRICS]
        self._flushed = time.monotonic()

    @contextmanager
    def _reporting(self) -> Iterator[Any]:
        """The client; after its first error it is not used again."""
        try:
            yield self._client
        except Exception:
            self._broken = True
            raise


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, settings if isinstance(settings, str) else json.dumps(settings)
