"""Neurons and features of models whose weights are set by hand, and the numbers that follow by hand. Both engines must give just these."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import MICRO_PROMPTS, micro_model

from circuitkit.core.node import Kind, Site
from circuitkit.core.universe import Universe
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.featurizers import Dictionary
from circuitkit.metrics import LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return micro_model()


PATCHERS = {"zero": Zero(), "mean": Mean(), "resample": Resample()}

# Behind the layer lies a dictionary of one feature: max(0, dimension 3), of which it explains half.
#   So the error is dimensions 0 to 2 as they are, and the other half of dimension 3.
HALF = Dictionary(torch.tensor([[0.0], [0.0], [0.0], [1.0]]), torch.tensor([[0.0, 0.0, 0.0, 0.5]]), torch.zeros(1), torch.zeros(4))
# On the MLP's output a transcoder of one feature: what the MLP reads in dimension 2, of which it writes 10 to dimension 3. No error.
EXACT = Dictionary(
    torch.tensor([[0.0], [0.0], [1.0], [0.0]]), torch.tensor([[0.0, 0.0, 0.0, 10.0]]), torch.zeros(1), torch.zeros(4), reads_input=True
)

EXPECTED = {
    # patcher, removed: logit differences of the two prompts; untouched they are 12 + 120 - 1 and 6 + 60 - 1
    ("zero", ""): (131.0, 65.0),
    ("zero", "m0.n0"): (11.0, 5.0),
    ("zero", "m0.n1"): (131.0, 65.0),
    ("resample", "m0.n0"): (41.0, 95.0),  # the neuron is 3 and 9
    ("mean", "m0.n0"): (71.0, 65.0),  # the neuron is 6
    ("resample", "m0.n0 a0"): (32.0, 98.0),  # the whole corrupt run
    ("mean", "a0"): (65.0, 65.0),  # heads 6: 6 + 60 - 1
    ("zero", "a0"): (-1.0, -1.0),
    ("zero", "r0.f0"): (71.0, 35.0),  # half of dimension 3 is left: 12 + 60 - 1, 6 + 30 - 1
    ("zero", "r0.e"): (60.0, 30.0),  # the feature's half alone
    ("zero", "r0.f0 r0.e"): (0.0, 0.0),
    ("resample", "r0.f0"): (86.0, 80.0),  # 12 + 60 + 15 - 1, 6 + 30 + 45 - 1
    ("resample", "r0.e"): (77.0, 83.0),  # 3 + 60 + 15 - 1, 9 + 30 + 45 - 1
    ("mean", "r0.f0"): (101.0, 65.0),  # the feature is 60: 12 + 60 + 30 - 1, 6 + 30 + 30 - 1
    ("resample", "m0.n0 r0.f0"): (41.0, 95.0),  # dimension 3 is 30 and 90 in both halves
    ("zero", "m0.f0"): (11.0, 5.0),
    ("zero", "m0.e"): (131.0, 65.0),
    ("resample", "m0.f0"): (41.0, 95.0),
    ("mean", "m0.f0 m0.e"): (71.0, 65.0),
}


@pytest.mark.parametrize("kind", [PackedEngine, ReferenceEngine], ids=["fast", "naive"])
@pytest.mark.parametrize(("name", "removed"), sorted(EXPECTED))
def test_logit_differences(model, name, removed, kind):
    places = {(Site.RESID_POST, 0): HALF, (Site.MLP_OUT, 0): EXACT}
    features = Universe.of_features(1, 2, dict.fromkeys(places, 1))
    universe = features | Universe.of_neurons(1, 2, 2) | Universe.of_attentions(1, 2).only(Kind.ATTENTION)
    engine = kind(model, MICRO_PROMPTS, PATCHERS[name], LogitDiff(), universe, places)
    mask = universe.without(universe.full(), removed.split())
    torch.testing.assert_close(engine.score(mask[None])[0], torch.tensor(EXPECTED[name, removed]), rtol=0, atol=1e-4)
