"""What each process of a launch does in test_distributed.py. Writes what it saw to <folder>/<rank>.json."""

import beartype  # noqa: F401, I001  before nnsight

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import torch
from models_for_tests import PLANTED, planted_model, planted_prompts

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Edge, Level, Node
from circuitkit.engine import PackedEngine
from circuitkit.engine.distributed import DistributedEngine, shared
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.evaluation import evaluate
from circuitkit.methods import EdgePruning, IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models.processes import processes
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.runner import Runner
from circuitkit.tasks import Task

RANK = int(os.environ["RANK"])
NODES = Circuit(tuple(map(Node.parse, (*PLANTED, "a0.h0", "a1.h2", "a2.h1", "m3"))), 4, 3)
PATHS = ("input->a0.h1<v>", "a0.h1->m1", "m1->a2.h0<v>", "a2.h0->logits")
EDGES = Circuit(tuple(map(Node.parse, PLANTED)), 4, 3, "", None, Level.EDGE_QKV, {}, tuple(map(Edge.parse, PATHS)), NODES.nodes)


SCORED = [0]  # masks of edges, in this process
_SCORE = PackedEdges.score


def counted(self, masks, base=None):
    SCORED[0] += len(masks)
    return _SCORE(self, masks, base)


PackedEdges.score = counted


class Planted(Task):
    """The prompts that the planted model can do."""

    name, filter, seed = "planted", False, 0

    def prompts(self, tokenizer, *, n=None, seed=None, accept=None):
        return planted_prompts()


class FailsIn(Zero):
    """Raises in one process, once the search has begun."""

    def __init__(self, rank):
        self.rank, self.calls = rank, 0

    def patch(self, act, source, site):
        self.calls += 1
        if processes().index == self.rank and self.calls > 60:
            raise ZeroDivisionError("in this process")
        return super().patch(act, source, site)

    reads_activation = True


class Sees(PackedEngine):
    """Remembers the engines of this process."""

    made = []

    def __init__(self, model, prompts, patcher, metric, universe=None, featurizers=None, *, max_rows=None):
        super().__init__(model, prompts, patcher, metric, universe, featurizers, max_rows=max_rows)
        self.made.append(self)


def run(method, patcher, max_rows=None):
    Sees.made.clear()
    SCORED[0] = 0
    result = Runner().run(
        model=planted_model(), task=Planted(), method=method, patcher=patcher, metric=LogitDiff(),
        engine=partial(Sees, max_rows=max_rows), settings={},
    )  # fmt: skip
    found = result.circuit.to_json() if result.circuit else result.scores.to_json()
    steps = [(step.node, step.score, step.kept) for step in result.steps]
    work = Sees.made[0].work
    baseline = result.baseline.clean.tolist()
    return {"found": found, "steps": steps, "baseline": baseline, "passes": work.passes, "layer_rows": work.layer_rows,
            "edge_masks": SCORED[0]}  # fmt: skip


def evaluated(circuit):
    """What an evaluation says, and what this process computed for it; None for what only the first process has."""
    nodes = PackedEngine(planted_model(), planted_prompts(), Mean(), LogitDiff(), max_rows=12)
    engine = nodes.edges(circuit.frame, level=circuit.level, patcher=Resample()) if circuit.level.of_edges else nodes
    SCORED[0] = 0
    with shared(engine) as scorer:
        body = None if scorer is None else evaluate(scorer, circuit, draws=4, resamples=20).body
    return {"body": body, "passes": nodes.work.passes, "layer_rows": nodes.work.layer_rows, "edge_masks": SCORED[0]}


def short_of_memory():
    """Single edges where the second process runs out of memory on the way, so that its passes are others from there on."""
    nodes = PackedEngine(planted_model(), planted_prompts(), Mean(), LogitDiff(), max_rows=12)
    engine, measure, calls, values = nodes.edges(NODES, mlps="freeze"), nodes.measure, [], None
    engine.check = lambda: None  # the shortage is to come later

    def short(logits, rows):
        calls.append(rows)
        if RANK == 1 and len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return measure(logits, rows)

    nodes.measure = short
    with shared(engine) as scorer:
        if scorer is not None:
            values = scorer.alone(scorer.universe.edges).tolist()
    return {"values": values, "rows": nodes.budget.rows, "asked": len(calls)}


def error_of(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def main():
    folder = Path(sys.argv[1])
    seen = {}
    seen["pruning"] = run(IterativePruning(0.8), Mean("conditional"))
    seen["knockout"] = run(Knockout(), Mean())
    for rule in ("single", "cumulative"):
        seen[f"edges {rule}"] = run(EdgePruning(NODES, rule=rule, edge_patcher=Resample()), Mean(), max_rows=12)
    seen["evaluation of nodes"] = evaluated(Circuit(tuple(map(Node.parse, PLANTED)), 4, 3))
    seen["evaluation of edges"] = evaluated(EDGES)
    seen["short of memory"] = short_of_memory()
    if processes().count == 1:
        return write(folder, seen)
    seen["fails in 1"] = error_of(lambda: run(Knockout(), FailsIn(1)))
    seen["fails in 0"] = error_of(lambda: run(Knockout(), FailsIn(0)))
    if RANK == 1:  # a job that the first process has left out
        seen["left out"] = error_of(lambda: run(Knockout(), Zero()))
    seen["after"] = run(Knockout(), Mean())
    engine = PackedEngine(planted_model(), planted_prompts(), Mean(), LogitDiff())
    seen["batch"] = [engine.batch, DistributedEngine(engine, processes()).batch]
    return write(folder, seen)


def write(folder, seen):
    (folder / f"{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
