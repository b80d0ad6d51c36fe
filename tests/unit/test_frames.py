"""How deep a patcher is called, so that whoever sets a breakpoint in ``patch`` finds the way up.

Counted are frames of functions of the package, list and dict comprehensions among them, ``patch`` included. Frames of nnsight, torch
and transformers do not count: they come between those of ours.

- A value that does not depend on the activation (zero, mean, resample) is made before all passes: ``Runner.run`` is still there.
- A value that depends on it, or on what a circuit computes for an edge, is made in the middle of a pass, which a method asked for: above
  the pass are the method and what it calls, or nnsight's own thread. So there it is counted from where the pass begins, and the note on
  an error names what cannot be seen (``test_patcher_errors.py``).
- The naive path is left out: it is plain on purpose, and its hooks are called by torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import planted_model, planted_prompts
from test_runner import Toy

import circuitkit
from circuitkit.core.node import Site
from circuitkit.core.universe import Universe
from circuitkit.engine import PackedEngine
from circuitkit.featurizers import Identity
from circuitkit.methods import EdgePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Needs, Patcher
from circuitkit.runner import Runner

PACKAGE = Path(circuitkit.__file__).parent
MOST = 8
# Where one pass begins: of masks, of the prompts to hold, of single edges, of edge masks, of the means of edges.
PASSES = (
    "engine/packed/lane.py:run",
    "engine/edges/single.py:fill",
    "engine/edges/pruned.py:logits",
    "engine/edges/held.py:_add_means",
)


def stack():
    """The package's functions on the stack of this thread, the outermost first; the patcher under test stands for one of the package."""
    frame, found = sys._getframe(2), ["patch"]
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append(f"{path.relative_to(PACKAGE).as_posix()}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(found))


class Told(Patcher):
    """Half the mean over corrupt prompts; keeps the stacks that it was called from."""

    needs = Needs("mean")
    reads_activation = False

    def __init__(self) -> None:
        self.stacks = set()

    def patch(self, act, source, site):
        self.stacks.add(stack())
        return source / 2


class ToldReading(Told):
    """Likewise, but half the activation goes into it, so it is called in the middle of a pass."""

    reads_activation = True

    def patch(self, act, source, site):
        self.stacks.add(stack())
        return (source + act) / 2


def stacks_of(method, patcher):
    patcher.stacks.clear()
    Runner().run(model=planted_model(), task=Toy(), method=method, patcher=patcher, metric=LogitDiff())
    return [each for each in patcher.stacks if not any(name.startswith("engine/oracle/") for name in each)]


def from_the_pass(stack):
    """The part of a stack from where its innermost pass begins; all of it in nnsight's thread."""
    starts = [place for place, name in enumerate(stack) if name in PASSES]
    return stack[starts[-1] :] if starts else stack


@pytest.mark.parametrize("method", [Knockout(), EdgePruning(None)])
def test_from_the_runner_to_a_value_that_is_known_before_all_passes(method):
    prepared = [each for each in stacks_of(method, Told()) if any(name.endswith(":prepare") for name in each)]
    assert prepared and all(each[0] == "runner.py:run" and each[-1] == "patch" for each in prepared)
    assert max(map(len, prepared)) <= MOST, max(prepared, key=len)


def test_no_pass_asks_again_for_what_is_known():
    patcher = Told()
    engine = PackedEngine(planted_model(), planted_prompts(), patcher, LogitDiff())
    engine.prepare()
    n_asked = len(patcher.stacks)
    patcher.stacks.clear()
    engine.score(torch.stack([engine.universe.empty(), engine.universe.full()]))
    assert n_asked and not patcher.stacks


@pytest.mark.parametrize("patcher", [Told(), ToldReading()])
@pytest.mark.parametrize("method", [Knockout(), EdgePruning(None)])
def test_from_a_pass_to_the_value(method, patcher):
    stacks = stacks_of(method, patcher)
    assert max(len(from_the_pass(each)) for each in stacks) <= MOST, max(map(from_the_pass, stacks), key=len)


@pytest.mark.parametrize("patcher", [Told(), ToldReading()])
@pytest.mark.parametrize("site", [Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST])
def test_from_a_pass_to_the_value_of_a_feature(site, patcher):
    patcher.stacks.clear()
    model = planted_model()
    universe = Universe.of_features(model.n_layers, model.n_heads, {(site, 1): model.d_model})
    engine = PackedEngine(model, planted_prompts(), patcher, LogitDiff(), universe, {(site, 1): Identity(model.d_model)})
    engine.score(torch.stack([universe.empty(), universe.full()]))
    assert patcher.stacks and max(len(from_the_pass(each)) for each in patcher.stacks) <= MOST, max(patcher.stacks, key=len)
