"""What half precision costs, held against scores computed here; and the way to float32 and back."""

from __future__ import annotations

import logging

import pytest
import torch
from models_for_tests import same_state, solvable_prompts, state_of, tiny_model

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ModelError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import Step
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.drift import Drift, decisions, drift, drift_metrics, replayed
from circuitkit.loggers.base import Logger
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models.checks import digests_of, hooks_of
from circuitkit.models.hooked import HookedModel
from circuitkit.models.precision import as_float32
from circuitkit.patchers import Mean
from circuitkit.runner import Runner
from circuitkit.tasks import Task

HALF = [torch.bfloat16, torch.float16]


def engine_of(model: HookedModel, prompts: PromptSet | None = None) -> PackedEngine:
    return PackedEngine(model, prompts or solvable_prompts(model), Mean(), LogitDiff())


def pruned(engine, threshold: float) -> list[Step]:
    steps: list[Step] = []
    IterativePruning(threshold=threshold).discover(engine, on_step=steps.append)
    return steps


def twin_in_float32(model: HookedModel) -> HookedModel:
    """A model of its own with the same weights, converted here."""
    twin = tiny_model(model.map.family)
    twin.hf.load_state_dict({name: weight.float() for name, weight in model.hf.state_dict().items()})
    return twin


# To float32 and back


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_there_and_back_again_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype=dtype)
    before, digests, logits = state_of(model), digests_of(model), model.hf(torch.arange(5)[None]).logits
    pointers = {name: id(tensor) for name, tensor in model.hf.named_parameters()}
    with as_float32(model) as inside:
        assert inside is model and model.dtype == torch.float32
        assert {tensor.dtype for tensor in (*model.hf.parameters(), *model.hf.buffers()) if tensor.is_floating_point()} == {torch.float32}
        assert torch.equal(model.hf.get_input_embeddings().weight, before[1][_embedding(model)].float())
    assert model.dtype == dtype and digests_of(model) == digests and same_state(before, state_of(model))
    assert {name: id(tensor) for name, tensor in model.hf.named_parameters()} == pointers
    assert torch.equal(model.hf(torch.arange(5)[None]).logits, logits)


def _embedding(model: HookedModel) -> str:
    return next(name for name, tensor in model.hf.named_parameters() if tensor is model.hf.get_input_embeddings().weight)


def test_weights_of_several_dtypes_keep_their_own():
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.hf.model.norm.float()
    before = {name: tensor.dtype for name, tensor in model.hf.named_parameters()}
    with as_float32(model):
        pass
    assert {name: tensor.dtype for name, tensor in model.hf.named_parameters()} == before
    assert set(before.values()) == {torch.float32, torch.bfloat16}


def test_tied_weights_stay_tied():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
    with as_float32(model):
        assert model.hf.lm_head.weight.data_ptr() == model.hf.transformer.wte.weight.data_ptr()
    assert model.hf.lm_head.weight.data_ptr() == model.hf.transformer.wte.weight.data_ptr()


def test_an_error_inside_or_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = digests_of(model)
    with pytest.raises(KeyError), as_float32(model):
        raise KeyError("inside")
    assert digests_of(model) == before
    right, calls = torch.Tensor.float, []

    def runs_out(tensor):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no more")
        return right(tensor)

    monkeypatch.setattr(torch.Tensor, "float", runs_out)
    with pytest.raises(torch.OutOfMemoryError), as_float32(model):
        raise AssertionError("it was not entered")
    assert len(calls) == 4 and digests_of(model) == before and model.dtype == torch.bfloat16


def _offloaded(model: HookedModel) -> None:
    model.hf.lm_head.to("meta")


def _quantised(model: HookedModel) -> None:
    model.hf.lm_head.weight = torch.nn.Parameter(torch.zeros(23, 8, dtype=torch.int8), requires_grad=False)


def _flagged(model: HookedModel) -> None:
    model.hf.is_quantized = True


@pytest.mark.parametrize(("how", "reason"), [(_offloaded, "offloaded"), (_quantised, "quantised"), (_flagged, "quantised")])
def test_what_cannot_be_converted_is_refused_and_its_report_left_out(how, reason, caplog):
    model = tiny_model("llama", dtype=torch.bfloat16)
    engine = engine_of(model)
    how(model)
    before = {name: tensor.dtype for name, tensor in model.hf.named_parameters()}
    with pytest.raises(ModelError, match=f"cannot be computed in float32: .*{reason}"), as_float32(model):
        raise AssertionError("it was not entered")
    with caplog.at_level(logging.INFO):
        assert drift_metrics([], engine) == {}
    assert f"not reported for {model.name}" in caplog.text and reason in caplog.text
    assert {name: tensor.dtype for name, tensor in model.hf.named_parameters()} == before


# The drift itself


def test_the_numbers_by_hand():
    found = Drift.between(torch.tensor([79.0, 81.0, 80.5, 10.0]), torch.tensor([80.5, 79.0, 80.25, 10.0]), 0.8, 3)
    assert found == Drift(4, 3, largest=2.0, mean=pytest.approx(0.9375), flipped=2)
    assert Drift.between(torch.tensor([79.0, 81.0]), torch.tensor([81.0, 79.0]), None, 3).flipped == 0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_drift_is_what_the_naive_path_gives_with_converted_weights(dtype):
    """Scores of both dtypes by the oracle on two models; thresholds laid where just so many decisions flip."""
    model = tiny_model("llama", dtype=dtype)
    prompts = solvable_prompts(model)
    engine = engine_of(model, prompts)
    masks = torch.stack(replayed(engine.universe, pruned(engine, 0.5)))
    half, single = (ReferenceEngine(each, prompts, Mean(), LogitDiff()).percent(masks) for each in (model, twin_in_float32(model)))
    assert (half - single).abs().max() > 0.01, "or this test proves nothing"
    widest = (half - single).abs().argmax()
    threshold = (half[widest] + single[widest]).item() / 200
    expected = sum((h > 100 * threshold) != (s > 100 * threshold) for h, s in zip(half.tolist(), single.tolist(), strict=True))
    found = drift(engine, masks, threshold=threshold)
    # The packed path may round otherwise in half precision, so far as kernels of other shapes do.
    assert found.largest == pytest.approx((half - single).abs().max().item(), rel=0.05)
    assert found.mean == pytest.approx((half - single).abs().mean().item(), rel=0.05)
    assert found.flipped == expected >= 1
    assert (found.n_masks, found.n_prompts) == (len(masks), len(prompts))


def test_few_prompts():
    model = tiny_model("llama", dtype=torch.bfloat16)
    engine = engine_of(model)
    mask = engine.universe.without(engine.universe.full(), ["m1"])
    assert drift(engine, mask[None], n_prompts=3).n_prompts == 3


def test_the_engine_goes_on_as_if_nothing_had_happened():
    model = tiny_model("llama", dtype=torch.bfloat16)
    engine = engine_of(model)
    masks = torch.stack([engine.universe.without(engine.universe.full(), [node]) for node in ("a0.h1", "m2")])
    before, state = engine.score(masks), (digests_of(model), hooks_of(model))
    drift(engine, masks)
    assert torch.equal(engine.score(masks), before) and (digests_of(model), hooks_of(model)) == state


def test_float32_has_no_drift_to_report(monkeypatch):
    monkeypatch.setattr("circuitkit.engine.proof.drift.drift", lambda *_, **__: pytest.fail("nothing is to be computed"))
    model = tiny_model("llama")
    assert drift_metrics([], engine_of(model), 0.8) == {}


def test_a_run_is_not_lost_when_float32_does_not_fit(monkeypatch, caplog):
    model = tiny_model("llama", dtype=torch.bfloat16)
    engine = engine_of(model)
    steps = pruned(engine, 0.5)
    monkeypatch.setattr("circuitkit.engine.proof.drift.free_room", lambda model: 100)
    with caplog.at_level(logging.INFO):
        assert drift_metrics(steps, engine, 0.5) == {}
    assert "GiB are free" in caplog.text
    monkeypatch.undo()

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("circuitkit.engine.proof.drift.drift", runs_out)
    assert drift_metrics(steps, engine, 0.5) == {} and "no more" in caplog.text
    monkeypatch.setattr("circuitkit.engine.proof.drift.drift", lambda *_, **__: {}["a bug"])
    with pytest.raises(KeyError):
        drift_metrics(steps, engine, 0.5)


# Which masks


@pytest.mark.parametrize("order", ["backward", "forward"])
def test_replayed_masks_are_those_that_were_scored(order):
    engine = engine_of(tiny_model("gpt2"))
    steps: list[Step] = []
    IterativePruning(threshold=0.5, order=order).discover(engine, on_step=steps.append)
    assert {step.kept for step in steps} == {True, False}, "or this test proves nothing"
    scores = ReferenceEngine(engine.model, engine.prompts, Mean(), LogitDiff()).percent(torch.stack(replayed(engine.universe, steps)))
    torch.testing.assert_close(scores, torch.tensor([step.score for step in steps], dtype=scores.dtype), atol=0.02, rtol=0)


def test_replayed_knock_outs_of_a_circuit():
    engine = engine_of(tiny_model("gpt2"))
    members = engine.universe.without(engine.universe.full(), ["a1.h0", "m0"])
    steps: list[Step] = []
    Knockout(Circuit.of(engine.universe, members, model="tiny-gpt2")).discover(engine, on_step=steps.append)
    scores = engine.percent(torch.stack(replayed(engine.universe, steps)))
    torch.testing.assert_close(scores, torch.tensor([step.score for step in steps], dtype=scores.dtype), atol=0.02, rtol=0)


def test_decisions_are_the_closest_and_some_from_all_over():
    graph = tiny_model("gpt2", n_layers=4, n_heads=4).universe
    steps = [Step(0, place, str(node), 100.0 - 3 * place, False, 0, "backward") for place, node in enumerate(graph.nodes)]
    scored = replayed(graph, steps)
    closest = sorted(range(len(steps)), key=lambda place: abs(steps[place].score - 80))[:4]
    chosen = [next(place for place, mask in enumerate(scored) if torch.equal(mask, one)) for one in decisions(graph, steps, 0.8, 8)]
    assert set(closest) <= set(chosen) and len(set(chosen)) == 8 and chosen == sorted(chosen)
    others = sorted(set(chosen) - set(closest))
    assert others[0] < 3 and others[-1] > 10
    assert len(decisions(graph, steps, 0.8, 100)) == len(steps)
    assert len(decisions(graph, steps[:1], None)) == 1


@pytest.mark.parametrize("steps", [[], [Step(0, 0, "draw0", 50.0, True, 3, "draw")]], ids=["none", "draws"])
def test_random_masks_stand_in(steps):
    graph = tiny_model("gpt2").universe
    masks = decisions(graph, steps, 0.8)
    assert masks.shape == (16, len(graph)) and masks.dtype == torch.bool and len(masks.unique(dim=0)) > 4


# In a run


class Fixed(Task):
    """Prompts made beforehand."""

    name, filter, seed = "fixed", False, 0

    def __init__(self, made: PromptSet) -> None:
        self.made = made

    def prompts(self, tokenizer, *, accept=None):
        return self.made


class Keeps(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.metrics: dict = {}

    def log_config(self, name, config):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_artifact(self, artifact):
        pass

    def finalize(self, status):
        self.metrics["status"] = status


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_logs_its_drift(dtype):
    model = tiny_model("llama", dtype=dtype)
    prompts, logger = solvable_prompts(model), Keeps()
    result = Runner(loggers=[logger]).run(
        model=model, task=Fixed(prompts), method=IterativePruning(threshold=0.6), patcher=Mean(), metric=LogitDiff()
    )
    logged = {name: value for name, value in logger.metrics.items() if name.startswith("drift/")}
    assert logger.metrics["status"] == "finished"
    if dtype == torch.float32:
        assert logged == {}
        return
    masks = decisions(model.universe, result.steps, 0.6)
    half, single = (ReferenceEngine(each, prompts, Mean(), LogitDiff()).percent(masks) for each in (model, twin_in_float32(model)))
    assert logged["drift/n"] == len(masks) and logged["drift/flipped"] == ((half > 60) != (single > 60)).sum()
    assert logged["drift/largest"] == pytest.approx((half - single).abs().max().item(), rel=0.05) and logged["drift/largest"] > 0
    assert logged["drift/mean"] == pytest.approx((half - single).abs().mean().item(), rel=0.05)


def test_prompts_that_cannot_be_scored_leave_the_report_out(caplog):
    model = tiny_model("llama", dtype=torch.bfloat16)
    right = solvable_prompts(model)
    wrong = PromptSet(right.clean, right.corrupt, right.wrongs, right.answers, right.groups, right.group_names)
    assert drift_metrics([], engine_of(model, wrong), 0.8) == {}
    assert "cannot do this task" in caplog.text
