"""What is said when a patcher of one's own breaks in the middle of a pass, or gives what is no activation."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import planted_model, planted_prompts
from test_runner import run

from circuitkit.core.errors import MeasurementError
from circuitkit.engine import PackedEngine, ReferenceEngine
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Needs, Patcher, Zero


class Breaks(Patcher):
    """Fails at one component."""

    needs = Needs()

    def patch(self, act, source, site):
        if str(site) == "m1":
            raise ZeroDivisionError("by my own hand")
        return torch.zeros_like(act)


class Gives(Patcher):
    """Gives what it was made with."""

    needs = Needs()

    def __init__(self, change: str) -> None:
        self.change = change

    def patch(self, act, source, site):
        return {"shape": act[..., :1], "dtype": act.double(), "none": act * 0}[self.change]


def test_an_error_in_a_patcher_names_the_site_the_layer_the_mask_and_the_run():
    with pytest.raises(ZeroDivisionError) as caught:
        run(patcher=Breaks(), name="my-run")
    notes = "\n".join(caught.value.__notes__)
    assert "Breaks.patch failed at m1 (site mlp_out, layer 1)" in notes
    assert "in the run my-run" in notes


def test_an_error_in_a_pass_names_the_masks():
    engine = PackedEngine(planted_model(), planted_prompts(), Breaks(), LogitDiff())
    mask = engine.universe.without(engine.universe.full(), ["m1", "a2.h0"])
    with pytest.raises(ZeroDivisionError) as caught:
        engine.score(mask[None])
    assert any("removes m1, a2.h0" in note and "prompts 0-" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize(("change", "text"), [("shape", r"\(.*, 1\)"), ("dtype", "of torch.float64")])
def test_a_value_that_is_no_activation(engine_class, change, text):
    engine = engine_class(planted_model(), planted_prompts(), Gives(change), LogitDiff())
    with pytest.raises(MeasurementError, match=f"Gives.patch .*{text}.* Expected one like the activation"):
        engine.score(engine.universe.empty()[None])


def test_the_right_shape_is_taken():
    zero, own = (PackedEngine(planted_model(), planted_prompts(), each, LogitDiff()) for each in (Zero(), Gives("none")))
    mask = zero.universe.empty()[None]
    assert torch.equal(zero.score(mask), own.score(mask))
