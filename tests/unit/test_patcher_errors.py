"""What is said when a patcher of one's own breaks in the middle of a pass, or gives what is no activation."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import planted_model, planted_prompts
from test_runner import run

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Site
from circuitkit.core.universe import Universe
from circuitkit.engine import PackedEngine, ReferenceEngine
from circuitkit.evaluation import generate
from circuitkit.featurizers import Identity
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


class BreaksReading(Breaks):
    """Fails where the component computes other than noise: reads the activation, and so is asked in the middle of a pass."""

    reads_activation = True


class BreaksOnMeans(Breaks):
    """Fails only where means are conditional, so that it is asked while those are taken."""

    needs = Needs("mean", conditional=True)
    reads_activation = False


def notes_of(act):
    with pytest.raises(ZeroDivisionError, match="by my own hand") as caught:
        act()
    return "\n".join(caught.value.__notes__)


@pytest.mark.parametrize("patcher", [Breaks(), BreaksReading(), BreaksOnMeans()])
def test_the_site_the_layer_and_the_mask_whatever_hides_the_caller(patcher):
    """In a pass, in a thread of nnsight's, and while conditional means are taken."""
    engine = PackedEngine(planted_model(), planted_prompts(), patcher, LogitDiff())
    mask = engine.universe.without(engine.universe.full(), ["a1.h0", "m1", "a2.h0"])
    notes = notes_of(lambda: list(engine.passes(mask[None])))
    assert ".patch failed at m1 (site mlp_out, layer 1)" in notes
    assert "over prompts 0-5 and the masks of places [0], the first of which removes a1.h0, m1, a2.h0" in notes


def test_of_an_edge_engine():
    edges = PackedEngine(planted_model(), planted_prompts(), Zero(), LogitDiff()).edges(patcher=Breaks())
    mask = edges.universe.without(edges.universe.full(), ["m1->logits", "input->m0"])
    notes = notes_of(lambda: edges.score(mask[None]))
    assert ".patch failed at m1 (site mlp_out, layer 1)" in notes
    assert "in a pass over prompts 0-5 and the masks of places [0], the first of which removes input->m0, m1->logits" in notes
    notes = notes_of(lambda: edges.alone(["input->m0", "m1->logits"]))
    assert ".patch failed at m1" in notes and "the edges input->m0, m1->logits were patched one by one, over prompts 0-5" in notes


def test_of_a_gradient():
    gradients = PackedEngine(planted_model(), planted_prompts(), Breaks(), LogitDiff()).gradients()
    mask = torch.ones(len(planted_model().universe))
    mask[3] = 0.5
    for act in (lambda: gradients.grad(mask), lambda: gradients.loss(mask)):
        notes = notes_of(act)
        assert ".patch failed at m1 (site mlp_out, layer 1)" in notes
        assert "over prompts 0-5 and" in notes and f"removes {planted_model().universe.unit(3)}" in notes


def test_of_generation():
    model = planted_model()
    mask = model.universe.without(model.universe.full(), ["m1"])
    notes = notes_of(lambda: generate(model, planted_prompts().clean, mask[None], Breaks(), max_new_tokens=2))
    assert ".patch failed at m1 (site mlp_out, layer 1)" in notes
    assert "while generating from prompts [0, 1, 2, 3, 4, 5] under the masks of places [0, 0, 0, 0, 0, 0]" in notes
    assert "removes m1" in notes


def test_of_features():
    class BreaksAtFeatures(Patcher):
        def patch(self, act, source, site):
            raise ZeroDivisionError("by my own hand")

    model = planted_model()
    universe = Universe.of_features(model.n_layers, model.n_heads, {(Site.MLP_OUT, 1): 4})
    place = Site.MLP_OUT, 1
    engine = PackedEngine(model, planted_prompts(), BreaksAtFeatures(), LogitDiff(), universe, {place: Identity(model.d_model)})
    notes = notes_of(lambda: engine.score(engine.universe.empty()[None]))
    assert "(site mlp_out, layer 1)" in notes and "the first of which removes m1.f0" in notes


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
