"""The self-check at the start of every run: it accepts what is right, and refuses what is broken with a sentence that says what."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from models_for_tests import PATCHERS, hook_counts, tiny_model, tiny_prompts

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind
from circuitkit.core.universe import Universe
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.quick import quick_check
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Needs, Patcher, Resample, Zero

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def check(model=None, prompts=None, patcher=None, engine=PackedEngine, graph=None) -> None:
    quick_check(engine(model or tiny_model("llama"), prompts or tiny_prompts(), patcher or Mean(), LogitDiff(), graph))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("spans", [(), ("S1", "last")], ids=["whole", "positions"])
def test_what_is_right_passes(dtype, engine, spans, caplog):
    model = tiny_model("gpt_neox", dtype=dtype)
    before = hook_counts(model)
    with caplog.at_level(logging.INFO):
        check(model, patcher=Mean("conditional"), engine=engine, graph=Universe.of_nodes(3, 2, spans))
    assert "Self-check: the engine agrees with the naive path" in caplog.text
    assert hook_counts(model) == before


@pytest.mark.parametrize("patcher", sorted(PATCHERS))
def test_it_is_cheap_whatever_the_number_of_prompts(patcher):
    model = tiny_model("llama")
    rows: list[int] = []

    def count(module, args, kwargs) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    engine = PackedEngine(model, tiny_prompts(50), PATCHERS[patcher], LogitDiff())
    model.hf.register_forward_pre_hook(count, with_kwargs=True)
    quick_check(engine)
    assert len(rows) <= 40 and sum(rows) <= 100
    assert engine.work.passes == 0, "nothing of the run's own engine is used up"


# Broken engines


class IgnoresMasks(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(torch.ones_like(masks), base)


class OneLayerOff(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(masks.roll(len(self.universe) // self.universe.n_layers, -1), None)


class OneHeadOff(PackedEngine):
    def passes(self, masks, base=None):
        is_head = torch.tensor([node.kind is Kind.HEAD for node in self.universe.nodes])
        masks = masks.clone()
        masks[:, is_head] = masks[:, is_head].roll(1, -1)
        return super().passes(masks, None)


class LateIsNotHeard(PackedEngine):
    def passes(self, masks, base=None):
        masks = masks.clone()
        masks[:, -1] = True
        return super().passes(masks, base)


class HoldsStaleStates(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(masks if base is None else base.expand_as(masks), base)


class CleanIsOff(PackedEngine):
    def clean_logits(self):
        return super().clean_logits() * 2


class GivesNaN(PackedEngine):
    def passes(self, masks, base=None):
        for chosen, rows, logits in super().passes(masks, base):
            yield chosen, rows, logits * torch.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", [IgnoresMasks, OneLayerOff, OneHeadOff, LateIsNotHeard, HoldsStaleStates, CleanIsOff, GivesNaN])
def test_a_broken_engine(engine, dtype):
    with pytest.raises(MeasurementError, match=r"engine and the naive path give different logits .* Run with engine=reference, and report"):
        check(tiny_model("llama", dtype=dtype), engine=engine)


def test_states_held_over_the_wrong_layer(monkeypatch):
    """The shortcut itself broken: a pass starts one layer too late from what is held."""
    monkeypatch.setattr("circuitkit.engine.packed.trunk.Trunk.entry", lambda self, layer: max(0, min(layer + 1, self.depth)))
    with pytest.raises(MeasurementError, match="give different logits"):
        check(tiny_model("llama", n_layers=4))


# Patches without effect


class Nothing(Patcher):
    def patch(self, act, source, site):
        return act


class NothingForHeads(Zero):
    reads_activation = True

    def patch(self, act, source, site):
        return act if site.kind is Kind.HEAD else super().patch(act, source, site)


class NaN(Zero):
    def patch(self, act, source, site):
        return super().patch(act, source, site) * torch.nan


def test_a_patcher_that_does_nothing():
    with pytest.raises(MeasurementError, match="Replacing every component with Nothing changed nothing: it gives back what"):
        check(patcher=Nothing())


def test_a_patcher_that_leaves_all_heads_alone_is_said_once(caplog):
    check(patcher=NothingForHeads())
    assert "Replacing all heads with NothingForHeads changed nothing" in caplog.text and "all MLPs" not in caplog.text


def test_a_patcher_that_gives_nan():
    with pytest.raises(MeasurementError, match="Components replaced by what NaN gives lead to NaN or infinite logits"):
        check(patcher=NaN())


@pytest.mark.parametrize("patcher", [Resample(), Mean(), Mean(pool="group"), Mean("conditional")])
def test_clean_and_corrupt_prompts_that_are_the_same(patcher):
    prompts = tiny_prompts()
    with pytest.raises(MeasurementError, match="All 6 corrupt prompts are the same as their clean twins, .* still holds the answer"):
        check(prompts=replace(prompts, corrupt=prompts.clean), patcher=patcher)
    check(prompts=replace(prompts, corrupt=prompts.clean), patcher=Zero())


@pytest.mark.parametrize("patcher", [Resample(), Mean(pool="group")])
def test_some_that_are_the_same_are_passed_over(patcher, caplog):
    """The first two, on which the check would otherwise rest."""
    prompts = tiny_prompts()
    corrupt = prompts.corrupt.clone()
    corrupt[:4] = prompts.clean[:4]
    check(prompts=replace(prompts, corrupt=corrupt), patcher=patcher)
    assert ("4 of 6 corrupt prompts are the same as their clean twins" in caplog.text) == isinstance(patcher, Resample)


@pytest.mark.parametrize("needs", [Needs(), Needs("run")])
def test_a_module_that_is_never_run(needs, monkeypatch):
    """The table of architectures names something else than what the model computes: plain hooks would see nothing, and say nothing."""
    model = tiny_model("llama")
    model.module(1, "mlp").unused = torch.nn.Linear(8, 8)
    right = type(model).module

    def module(self, layer, part):
        return right(self, 1, "mlp").unused if (layer, part) == (1, "mlp") else right(self, layer, part)

    monkeypatch.setattr(type(model), "module", module)

    class Half(Zero):
        pass

    Half.needs = needs
    with pytest.raises(MeasurementError, match="Patches would not fire where they should: mlp of layer 1: 0 times, expected once"):
        check(model, patcher=Half())


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embedding", "mlp", "unembedding"])
def test_weights_that_are_not_finite(where, value):
    model = tiny_model("llama")
    modules = {"embedding": model.hf.model.embed_tokens, "mlp": model.module(2, "mlp").down_proj, "unembedding": model.hf.lm_head}
    modules[where].weight.data[:, 0] = value
    with pytest.raises(MeasurementError, match="The untouched model gives NaN or infinite logits, so no score can be given. Load it in"):
        check(model)


# The engine that is made anew


def test_an_engine_made_anew_keeps_its_bound_and_its_class():
    engine = IgnoresMasks(tiny_model(), tiny_prompts(), Mean(), LogitDiff(), Universe.of_nodes(3, 2, ("last",)), max_rows=3)
    other = engine.on(engine.prompts.take([0, 1]))
    assert type(other) is IgnoresMasks and other.budget.rows == 3 and len(other.prompts) == 2 and other.universe is engine.universe
    assert other.patcher is engine.patcher and other.metric is engine.metric and other.model is engine.model
    assert type(ReferenceEngine(engine.model, engine.prompts, Zero(), LogitDiff()).on(engine.prompts)) is ReferenceEngine
