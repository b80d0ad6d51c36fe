"""The fast engine against the naive one: random models, masks, bases, packings and patchers must give the same logits."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import (
    FAMILIES,
    PATCHERS,
    Halfway,
    difference,
    engines,
    logits_of,
    random_masks,
    shared_model,
    solvable_prompts,
    tiny_model,
    tiny_prompts,
)

from circuitkit.core.errors import MeasurementError
from circuitkit.core.universe import Universe
from circuitkit.models import slices
from circuitkit.patchers import Mean, Needs, Zero

TOLERANCE = 1e-5
FEW = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
SPANS = ((), (), ("last",), ("S1", "last"), ("0", "2", "last"))


@dataclass(frozen=True)
class Case:
    """One model, prompt set, patcher and packing."""

    family: str
    n_layers: int
    n_heads: int
    n_prompts: int
    n_pos: int
    n_groups: int
    patcher: str
    spans: tuple[str, ...]
    max_rows: int | None
    stride: int
    seed: int
    same: int
    alike: bool
    sliced: bool = True

    def engines(self):
        model = shared_model(self.family, self.n_layers, self.n_heads)
        prompts = tiny_prompts(self.n_prompts, self.n_pos, self.n_groups, self.seed, same=min(self.same, self.n_pos - 1), alike=self.alike)
        graph = Universe.of_nodes(self.n_layers, self.n_heads, self.spans)
        # These models are too narrow for it to be worthwhile.
        with mock.patch.object(slices, "WORTH_FROM", 0 if self.sliced else slices.WORTH_FROM):
            fast, naive = engines(model, prompts, PATCHERS[self.patcher], graph, max_rows=self.max_rows)
        assert (fast._sliced is not None) == (self.sliced and slices.HeadSlices.possible(model) and not fast.patcher.reads_activation)
        fast._clean_lane.trunk.stride = self.stride
        return fast, naive


cases = st.builds(
    Case,
    family=st.sampled_from(FAMILIES),
    n_layers=st.integers(1, 4),
    n_heads=st.sampled_from([1, 2, 3]),
    n_prompts=st.integers(1, 7),
    n_pos=st.integers(4, 7),
    n_groups=st.integers(1, 3),
    patcher=st.sampled_from(sorted(PATCHERS)),
    spans=st.sampled_from(SPANS),
    max_rows=st.sampled_from([None, 1, 2, 3, 5, 8, 64]),
    stride=st.integers(1, 4),
    seed=st.integers(0, 1000),
    same=st.sampled_from([0, 0, 2, 3, 5]),
    alike=st.booleans(),
    sliced=st.sampled_from([True, True, False]),
)


def masks_near(base: torch.Tensor, n: int, changes: int, seed: int) -> torch.Tensor:
    """Masks that differ from a base in a few units, as those of a search do."""
    generator = torch.Generator().manual_seed(seed)
    masks = base.repeat(n, 1)
    for mask in masks:
        places = torch.randint(0, len(base), (changes,), generator=generator)
        mask[places] = ~mask[places]
    return masks


@FEW
@given(case=cases, n_masks=st.integers(1, 6), keep=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]))
def test_random_masks_without_a_base(case, n_masks, keep):
    fast, naive = case.engines()
    masks = random_masks(n_masks, len(fast.universe), case.seed, keep)
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) < TOLERANCE
    assert difference(fast.clean_logits(), naive.clean_logits()) < TOLERANCE


@FEW
@given(
    case=cases,
    calls=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans(), st.sampled_from([0.3, 0.8, 1.0]), st.integers(0, 99)),
        min_size=2,
        max_size=5,
    ),
)
def test_a_sequence_of_calls_with_changing_bases_on_one_engine(case, calls):
    """States that are held from earlier calls must never leak into later ones."""
    fast, naive = case.engines()
    for n_masks, changes, given_base, keep, seed in calls:
        base = random_masks(1, len(fast.universe), seed, keep)[0]
        masks = masks_near(base, n_masks, changes, seed)
        found = logits_of(fast, masks, base if given_base else None)
        assert difference(found, naive.all_logits(masks)) < TOLERANCE


@settings(parent=FEW, max_examples=20)
@given(case=cases, forward=st.booleans(), group=st.integers(1, 3))
def test_a_sweep_that_removes_as_it_goes(case, forward, group):
    """What pruning does: each unit in turn, some at a time, and every second one stays out."""
    fast, naive = case.engines()
    base = fast.universe.full()
    units = list(range(len(base))) if forward else list(reversed(range(len(base))))
    for first in range(0, len(units), group):
        candidates = units[first : first + group]
        masks = base.repeat(len(candidates), 1)
        masks[range(len(candidates)), candidates] = False
        assert difference(logits_of(fast, masks, base), naive.all_logits(masks)) < TOLERANCE
        base = masks[0] if first % 2 else base


# Single paths, so that a failure names what broke


@pytest.mark.parametrize("patcher", sorted(PATCHERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_patcher(family, patcher):
    fast, naive = engines(shared_model(family), tiny_prompts(), PATCHERS[patcher], max_rows=7)
    masks = torch.cat([random_masks(4, len(fast.universe)), fast.universe.empty()[None], fast.universe.full()[None]])
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("patcher", ["mean_group", "conditional_all", "halfway"])
def test_other_dtypes(dtype, patcher):
    """bfloat16 has 8 bits of mantissa, so its kernels of other shapes round otherwise; float64 leaves only the rounding to float32."""
    fast, naive = engines(shared_model("llama", dtype=dtype), tiny_prompts(), PATCHERS[patcher], max_rows=9)
    masks = random_masks(5, len(fast.universe))
    allowed = {torch.bfloat16: 0.1, torch.float64: 1e-6}[dtype]
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) < allowed


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_sdpa_attention(family):
    model = tiny_model(family, attention="sdpa")
    fast, naive = engines(model, tiny_prompts(), Mean())
    masks = random_masks(5, len(fast.universe))
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) < TOLERANCE


@pytest.mark.parametrize("patcher", ["conditional_all", "conditional_group", "shrunk"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conditional_means_under_a_base_that_was_never_scored(patcher, stride):
    """Several MLPs are out already, so means of several layers are missing at once, and the heads do not differ from the base."""
    model = shared_model("gpt2", 4)
    fast, naive = engines(model, tiny_prompts(), PATCHERS[patcher])
    fast._clean_lane.trunk.stride = stride
    base = fast.universe.without(fast.universe.full(), ["a0.h0", "m1", "m2", "a3.h1"])
    masks = torch.stack([base, fast.universe.without(base, ["m3"]), fast.universe.without(base, ["m0"])])
    assert difference(logits_of(fast, masks, base), naive.all_logits(masks)) < TOLERANCE


def test_conditional_means_after_what_was_held_is_dropped(monkeypatch):
    """The store of means is emptied when it is full; what is needed again is computed again."""
    monkeypatch.setattr("circuitkit.engine.packed.conditional._HELD", 3)
    fast, naive = engines(shared_model("gpt2", 4), tiny_prompts(), Mean("conditional"))
    base = fast.universe.without(fast.universe.full(), ["a0.h0", "m0", "m1"])
    for name in ("a1.h1", "m2", "a2.h0", "m3", "a3.h0", "a3.h1", "a0.h1"):
        base = fast.universe.without(base, [name])
        assert difference(logits_of(fast, base[None], base), naive.all_logits(base[None])) < TOLERANCE


def test_conditional_means_with_a_patcher_that_reads_the_activation():
    """Either the same logits as the naive path, or a sentence; never a bare assertion or other numbers."""

    class HalfConditional(Halfway):
        needs = Needs("mean", "all", conditional=True)

    fast, naive = engines(shared_model("gpt2"), tiny_prompts(), HalfConditional())
    masks = random_masks(4, len(fast.universe))
    try:
        found = fast.all_logits(masks)
    except MeasurementError as error:
        assert "reference" in str(error)
    else:
        assert difference(found, naive.all_logits(masks)) < TOLERANCE


def test_stride_follows_the_free_memory(monkeypatch):
    """States of all layers do not fit, so only some are held: the same logits, from an earlier layer."""
    model, prompts = shared_model("gpt2", 4), tiny_prompts()
    a_layer = len(prompts) * prompts.n_pos * 2 * model.d_model * 4
    monkeypatch.setattr("circuitkit.engine.packed.trunk.free_room", lambda model: a_layer / 0.3 * 2.5)
    fast, naive = engines(model, prompts, Mean())
    assert fast._clean_lane.trunk.stride == 2
    base = fast.universe.full()
    for layer in (3, 2, 1, 3, 0):
        masks = torch.stack([fast.universe.without(base, [f"a{layer}.h0"]), fast.universe.without(base, [f"m{layer}"])])
        assert difference(logits_of(fast, masks, base), naive.all_logits(masks)) < TOLERANCE
        base = masks[0]
    assert set(fast._clean_lane.trunk._resid) <= {0, 2}


def test_two_calls_that_are_read_in_turn():
    """``passes`` gives its results bit by bit. A call made meanwhile moves what is held; the first must not go on from there unawares."""
    fast, naive = engines(shared_model("gpt2", 4), tiny_prompts(), Mean(), max_rows=6)
    graph = fast.universe
    base, other = graph.full(), graph.without(graph.full(), ["a0.h0", "m0"])
    masks = torch.stack([graph.without(base, [name]) for name in ("a3.h0", "m3", "a3.h1")])
    fast.clean_logits()
    found = torch.full((3, 6, fast.model.d_vocab), torch.nan)
    for chosen, rows, logits in fast.passes(masks, base):
        found[chosen, rows] = logits
        logits_of(fast, graph.without(other, ["m2"])[None], other)
    assert difference(found, naive.all_logits(masks)) < TOLERANCE


def test_masks_and_base_of_the_caller_may_change_afterwards():
    fast, naive = engines(shared_model("gpt2"), tiny_prompts(), Mean())
    base = fast.universe.without(fast.universe.full(), ["a0.h0"])
    trial = fast.universe.without(base, ["m2"])
    logits_of(fast, trial[None], base)
    base[:] = True
    assert difference(logits_of(fast, trial[None], None), naive.all_logits(trial[None])) < TOLERANCE


def test_the_scores_of_both_engines_and_their_baselines_agree():
    """Not only the logits: metric values, clean and patched baseline, percentages, and the slow path for close decisions."""
    model = shared_model("qwen2")
    fast, naive = engines(model, solvable_prompts(model), Mean(), max_rows=4)
    masks = random_masks(4, len(fast.universe))
    torch.testing.assert_close(fast.score(masks), naive.score(masks), rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.baseline().clean, naive.baseline().clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.baseline().patched, naive.baseline().patched, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.percent(masks), naive.percent(masks), rtol=0, atol=1e-3)
    assert fast.certain(masks[0]) == pytest.approx(naive.percent(masks[:1]).item(), abs=1e-3)


def test_a_broken_engine_is_noticed(monkeypatch):
    """The comparison itself: with the means of another layer laid over, the logits differ."""
    fast, naive = engines(shared_model("gpt2"), tiny_prompts(), Mean())
    tables = fast._collected.mlps
    tables[0], tables[1] = tables[1], tables[0]
    masks = random_masks(3, len(fast.universe))
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) > 0.01


def test_zero_needs_no_corrupt_run():
    fast, _ = engines(shared_model("gpt2"), tiny_prompts(), Zero())
    fast.all_logits(fast.universe.empty()[None])
    assert fast.work.corrupt_passes == 0
