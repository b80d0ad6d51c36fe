"""What each process of a launch does in test_distributed.py. Writes what it saw to <folder>/<rank>.json."""

import beartype  # noqa: F401, I001  before nnsight

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from models_for_tests import planted_model, planted_prompts

from circuitkit.engine import PackedEngine
from circuitkit.engine.distributed import DistributedEngine
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models.processes import processes
from circuitkit.patchers import Mean, Zero
from circuitkit.runner import Runner
from circuitkit.tasks import Task

RANK = int(os.environ["RANK"])


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

    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        super().__init__(model, prompts, patcher, metric, universe, max_rows=max_rows)
        self.made.append(self)


def run(method, patcher):
    Sees.made.clear()
    result = Runner().run(
        model=planted_model(), task=Planted(), method=method, patcher=patcher, metric=LogitDiff(), engine=Sees, settings={}
    )
    found = result.circuit.to_json() if result.circuit else result.scores.to_json()
    steps = [(step.node, step.score, step.kept) for step in result.steps]
    work = Sees.made[0].work
    baseline = result.baseline.clean.tolist()
    return {"found": found, "steps": steps, "baseline": baseline, "passes": work.passes, "layer_rows": work.layer_rows}


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
