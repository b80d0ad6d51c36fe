"""Trackers for real: TensorBoard's own reader, an MLflow server on SQLite, and servers that refuse, hang or break."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from circuitkit.core.errors import ConfigError
from circuitkit.core.records import TableArtifact, TextArtifact
from circuitkit.loggers import LoggerGroup, MlflowLogger, TensorBoardLogger

SETTINGS = {"task": {"name": "months", "n": 4}, "keep": [], "hf_token": "SECRET", "long": "x" * 7000}
ROWS = [{"node": "a0.h0", "score": 90.5}, {"score": None, "node": "m0|"}]


def log_a_run(logger, status="finished"):
    logger.log_config("months-tiny", SETTINGS)
    for step in range(3):
        logger.log_metrics({"step/score": 90.5 + step, "step/node": f"a0.h{step}", "step/kept": step == 1}, step=step)
    logger.log_metrics({"circuit/score": 98.25, "circuit/size": 5, "circuit/nodes": "a0.h0"})
    logger.log_artifact(TableArtifact("scores", ROWS))
    logger.log_artifact(TableArtifact("empty", []))
    logger.log_artifact(TextArtifact("circuit.json", json.dumps({"nodes": ["a0.h0"]})))
    logger.finalize(status)
    logger.finalize("failed")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# TensorBoard


def test_tensorboard_reads_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_run(TensorBoardLogger(tmp_path / "events"))
    found = EventAccumulator(str(tmp_path / "events"))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("step/score")] == [(0, 90.5), (1, 91.5), (2, 92.5)]
    assert [each.value for each in found.Scalars("step/kept")] == [0.0, 1.0, 0.0]
    assert [each.value for each in found.Scalars("circuit/size")] == [5.0]
    text = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "step/node" not in " ".join(text), "a text a step is left to metrics.jsonl"
    assert text["status/text_summary"] == "finished"
    assert "name: months" in text["config/text_summary"] and "SECRET" not in text["config/text_summary"]
    assert text["scores/text_summary"].splitlines() == ["| node | score |", "| --- | --- |", "| a0.h0 | 90.5 |", "| m0\\| | None |"]
    assert '{"nodes": ["a0.h0"]}' in text["circuit.json/text_summary"]


@pytest.mark.parametrize(("package", "logger"), [("tensorboard", TensorBoardLogger("events")), ("mlflow", MlflowLogger())])
def test_a_missing_package_is_named(package, logger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install circuitkit-nnsight\[{package}\]"):
        logger.log_config("run", {})
    assert not list(tmp_path.iterdir())


# MLflow


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """A server with a SQLite store, on loopback, for the tests of this file."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
    here = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *store, *here]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **quiet}, start_new_session=True
        )
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)  # the group that was started just now: the server and its worker
            process.wait(30)


def wait_until_healthy(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_mlflow_has_what_was_logged(mlflow_server, tmp_path):
    from mlflow import MlflowClient

    logger = MlflowLogger(mlflow_server, experiment="planted", group="sweep-7", tags={"kind": "tiny"})
    log_a_run(logger)
    client = MlflowClient(mlflow_server)
    (run,) = client.search_runs([client.get_experiment_by_name("planted").experiment_id])
    assert (run.info.run_name, run.info.status) == ("months-tiny", "FINISHED")
    assert {key: run.data.tags[key] for key in ("group", "kind", "circuit/nodes")} == {
        "group": "sweep-7", "kind": "tiny", "circuit/nodes": "a0.h0",
    }  # fmt: skip
    assert run.data.params["task.n"] == "4" and run.data.params["keep"] == "[]" and run.data.params["hf_token"] == "<removed>"
    assert len(run.data.params["long"]) == 6000
    history = client.get_metric_history(run.info.run_id, "step/score")
    assert [(each.step, each.value) for each in history] == [(0, 90.5), (1, 91.5), (2, 92.5)]
    assert run.data.metrics["circuit/score"] == 98.25
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"scores.json", "empty.json", "circuit.json"}
    downloaded = client.download_artifacts(run.info.run_id, "scores.json", str(tmp_path))
    with open(downloaded) as file:
        assert json.load(file) == {"columns": ["node", "score"], "data": [["a0.h0", 90.5], ["m0|", None]]}


@pytest.mark.slow
@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_mlflow_knows_how_a_run_ended(mlflow_server, status, expected):
    from mlflow import MlflowClient

    log_a_run(MlflowLogger(mlflow_server, experiment=status), status)
    client = MlflowClient(mlflow_server)
    (run,) = client.search_runs([client.get_experiment_by_name(status).experiment_id])
    assert run.info.status == expected


@pytest.mark.slow
def test_a_sweep_is_tracked_by_all_of_them(mlflow_server, tmp_path):
    """The command line, with every tracker at once, and one group for the sweep."""
    from mlflow import MlflowClient

    both = ["logger=[mlflow,tensorboard]"]
    settings = [*both, f"logger.mlflow.tracking_uri={mlflow_server}", "logger.mlflow.experiment=swept", "task.n=4", "dir=a/sweep"]
    command = [sys.executable, "-m", "circuitkit.cli", "-m", "method.max_sweeps=1", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    client = MlflowClient(mlflow_server)
    (run,) = client.search_runs([client.get_experiment_by_name("swept").experiment_id])
    assert (run.data.tags["group"], run.data.params["method.threshold"], run.info.status) == ("a/sweep", "0.8", "FINISHED")
    steps = client.get_metric_history(run.info.run_id, "step/score")
    assert [each.step for each in steps] == list(range(len(steps))) and len(steps) == run.data.metrics["run/evaluations"]
    assert len(list(tmp_path.glob("a/sweep/*/tensorboard/events.*"))) == 1


# Servers that do not do their part


class Broken(BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def answer(self):
        self.server.asked += 1
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *args):
        pass


class Hanging(Broken):
    """Takes a request and never answers."""

    def answer(self):
        self.server.asked += 1
        self.server.stop.wait(60)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer


@pytest.fixture(params=[Broken, Hanging, None], ids=["breaks", "hangs", "refuses"])
def bad_server(request):
    """A local server and its address; for a refusal, an address at which nobody listens."""
    if request.param is None:
        yield None, f"http://127.0.0.1:{free_port()}"
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    server.asked, server.stop, server.daemon_threads, server.block_on_close = 0, threading.Event(), True, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_bad_mlflow_server_is_reported_once_and_left_alone(bad_server, caplog):
    server, url = bad_server
    group = LoggerGroup([MlflowLogger(url, timeout=1)])
    started = time.monotonic()
    log_a_run(group)
    assert time.monotonic() - started < 30
    (line,) = (record.getMessage() for record in caplog.records if record.name == "circuitkit.loggers.dispatch")
    assert line.startswith("MlflowLogger failed in log_config")
    assert group.failures == {0: 1}
    assert server is None or 0 < server.asked < 8


ONE_RUN = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from circuitkit.loggers import LoggerGroup, WandbLogger
group = LoggerGroup([WandbLogger(folder="runs", init_timeout=2.0)])
group.log_config("run", {"a": 1})
group.log_metrics({"x": 1.5}, step=0)
group.finalize("finished")
print(json.dumps(group.failures))
"""


@pytest.mark.slow
def test_a_bad_wandb_server_ends_offline(bad_server, tmp_path):
    server, url = bad_server
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG")) and key != "NETRC"}
    here = {"HOME": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB__SERVICE_WAIT": "30"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUN],
        cwd=tmp_path,
        env={**clean, **here},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
    ours = [line for line in done.stderr.splitlines() if not line.startswith("wandb:")]
    assert len(ours) == 1 and "recorded offline" in ours[0], done.stderr
    assert list(tmp_path.glob("runs/wandb/offline-run-*/run-*.wandb"))
    assert time.monotonic() - started < 60
    assert server is None or server.asked > 0
