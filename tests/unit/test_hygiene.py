"""The model is left as it was; memory that runs out costs passes, not results; meaningless measurements are refused with a sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from models_for_tests import (
    PATCHERS,
    difference,
    engines,
    failing,
    planted_model,
    planted_prompts,
    random_masks,
    same_state,
    solvable_prompts,
    state_of,
    tiny_model,
    tiny_prompts,
)

from circuitkit.core.errors import MeasurementError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.base import Baseline
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.quick import quick_check
from circuitkit.methods import IterativePruning
from circuitkit.metrics import KL, Floor, LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "python": MemoryError(),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
}


class ModuleBroke(Exception):
    """What a module raises in the middle of a pass."""


# The model afterwards


@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("patcher", ["mean_all", "conditional_group", "halfway"])
def test_after_success(engine_class, patcher):
    model = tiny_model("llama")
    before, fingerprint = state_of(model), HookedModel(model.hf, name="again").fingerprint()
    IterativePruning(0.5).discover(engine_class(model, solvable_prompts(model), PATCHERS[patcher], LogitDiff()), on_step=lambda step: None)
    assert same_state(before, state_of(model))
    assert HookedModel(model.hf, name="again").fingerprint() == fingerprint == model.fingerprint()


@pytest.mark.parametrize("part", ["attention", "out_proj", "mlp"])
@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox_parallel"])
def test_after_a_module_that_raises_half_way(family, engine_class, part):
    """The very exception comes out, and the next scores are right."""
    model = tiny_model(family, n_layers=4)
    engine, naive = engine_class(model, tiny_prompts(), Mean(), LogitDiff()), ReferenceEngine(model, tiny_prompts(), Mean(), LogitDiff())
    masks = random_masks(5, len(model.universe))
    expected = naive.all_logits(masks)
    before, error = state_of(model), ModuleBroke("half-way")
    with failing(model.module(2, part), error), pytest.raises(ModuleBroke) as caught:
        engine.all_logits(masks)
    assert caught.value is error
    assert same_state(before, state_of(model))
    assert difference(engine.all_logits(masks), expected) < 1e-5


def test_after_a_patcher_that_raises():
    class Raises(Zero):
        def patch(self, act, source, site):
            if str(site) == "m1":
                raise ModuleBroke(str(site))
            return super().patch(act, source, site)

    for reads in (False, True):
        patcher = Raises()
        patcher.reads_activation = reads
        model = tiny_model("gpt2")
        before = state_of(model)
        for engine in engines(model, tiny_prompts(), patcher):
            with pytest.raises(ModuleBroke):
                engine.all_logits(model.universe.empty()[None])
            assert same_state(before, state_of(model))


def test_after_a_bad_target():
    model = tiny_model("gpt2")
    before = state_of(model)
    for engine in engines(model, tiny_prompts(), Mean()):
        with pytest.raises(MeasurementError):
            engine.score(torch.ones(1, 5, dtype=torch.bool))
    assert same_state(before, state_of(model))


def test_gradients_stay_as_the_caller_had_them():
    model = tiny_model("gpt2")
    fast, _ = engines(model, tiny_prompts(), Mean())
    with torch.enable_grad():
        assert not fast.all_logits(fast.universe.empty()[None]).requires_grad
        assert torch.is_grad_enabled()
    with torch.no_grad():
        fast.all_logits(fast.universe.full()[None])
        assert not torch.is_grad_enabled()


# Memory


def failing_runs(model: HookedModel, error: Exception, when, monkeypatch) -> list[int]:
    """Makes ``HookedModel.run`` raise for some of its calls; returns the rows of all of them."""
    rows, run = [], HookedModel.run

    def sometimes(self, ids, *args, **kwargs):
        rows.append(len(ids))
        if when(len(rows), len(ids)):
            raise error
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(HookedModel, "run", sometimes)
    return rows


@pytest.mark.parametrize("kind", sorted(OUT_OF_MEMORY))
@pytest.mark.parametrize("patcher", ["mean_all", "resample", "conditional_all", "halfway"])
def test_passes_that_do_not_fit_are_halved(kind, patcher, monkeypatch):
    """Only 5 rows fit, which nobody knows beforehand: corrupt run, trunk and scores all get there, with the same results."""
    model = tiny_model("gpt2")
    fast, naive = engines(model, tiny_prompts(7), PATCHERS[patcher], max_rows=21)
    masks = random_masks(6, len(fast.universe))
    expected = naive.all_logits(masks)
    rows = failing_runs(model, OUT_OF_MEMORY[kind], lambda call, n: n > 5, monkeypatch)
    assert difference(fast.all_logits(masks), expected) < 1e-5
    assert fast.budget.rows == 5  # 21, 10, 5
    assert max(rows) > 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("patcher", ["mean_group", "conditional_all"])
def test_memory_that_runs_out_at_random(seed, patcher, monkeypatch):
    model = tiny_model("llama", n_layers=4)
    fast, naive = engines(model, tiny_prompts(7), PATCHERS[patcher], max_rows=64)
    batches = [random_masks(5, len(fast.universe), seed=seed + i) for i in range(3)]
    expected = [naive.all_logits(masks) for masks in batches]
    generator = torch.Generator().manual_seed(seed)
    errors = [0]

    def when(call, n):
        hit = n > 2 and torch.rand((), generator=generator).item() < 0.3
        errors[0] += hit
        return hit

    failing_runs(model, OUT_OF_MEMORY["cuda"], when, monkeypatch)
    for masks, logits in zip(batches, expected, strict=True):
        assert difference(fast.all_logits(masks), logits) < 1e-5
    assert errors[0] and fast.budget.rows == 64 // 2 ** errors[0] or fast.budget.rows <= 2


def test_memory_that_runs_out_inside_of_a_pass():
    """In the middle of the model, as it really happens; nothing half-done is kept."""
    model = tiny_model("gpt2", n_layers=4)
    fast, naive = engines(model, tiny_prompts(), Mean(), max_rows=12)
    masks = random_masks(4, len(fast.universe))
    before = state_of(model)
    with failing(model.module(2, "mlp"), OUT_OF_MEMORY["cuda"], times=2):
        found = fast.all_logits(masks)
    assert fast.budget.rows == 3
    assert difference(found, naive.all_logits(masks)) < 1e-5
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_memory_that_does_not_hold_one_row(kind, monkeypatch):
    model = tiny_model("gpt2")
    fast, _ = engines(model, tiny_prompts(), Mean())
    rows = failing_runs(model, OUT_OF_MEMORY[kind], lambda call, n: True, monkeypatch)
    with pytest.raises(MeasurementError, match="Memory ran out in a pass with a single prompt. Take a smaller model or dtype") as caught:
        fast.baseline()
    assert caught.value.__cause__ is OUT_OF_MEMORY[kind]
    assert rows[-1] == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory")])
def test_other_errors_are_not_taken_for_memory(error, monkeypatch):
    model = tiny_model("gpt2")
    fast, _ = engines(model, tiny_prompts(), Mean())
    rows = failing_runs(model, error, lambda call, n: True, monkeypatch)
    with pytest.raises(type(error)) as caught:
        fast.clean_logits()
    assert caught.value is error and len(rows) == 1


def test_the_budget(monkeypatch):
    model, prompts = tiny_model("gpt2"), tiny_prompts()
    with pytest.raises(MeasurementError, match="engine.max_rows must be at least 1, found 0"):
        engines(model, prompts, Mean(), max_rows=0)
    monkeypatch.setattr("circuitkit.engine.packed.memory.free_bytes", lambda device: 10)
    with pytest.raises(MeasurementError, match="Not even one prompt of 5 tokens fits the free memory"):
        engines(model, prompts, Mean())
    assert engines(model, prompts, Mean(), max_rows=1)[0].budget.rows == 1


# Baselines that mean nothing


@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize("where", ["weights", "unembedding"])
def test_weights_that_are_nan(engine_class, where):
    model = tiny_model("llama")
    tensor = model.hf.lm_head.weight if where == "unembedding" else model.module(1, "mlp").up_proj.weight
    with torch.no_grad():
        tensor[0, 0] = float("nan")
    engine = engine_class(model, tiny_prompts(), Mean(), LogitDiff())
    with pytest.raises(MeasurementError, match="NaN or infinit"):
        quick_check(engine)
    if where == "weights":
        with pytest.raises(MeasurementError, match="NaN or infinity, so no score can be given"):
            engine.baseline()


@pytest.mark.parametrize(("clean", "fine"), [(5.0, True), (0.1, True), (1e-4, False), (0.0, False), (-5.0, False)])
def test_a_logit_difference_near_zero_or_below(clean, fine):
    """Held against the patched run's 3: a thousandth of that is nothing."""
    baseline = Baseline(torch.tensor([clean, clean]), torch.tensor([3.0, -3.0]), Floor.ZERO, "logits")
    if fine:
        baseline.check(LogitDiff())
    else:
        with pytest.raises(MeasurementError, match="The untouched model's mean logit_diff is .* cannot do this task on these prompts"):
            baseline.check(LogitDiff())


def test_differences_that_cancel_out():
    baseline = Baseline(torch.tensor([4.0, -4.0]), torch.tensor([1.0, 1.0]), Floor.ZERO, "logits")
    with pytest.raises(MeasurementError, match="would be meaningless"):
        baseline.check(LogitDiff())


@pytest.mark.parametrize(("patched", "fine"), [(2.0, True), (0.0, False), (float("inf"), False)])
def test_a_divergence_needs_a_patched_run_that_differs(patched, fine):
    baseline = Baseline(torch.zeros(2), torch.full((2,), patched), Floor.ABLATED, "nats")
    if fine:
        baseline.check(KL())
        assert baseline.percent(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 2.0]])).tolist() == [100.0, 75.0, 0.0]
    else:
        with pytest.raises(MeasurementError):
            baseline.check(KL())


def test_a_model_that_answers_wrong_is_refused_by_the_engine():
    model = tiny_model("gpt2")
    right = solvable_prompts(model)
    swapped = PromptSet(right.clean, right.corrupt, right.wrongs, right.answers, right.groups, right.group_names)
    for engine in engines(model, swapped, Mean()):
        with pytest.raises(MeasurementError, match="The model cannot do this task on these prompts"):
            engine.percent(engine.universe.full()[None])


@pytest.mark.parametrize("patcher", [Mean(), Mean(pool="group"), Resample()], ids=["mean", "group", "resample"])
def test_clean_and_corrupt_prompts_that_are_the_same(patcher):
    """The corrupt prompts then hold the answer, and removing something with their means proves nothing."""
    model = tiny_model("gpt2")
    drawn = solvable_prompts(model)
    same = PromptSet(drawn.clean, drawn.clean, drawn.answers, drawn.wrongs, drawn.groups, drawn.group_names)
    with pytest.raises(MeasurementError, match="may be the same|are the same"):
        quick_check(PackedEngine(model, same, patcher, LogitDiff()))


def test_a_patcher_that_changes_nothing():
    class Nothing(Zero):
        reads_activation = True

        def patch(self, act, source, site):
            return act.clone()

    model = tiny_model("gpt2")
    with pytest.raises(MeasurementError, match="Replacing every component with Nothing changed nothing"):
        quick_check(PackedEngine(model, tiny_prompts(), Nothing(), LogitDiff()))


def test_the_self_check_catches_a_patcher_that_hides_that_it_reads():
    """It says that it does not read the activation, but does: skipping would then change its numbers."""

    class Liar(Zero):
        reads_activation = False

        def patch(self, act, source, site):
            return 2 * act

    model = tiny_model("gpt2")
    with pytest.raises(MeasurementError, match="The engine and the naive path give different logits"):
        quick_check(PackedEngine(model, tiny_prompts(), Liar(), LogitDiff()))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("patcher", sorted(PATCHERS))
def test_the_self_check_accepts_what_is_right(family, patcher):
    model = tiny_model(family)
    quick_check(PackedEngine(model, tiny_prompts(), PATCHERS[patcher], LogitDiff()))


# Masks


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (torch.zeros(0, 9, dtype=torch.bool), "The list of masks is empty"),
        (torch.ones(1, 8, dtype=torch.bool), r"masks x 9 units, found \(1, 8\) of torch.bool"),
        (torch.ones(9, dtype=torch.bool), r"masks x 9 units, found \(9,\)"),
        (torch.ones(1, 9), "of torch.float32"),
    ],
)
def test_masks_that_are_none(masks, text):
    model = tiny_model("gpt2")
    for engine, call in itertools.product(engines(model, tiny_prompts(), Mean()), ("score", "percent", "all_logits")):
        with pytest.raises(MeasurementError, match=text):
            getattr(engine, call)(masks)


@pytest.mark.parametrize("base", [torch.ones(8, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool), torch.ones(9)])
def test_a_base_that_is_no_mask(base):
    fast, naive = engines(tiny_model("gpt2"), solvable_prompts(tiny_model("gpt2")), Mean())
    for engine in (fast, naive):
        with pytest.raises(MeasurementError, match="base"):
            engine.score(engine.universe.full()[None], base)


def test_positions_that_contradict_each_other():
    with pytest.raises(MeasurementError, match="'last' and '4' are both token 4 in prompts of group 'g0'"):
        engines(tiny_model("gpt2"), tiny_prompts(n_pos=5), Mean(), Universe.of_nodes(3, 2, ("last", "4")))


def test_a_planted_model_passes_the_self_check():
    quick_check(PackedEngine(planted_model(), planted_prompts(), Mean("conditional"), LogitDiff()))
