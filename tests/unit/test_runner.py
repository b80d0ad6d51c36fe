"""A whole run: files, provenance, hashes, the order of events, and how failures end."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
import yaml
from models_for_tests import PLANTED, planted_model, planted_prompts

from circuitkit.callbacks import Callback
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.loggers import JsonlLogger, Logger
from circuitkit.methods import IterativePruning, Knockout, RandomCircuit
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Zero
from circuitkit.runner import Runner
from circuitkit.storage import load
from circuitkit.tasks.base import Task


@dataclass
class Toy(Task):
    """Prompts of the planted model, without text."""

    n: int = 6
    seed: int = 0
    filter: bool = False
    name = "toy"

    def prompts(self, tokenizer, *, n=None, seed=None, accept=None):
        prompts = planted_prompts(self.n)
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed))
        prompts = prompts.take(order)
        return prompts if accept is None else prompts.take(accept(prompts))


class Recorder(Logger):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls = []

    def log_config(self, name, settings):
        self.calls.append(("log_config", name))

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", tuple(metrics), step))

    def log_artifact(self, artifact):
        self.calls.append(("log_artifact", artifact.name))

    def finalize(self, status):
        self.calls.append(("finalize", status))


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


class Events(Callback):
    """Notes events, and raises at one of them if asked to."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.heard, self.at, self.error = [], at, error

    def note(self, event, argument):
        self.heard.append(event)
        if event == self.at:
            raise self.error


for _name in EVENTS:
    setattr(Events, _name, lambda self, argument, event=_name: self.note(event, argument))


def run(*, loggers=(), callbacks=(), task=None, model=None, method=None, **parts):
    settings = {"patcher": Mean(), "metric": LogitDiff(), **parts}
    return Runner(loggers, callbacks).run(
        model=model or planted_model(), task=task or Toy(), method=method or IterativePruning(0.8), **settings
    )


def test_the_files_of_a_search(tmp_path):
    result = run(loggers=[JsonlLogger(tmp_path)])
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.yaml", "metrics.jsonl", "status.json", "circuit.json", "scores.parquet"}
    circuit = load(Circuit, tmp_path / "circuit.json")
    assert circuit == result.circuit and circuit.names == PLANTED
    assert circuit.score == pytest.approx(100, abs=1e-3)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step/node" in row]
    assert [(row["step/node"], row["step/kept"], row["step"]) for row in steps] == [(s.node, s.kept, s.order) for s in result.steps]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["method"]["threshold"] == 0.8 and config["patcher"]["means"] == "plain"
    from pyarrow import parquet

    assert [row["node"] for row in parquet.read_table(tmp_path / "scores.parquet").to_pylist()] == [step.node for step in result.steps]


def test_the_files_of_a_method_that_only_scores(tmp_path):
    result = run(loggers=[JsonlLogger(tmp_path)], method=Knockout())
    body = json.loads((tmp_path / "scores.json").read_text())
    assert body["values"] == dict(result.scores.values) and result.circuit is None
    assert {name for name, score in body["values"].items() if score < 50} == set(PLANTED)
    assert body["provenance"]["seed"] == 0 and not (tmp_path / "circuit.json").exists()


def test_provenance_is_complete():
    result = run(task=Toy(seed=5))
    provenance = result.circuit.provenance
    assert provenance["seed"] == 5 and provenance["n_prompts"] == 6
    assert provenance["prompts_hash"] == result.prompts.content_hash()
    assert provenance["content_hash"] == result.info.content_hash and len(result.info.content_hash) == 64
    assert provenance["model"]["name"] == "by-hand" and provenance["model"]["dtype"] == "float32"
    assert provenance["model"]["fingerprint"] == planted_model().fingerprint()
    assert set(provenance["versions"]) == {"python", "circuitkit", "torch", "transformers", "nnsight", "accelerate"}
    assert "unknown" not in provenance["versions"].values()
    assert provenance["settings"]["method"] == {
        "_target_": "circuitkit.methods.iterative_pruning.IterativePruning",
        "threshold": 0.8, "order": "backward", "max_sweeps": None, "keep": [], "speculate": True,
        "units": {"_target_": "circuitkit.engine.units.nodes.Nodes"},
    }  # fmt: skip
    assert set(provenance["settings"]) == {"task", "method", "patcher", "metric", "engine", "model"}
    assert provenance["baseline"] == pytest.approx(result.baseline.clean.mean().item())
    assert provenance["evaluations"] == len(result.steps)
    json.dumps(result.info.settings)


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name in ("one", "two"):
        run(loggers=[JsonlLogger(tmp_path / name)])
    one, two = ((tmp_path / name / "circuit.json").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "change",
    [
        {"task": Toy(seed=1)},
        {"task": Toy(n=5)},
        {"method": IterativePruning(0.7)},
        {"patcher": Zero()},
        {"patcher": Mean("conditional")},
        {"model": planted_model(seed=1)},
        {"engine": ReferenceEngine},
    ],
    ids=["seed", "n", "threshold", "patcher", "means", "weights", "engine"],
)
def test_whatever_changes_the_result_changes_the_hash(change):
    assert run().info.content_hash != run(**change).info.content_hash


def test_events_and_logs_come_in_order():
    recorder, events = Recorder(), Events()
    result = run(loggers=[recorder], callbacks=[events])
    n = len(result.steps)
    middle = ["on_step"] * n
    assert events.heard == ["on_run_start", "on_baseline", *middle, "on_discover_end", "on_evaluate_end", "on_checkpoint", "on_run_end"]
    kinds = [call[0] for call in recorder.calls]
    assert kinds == ["log_config", "log_metrics", *["log_metrics"] * n, "log_metrics", "log_artifact", "log_artifact", "finalize"]
    assert recorder.calls[0][1] == "toy-by-hand-iterative_pruning" and recorder.calls[-1] == ("finalize", "finished")
    assert [call[2] for call in recorder.calls[2 : 2 + n]] == list(range(n))


class SomethingBroke(Exception):
    """Not a user's mistake."""


FAILURES = ["on_run_start", "on_baseline", "on_step", "on_discover_end", "on_evaluate_end", "on_checkpoint"]


@pytest.mark.parametrize("at", FAILURES)
@pytest.mark.parametrize(
    ("error", "status"), [(SomethingBroke("x"), "failed"), (MeasurementError("y"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_failure_ends_the_loggers_and_comes_out_as_it_was(at, error, status):
    recorder, events = Recorder(), Events(at, error)
    with pytest.raises(type(error)) as caught:
        run(loggers=[recorder], callbacks=[events])
    assert caught.value is error
    assert recorder.calls[-1] == ("finalize", status)
    assert [call[0] for call in recorder.calls].count("finalize") == 1
    assert events.heard[-1] == "on_exception" and "on_run_end" not in events.heard


def test_a_failure_before_anything_was_logged(tmp_path):
    class Broken(Toy):
        def prompts(self, *args, **kwargs):
            raise SomethingBroke("no prompts")

    recorder = Recorder()
    with pytest.raises(SomethingBroke, match="no prompts"):
        run(loggers=[recorder, JsonlLogger(tmp_path / "run")], task=Broken())
    assert recorder.calls == [("finalize", "failed")]
    assert not (tmp_path / "run").exists()


def test_a_failed_run_says_so_in_its_folder(tmp_path):
    with pytest.raises(SomethingBroke):
        run(loggers=[JsonlLogger(tmp_path)], callbacks=[Events("on_discover_end", SomethingBroke())])
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert not (tmp_path / "circuit.json").exists()


def test_the_self_check_comes_before_any_score():
    class Liar(Zero):
        def patch(self, act, source, site):
            return 2 * act

    recorder, events = Recorder(), Events()
    with pytest.raises(MeasurementError, match="different logits"):
        run(loggers=[recorder], callbacks=[events], patcher=Liar())
    assert events.heard == ["on_run_start", "on_exception"]
    assert recorder.calls[-1] == ("finalize", "failed")


def test_the_filter_is_used_when_the_task_wants_it():
    assert len(run(task=Toy(filter=True)).prompts) == 6
    model = planted_model()
    with torch.no_grad():
        model.hf.lm_head.weight[3, 0] = 5.5  # token 3 beats the answer where the number is smaller
    result = run(task=Toy(filter=True), model=model)
    logits = model.hf(planted_prompts().clean).logits[:, -1]
    right = int((logits[:, 1] > 5.5).sum())
    assert 0 < len(result.prompts) == right < 6
    assert len(run(task=Toy(filter=False), model=model).prompts) == 6


def test_the_naive_engine_finds_the_same():
    fast, naive = run(), run(engine=ReferenceEngine)
    assert fast.circuit.names == naive.circuit.names == PLANTED
    assert [(step.node, step.kept) for step in fast.steps] == [(step.node, step.kept) for step in naive.steps]


def test_random_circuits_end_to_end():
    result = run(method=RandomCircuit(n_heads=2, n_mlps=1, draws=4))
    assert len(result.scores.values) == 4 and set(result.scores.provenance) >= {"members", "content_hash"}
