"""What the engine computes, counted: passes, layers x rows and floating point operations. No seconds, so the same on every machine."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import (
    PATCHERS,
    PLANTED,
    VOCAB,
    engines,
    logits_of,
    planted_model,
    planted_prompts,
    random_masks,
    shared_model,
    solvable_prompts,
    tiny_model,
    tiny_prompts,
)
from torch.utils.flop_counter import FlopCounterMode

from circuitkit.core.circuit import Circuit
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Resample, Zero

N, POS, LAYERS, HEADS, D_HEAD = 6, 5, 4, 2, 4
D = HEADS * D_HEAD
ALL = N * LAYERS  # layers x rows of one whole pass of one mask


def nothing(step):
    """Takes steps and does nothing with them."""


def fast_engine(patcher, **settings) -> PackedEngine:
    model = shared_model("gpt2", LAYERS, HEADS)
    return PackedEngine(model, solvable_prompts(model, N, POS), patcher, LogitDiff(), **settings)


# Corrupt prompts


@pytest.mark.parametrize("name", ["mean_all", "mean_group", "resample"])
def test_the_corrupt_prompts_are_run_once_a_run(name):
    engine = fast_engine(PATCHERS[name])
    IterativePruning(0.8).discover(engine, on_step=nothing)
    Knockout().discover(engine, on_step=nothing)
    assert engine.work.corrupt_passes == 1
    assert engine.work.corrupt_layer_rows == ALL


def test_the_corrupt_prompts_are_run_once_even_in_slices():
    engine = fast_engine(Mean(), max_rows=4)
    engine.percent(random_masks(5, len(engine.universe)))
    assert engine.work.corrupt_passes == 2  # prompts 0-3 and 4-5
    assert engine.work.corrupt_layer_rows == ALL


def test_a_conditional_mean_is_taken_once_for_the_heads_that_it_depends_on():
    """m2's mean depends on the heads out in layers 0 to 2; scoring the same again, or with more heads out above, costs no corrupt pass."""
    engine = fast_engine(Mean("conditional"))
    graph = engine.universe
    engine.baseline()
    first = graph.without(graph.full(), ["a1.h0", "m2"])
    engine.score(first[None], graph.full())
    before = engine.work.corrupt_layer_rows
    engine.score(first[None], graph.full())
    engine.score(graph.without(first, ["a3.h0", "a3.h1"])[None], first)
    assert engine.work.corrupt_layer_rows == before
    engine.score(graph.without(first, ["a2.h0"])[None], first)
    assert engine.work.corrupt_layer_rows > before


def test_a_conditional_mean_below_all_removed_heads_is_the_plain_one():
    engine = fast_engine(Mean("conditional"))
    engine.baseline()
    before = engine.work.corrupt_passes
    engine.score(engine.universe.without(engine.universe.full(), ["m0", "m1", "a2.h0", "a3.h1"])[None])
    assert engine.work.corrupt_passes == before


# Prefixes


def test_baseline_costs_a_corrupt_a_clean_and_a_patched_run():
    engine = fast_engine(Mean())
    engine.baseline()
    engine.baseline()
    assert (engine.work.passes, engine.work.layer_rows) == (3, 3 * ALL)


def test_a_knockout_map_starts_each_mask_at_its_own_layer():
    engine = fast_engine(Mean())
    engine.baseline()
    before = engine.work.layer_rows
    Knockout().discover(engine, on_step=nothing)
    # 2 heads and an MLP a layer; a mask of layer l computes layers l to 3: 4 + 3 + 2 + 1.
    assert engine.work.layer_rows - before == N * (HEADS + 1) * (4 + 3 + 2 + 1)


def test_a_knockout_map_of_a_circuit_reuses_the_circuits_run():
    """The circuit's own run is held as deep as that saves more than it costs; never worse than starting every mask at the first layer."""
    engine = fast_engine(Mean())
    graph = engine.universe
    engine.baseline()
    before = engine.work.layer_rows
    circuit = Circuit.of(graph, graph.without(graph.full(), ["a0.h0", "a3.h1"]))
    Knockout(circuit).discover(engine, on_step=nothing)
    # The circuit's run up to layer 3 where the deepest mask starts, then 2 masks of layer 0, 3 of layers 1 and 2, and 2 of layer 3.
    held, masks = N * 4, N * (2 * 4 + 3 * 3 + 3 * 2 + 2 * 1)
    assert engine.work.layer_rows - before <= held + masks


def test_a_backward_sweep_computes_nothing_below_the_candidate():
    """Layers below the candidate are as in the full model all the way, so no decision ever changes what is held."""
    engine = fast_engine(Mean())
    steps = []
    engine.baseline()
    before = engine.work.layer_rows
    IterativePruning(0.8, max_sweeps=1, speculate=False).discover(engine, on_step=steps.append)
    assert len(steps) == LAYERS * (HEADS + 1)
    close = sum(abs(step.score - 80) <= engine.margin for step in steps)
    assert close == 0  # else the slow path was asked too, which counts its own passes nowhere
    # One mask a candidate, from its layer up. What is held below stays valid, whatever was removed above.
    assert engine.work.layer_rows - before == N * (HEADS + 1) * (4 + 3 + 2 + 1)


def test_a_forward_sweep_goes_on_from_the_last_decision():
    """After a removal in layer l the run is held anew from l on, at most once a candidate."""
    engine = fast_engine(Mean())
    steps = []
    engine.baseline()
    before = engine.work.layer_rows
    IterativePruning(0.8, order="forward", max_sweeps=1, speculate=False).discover(engine, on_step=steps.append)
    removed = {step.node for step in steps if not step.kept}
    assert removed and len(removed) < len(steps)
    scored = N * (HEADS + 1) * (4 + 3 + 2 + 1)
    extended = engine.work.layer_rows - before - scored
    # Held states move up one layer at a time: at most the layer itself, once for each candidate before which something was removed.
    assert 0 < extended <= N * 2 * len(removed)


def test_the_same_call_again_costs_the_same_and_a_deeper_one_less():
    engine = fast_engine(Mean())
    graph = engine.universe
    engine.baseline()
    costs = []
    for name in ("a1.h0", "a1.h0", "m3", "a0.h0"):
        before = engine.work.layer_rows
        engine.score(graph.without(graph.full(), [name])[None], graph.full())
        costs.append((engine.work.layer_rows - before) // N)
    assert costs == [3, 3, 1, 4]


@pytest.mark.parametrize(("max_rows", "passes"), [(None, 1), (18, 2), (6, 6), (4, 12), (1, 36)])
def test_packing_fills_passes(max_rows, passes):
    """Six masks of the same layer x 6 prompts; rows a pass at most as asked."""
    engine = fast_engine(Zero(), max_rows=max_rows)
    graph = engine.universe
    masks = torch.stack([graph.without(graph.full(), [f"a0.h{i % 2}", f"a{1 + i // 2}.h0"]) for i in range(6)])
    engine.clean_logits()
    rows = []
    run = type(engine.model).run
    engine.model.run = lambda ids, *args, **kwargs: (rows.append(len(ids)), run(engine.model, ids, *args, **kwargs))[1]
    try:
        engine.all_logits(masks)
    finally:
        del engine.model.run
    assert len(rows) == passes and max(rows) <= (max_rows or 36) and sum(rows) == 36


def test_speculation_takes_fewer_passes():
    """Nearly all is removed, so nearly every guess comes true: a fifth of the passes, and the same circuit."""
    model, prompts = planted_model(n_layers=6, n_heads=8), planted_prompts(N, POS)
    plain, ahead = (PackedEngine(model, prompts, Mean(), LogitDiff()) for _ in range(2))
    assert ahead.batch == min(2**16 // (N * POS * model.d_model), ahead.budget.rows // N) == 68
    found = [
        IterativePruning(0.8, max_sweeps=1, speculate=speculate).discover(engine, on_step=nothing).names
        for engine, speculate in ((plain, False), (ahead, True))
    ]
    assert found[0] == found[1] == PLANTED
    assert plain.work.passes == 3 + 6 * 9
    assert ahead.work.passes < plain.work.passes / 2


@pytest.mark.parametrize(("patcher", "saves"), [("mean_all", True), ("resample", True), ("zero", False), ("halfway", False)])
def test_positions_that_no_replacement_changes_are_computed_once(patcher, saves):
    """Three of five tokens are the same in all prompts, clean and corrupt: a patched pass need not compute them again."""
    costs = []
    for same in (0, 3):
        fast, naive = engines(shared_model("gpt2", LAYERS, HEADS), tiny_prompts(N, POS, same=same), PATCHERS[patcher])
        fast.clean_logits()
        mask = fast.universe.without(fast.universe.full(), ["a1.h0", "a2.h1"])[None]
        logits_of(fast, mask, fast.universe.full())
        costs.append(flops(lambda fast=fast, mask=mask: logits_of(fast, mask, fast.universe.full())))
    assert (costs[1] < 0.6 * costs[0]) if saves else (costs[1] == costs[0])


# Floating point operations, of matrix products: 2 x rows x inner x columns


def flops(work) -> int:
    """Floating point operations of what a function does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def mm(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def attention(rows: int, pos: int = POS) -> int:
    """GPT-2's attention: q, k and v; scores and mixture; output projection."""
    return mm(rows * pos, D, 3 * D) + 2 * rows * HEADS * mm(pos, D_HEAD, pos) + mm(rows * pos, D, D)


def mlp(rows: int, pos: int = POS) -> int:
    return mm(rows * pos, D, 4 * D) + mm(rows * pos, 4 * D, D)


def unembed(rows: int) -> int:
    """The last position only."""
    return mm(rows, D, VOCAB)


def counted_engine(patcher, **settings) -> PackedEngine:
    """An engine whose corrupt run is made."""
    engine = fast_engine(patcher, **settings)
    engine.all_logits(engine.universe.full()[None])
    return engine


def full_model(rows: int) -> int:
    """Every layer whole, but the last one's output projection and MLP for the last position only."""
    last = attention(rows) - mm(rows * POS, D, D) + mm(rows, D, D) + mlp(rows, 1)
    return (LAYERS - 1) * (attention(rows) + mlp(rows)) + last + unembed(rows)


def test_the_untouched_model_is_computed_once_and_unembedded_at_the_last_position():
    engine = fast_engine(Zero())
    assert flops(engine.clean_logits) == full_model(N)


@pytest.mark.parametrize("patcher", [Zero(), Mean(), Mean(pool="group"), Resample()])
def test_nothing_but_the_unembedding_is_computed_when_everything_is_replaced(patcher):
    engine = counted_engine(patcher)
    masks = engine.universe.empty()[None]
    engine.all_logits(masks)  # the replaced attentions' outputs are made once and kept
    assert flops(lambda: engine.all_logits(masks)) == unembed(N)


def test_replaced_attention_outputs_are_projected_once_a_run():
    engine = counted_engine(Mean())
    masks = engine.universe.empty()[None]
    # One mean a layer, for all prompts; the entry layer's too.
    assert flops(lambda: engine.all_logits(masks)) == unembed(N) + LAYERS * mm(POS, D, D)


def test_a_dead_attention_is_not_computed():
    engine = counted_engine(Zero())
    graph = engine.universe
    mask = graph.without(graph.full(), ["a0.h0", "a1.h0", "a1.h1"])
    engine.all_logits(mask[None])
    # Layer 0's heads are held from the run before, so of its attention only the output projection is computed.
    expected = full_model(N) - (attention(N) - mm(N * POS, D, D)) - attention(N)
    assert flops(lambda: engine.all_logits(mask[None])) == expected


def test_a_dead_mlp_is_not_computed():
    engine = counted_engine(Zero())
    graph = engine.universe
    mask = graph.without(graph.full(), ["a0.h0", "m1", "m2"])
    expected = full_model(N) - (attention(N) - mm(N * POS, D, D)) - 2 * mlp(N)
    assert flops(lambda: engine.all_logits(mask[None])) == expected


def test_a_dead_mlp_of_the_entry_layer_is_not_computed_for_another_mask_that_keeps_it():
    """Two masks that start at the same layer, one without its MLP: the MLP is computed for one of them only."""
    engine = counted_engine(Zero())
    graph = engine.universe
    masks = torch.stack([graph.without(graph.full(), [name]) for name in ("a2.h0", "m2")])
    one = attention(N) + mlp(N)  # a whole layer for one mask
    last = attention(N) - mm(N * POS, D, D) + mm(N, D, D) + mlp(N, 1) + unembed(N)
    # Layer 2 from held heads: an output projection for each mask; the MLP for the first only. Then layer 3 for both.
    assert flops(lambda: engine.all_logits(masks)) == 2 * mm(N * POS, D, D) + mlp(N) + 2 * last
    assert one > mlp(N)


def test_two_masks_in_a_pass_cost_twice_one():
    engine = counted_engine(Zero())
    graph = engine.universe
    masks = torch.stack([graph.without(graph.full(), ["a0.h0"]), graph.without(graph.full(), ["a0.h1"])])
    both, one = (flops(lambda part=part: engine.all_logits(part)) for part in (masks, masks[:1]))
    assert both == 2 * one


def test_a_patcher_that_reads_the_activation_has_everything_computed():
    """Nothing may be skipped, because the replacement depends on what would have been computed."""
    engine = counted_engine(PATCHERS["flipped"])
    empty = engine.universe.empty()[None]
    whole = LAYERS * (attention(N) + mlp(N)) + unembed(N)
    # But what is held of layer 0 from the run before is still good.
    assert flops(lambda: engine.all_logits(empty)) == whole - (attention(N) - mm(N * POS, D, D))


def test_the_corrupt_run_ends_with_the_last_layer():
    """It is made for its activations: no unembedding."""
    engine = fast_engine(Mean())
    assert flops(lambda: engine._collected) == LAYERS * (attention(N) + mlp(N))


def test_all_positions_are_unembedded_only_by_the_naive_path():
    """The comparison itself: it does what the fast path must not."""
    model = tiny_model("gpt2", n_layers=LAYERS)
    fast, naive = engines(model, tiny_prompts(N, POS), Zero())
    mask = fast.universe.full()[None]
    assert flops(lambda: naive.all_logits(mask)) == LAYERS * (attention(N) + mlp(N)) + N * POS * 2 * D * VOCAB
    assert flops(lambda: logits_of(fast, mask)) < flops(lambda: naive.all_logits(mask))
