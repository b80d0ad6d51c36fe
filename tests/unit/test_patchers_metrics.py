"""Patchers and metrics by hand: literal numbers on tensors that fit on a line."""

from __future__ import annotations

import math

import pytest
import torch
from models_for_tests import random_masks, solvable_prompts, tiny_model, tiny_prompts

from circuitkit.core.errors import ConfigError, MeasurementError
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.base import Baseline
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.packed.replacements import GroupMean, entries
from circuitkit.metrics import KL, Accuracy, AnswerRank, Floor, LogitDiff, ProbDiff
from circuitkit.patchers import Mean, Needs, Resample, Zero

SITE = Node.of_mlp(0)

# Patchers


def test_zero():
    act = torch.tensor([[1.0, -2.0]])
    assert Zero().patch(act, None, SITE).tolist() == [[0.0, 0.0]]
    assert Zero().needs == Needs("none")


@pytest.mark.parametrize("patcher", [Mean(), Resample()])
def test_mean_and_resample_give_what_was_prepared(patcher):
    act, source = torch.ones(2, 3), torch.arange(6.0).view(2, 3)
    assert patcher.patch(act, source, SITE).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_what_they_need():
    assert Resample().needs == Needs("run")
    assert Mean().needs == Needs("mean", "all", conditional=False)
    assert Mean("conditional", "group").needs == Needs("mean", "group", conditional=True)
    assert not any(patcher.reads_activation for patcher in (Zero(), Mean(), Resample()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"means": "condtional"}, "Did you mean 'conditional'. Choices: conditional, plain"),
        ({"pool": "groups"}, "Did you mean 'group'. Choices: all, group"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ConfigError, match=text):
        Mean(**settings)


def test_group_means_by_hand():
    """Groups 0, 1, 0, 3: means of 1 and 5; of 2; of nothing; of 7. Added in two slices."""
    mean = GroupMean(torch.tensor([0, 1, 0, 3]))
    act = torch.tensor([[1.0], [2.0], [5.0], [7.0]])
    mean.add(act[:1], slice(0, 1))
    mean.add(act[1:], slice(1, 4))
    assert mean.value(torch.float32).tolist() == [[3.0], [2.0], [0.0], [7.0]]


def test_means_do_not_drown_in_float32():
    """Sums are held in float64: the mean of large numbers that differ little is right to the last bit."""
    values = torch.tensor([16777216.0, 16777218.0, 16777220.0, 16777222.0])
    mean = GroupMean(torch.zeros(4, dtype=torch.long))
    for row in range(4):
        mean.add(values[row : row + 1], slice(row, row + 1))
    assert mean.value(torch.float64).item() == 16777219.0


def test_which_entry_belongs_to_which_prompt():
    prompts = tiny_prompts(5, n_groups=2)
    assert entries(Needs("run"), prompts).tolist() == [0, 1, 2, 3, 4]
    assert entries(Needs("mean", "group"), prompts).tolist() == [0, 1, 0, 1, 0]
    assert entries(Needs("mean", "all"), prompts).tolist() == [0] * 5
    assert entries(Needs(), prompts).tolist() == [0] * 5


# Metrics: one prompt over four tokens with probabilities 1/8, 1/2, 1/4, 1/8; one over equal ones

LOGITS = torch.tensor([[0.0, math.log(4), math.log(2), 0.0], [3.0, 3.0, 3.0, 3.0]])
PROMPTS = PromptSet(
    torch.zeros(2, 3, dtype=torch.long),
    torch.zeros(2, 3, dtype=torch.long),
    torch.tensor([1, 0]),
    torch.tensor([2, 3]),
    torch.zeros(2).long(),
)
UNIFORM = torch.zeros(2, 4)
EXPECTED = {
    LogitDiff: (math.log(2), 0.0),
    ProbDiff: (0.25, 0.0),
    Accuracy: (1.0, 1.0),  # argmax takes the first of equal ones, which is the answer here
    AnswerRank: (0.0, 1.5),  # three ties count half each
    # KL(uniform || p) = sum 1/4 log(1/4 / p) = (log 2 + log 1/2 + log 1 + log 2) / 4
    KL: (math.log(2) / 4, 0.0),
}


@pytest.mark.parametrize("metric_class", list(EXPECTED))
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3)])
def test_metrics_by_hand(metric_class, leading):
    logits = LOGITS.expand(*leading, 2, 4)
    clean = UNIFORM
    values = metric_class().score(logits, PROMPTS, clean_logits=clean)
    assert values.shape == (*leading, 2) and values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(EXPECTED[metric_class]).expand(*leading, 2), rtol=0, atol=1e-6)


def test_ranks_by_hand():
    logits = torch.tensor([[5.0, 1.0, 3.0, 1.0], [0.0, 9.0, 9.0, -1.0]])
    assert AnswerRank().score(logits, PROMPTS).tolist() == [2.5, 2.0]  # 2 above and one tie; 2 above


def test_kl_says_what_it_needs():
    with pytest.raises(MeasurementError, match="give its logits as clean_logits"):
        KL().score(LOGITS, PROMPTS)


def test_kl_has_a_direction():
    """KL(untouched || patched): an untouched model that is sure costs more than a patched one."""
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    one = PROMPTS.take([0])
    assert KL().score(unsure, one, clean_logits=sure).item() == pytest.approx(math.log(2), abs=1e-3)
    assert KL().score(sure, one, clean_logits=unsure).item() == pytest.approx(5 - math.log(2), abs=1e-3)


def test_metrics_of_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0], [1e4, 1e4, 1e4, 1e4]])
    for metric_class in EXPECTED:
        assert metric_class().score(logits, PROMPTS, clean_logits=logits).isfinite().all()


@pytest.mark.parametrize("metric_class", [LogitDiff, ProbDiff, KL])
def test_gradients_by_finite_differences(metric_class):
    logits = LOGITS.double().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: metric_class().score(x, PROMPTS, clean_logits=torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2).double()), logits
    )


# From metric to percent


def test_percent_of_a_difference_is_a_ratio_of_means():
    """Means 4 (clean) and 3: 75 %; the mean of the ratios 1/2 and 5/6 would be 66.7 %."""
    baseline = Baseline(torch.tensor([2.0, 6.0]), torch.tensor([9.0, 9.0]), Floor.ZERO, "logits")
    values = torch.tensor([[1.0, 5.0], [2.0, 6.0], [0.0, 0.0], [-4.0, -4.0], [8.0, 4.0]])
    assert baseline.percent(values).tolist() == [75.0, 100.0, 0.0, -100.0, 150.0]


def test_percent_of_a_distance_is_measured_from_the_patched_run():
    baseline = Baseline(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 5.0]), Floor.ABLATED, "nats")
    assert baseline.percent(torch.tensor([[1.0, 1.0], [0.0, 0.0], [4.0, 4.0]])).tolist() == [75.0, 100.0, 0.0]


def test_directions_and_units():
    assert {metric().name: (metric.unit, metric.higher_is_better, metric.floor.value) for metric in EXPECTED} == {
        "logit_diff": ("logits", True, "zero"),
        "prob_diff": ("probability", True, "zero"),
        "accuracy": ("share", True, "zero"),
        "answer_rank": ("tokens", False, "ablated"),
        "kl": ("nats", False, "ablated"),
    }


@pytest.mark.parametrize("engine", [PackedEngine, ReferenceEngine])
def test_a_metric_that_compares_gets_the_untouched_model_whatever_is_scored_first(engine):
    """Clean logits are first needed in the middle of a score, where a pass under hooks could give them."""
    model = tiny_model("llama")
    prompts = solvable_prompts(model, n=5)
    masks = random_masks(3, len(model.universe))
    with torch.no_grad():
        clean = model.hf(prompts.clean).logits[:, -1].float()

    class Seen(LogitDiff):
        def score(self, logits, prompts, *, clean_logits=None):
            seen.append(clean_logits)
            return super().score(logits, prompts, clean_logits=clean_logits)

    seen = []
    engine(model, prompts, Mean(), Seen(), max_rows=2).score(masks)
    assert len(seen) == 9 or engine is PackedEngine
    assert all(any(torch.allclose(each, clean[first : first + len(each)], atol=1e-5) for first in range(len(clean))) for each in seen)


def test_no_hook_is_left_while_the_naive_engine_hands_out_logits():
    model = tiny_model("gpt2")
    prompts = solvable_prompts(model, n=4)
    with torch.no_grad():
        clean = model.hf(prompts.clean).logits
        for _ in ReferenceEngine(model, prompts, Mean(), LogitDiff()).passes(model.universe.empty()[None]):
            assert torch.equal(model.hf(prompts.clean).logits, clean)
