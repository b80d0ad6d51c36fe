"""Answers of several tokens, by teacher forcing: against single tokens one step at a time, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, VOCAB, difference, random_masks, shared_model
from test_tasks import wrap
from tokenizers import pre_tokenizers

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, MeasurementError, PromptError
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.core.token_sets import TokenSets
from circuitkit.engine.cost import DryEngine
from circuitkit.engine.dense.gradients import Gradients
from circuitkit.engine.filtering import Solves
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.quick import quick_check
from circuitkit.metrics import KL, Accuracy, AnswerRank, LogitDiff, LogProb, ProbDiff, functional
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.tasks import FromFile
from circuitkit.tasks.encoding import Encoder, encode

FEW = settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))


def rows_of(lengths, steps, seed=0):
    """Clean and corrupt tokens of each prompt, and its answer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (length, length, k)]
        for length, k in zip(lengths, steps, strict=True)
    ]


def right(rows, filler):
    longest = max(map(len, rows))
    return torch.tensor([[filler] * (longest - len(row)) + row for row in rows])


def forced(rows, groups) -> PromptSet:
    """The prompts with all but the last token of their answers."""
    clean, corrupt = ([row[which] + row[2][:-1] for row in rows] for which in (0, 1))
    pads = max(map(len, clean)) - torch.tensor(list(map(len, clean)))
    none, names = TokenSets.none(len(rows)), tuple(f"g{group}" for group in range(max(groups) + 1))
    targets = right([row[2] for row in rows], -1)
    return PromptSet(right(clean, 0), right(corrupt, 0), none, none, torch.tensor(groups), names, pads=pads, targets=targets)


def step_by_step(model, rows, patcher, masks, score) -> torch.Tensor:
    """Sums of log-probabilities: for each token of an answer a prompt of its own that ends before it."""
    total = torch.zeros(len(masks), len(rows))
    for place, (clean, corrupt, answer) in enumerate(rows):
        for step, token in enumerate(answer):
            ids = [torch.tensor([each + answer[:step]]) for each in (clean, corrupt)]
            prompts = PromptSet(*ids, torch.tensor([token]), TokenSets.none(1), torch.zeros(1).long())
            total[:, place] += score(ReferenceEngine(model, prompts, patcher, LogProb()))[:, 0]
    return total


@FEW
@given(
    family=st.sampled_from(FAMILIES),
    shapes=st.lists(st.tuples(st.integers(3, 5), st.integers(1, 3)), min_size=2, max_size=5),
    patcher=st.sampled_from([Zero(), Resample()]),
    max_rows=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 100),
)
def test_engines_score_every_token_of_an_answer(family, shapes, patcher, max_rows, seed):
    model, rows = shared_model(family), rows_of(*zip(*shapes, strict=True), seed)
    prompts = forced(rows, [0] * len(rows))
    base = random_masks(1, len(model.universe), seed, keep=0.8)[0]
    masks = torch.stack([model.universe.empty(), base, *(base & random_masks(2, len(model.universe), seed + 1, keep=0.9))])
    expected = step_by_step(model, rows, patcher, masks, lambda engine: engine.score(masks))
    for metric, wanted in ((LogProb(), expected), (LogProb("mean"), expected / torch.tensor([len(row[2]) for row in rows]))):
        fast = PackedEngine(model, prompts, patcher, metric, max_rows=max_rows)
        for given_base in (None, base):
            torch.testing.assert_close(fast.score(masks, given_base), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ReferenceEngine(model, prompts, patcher, metric).score(masks), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("means", ["plain", "conditional"])
def test_means_conditional_means_and_a_shared_prefix(means):
    """Logits at all scored positions are those of the naive path, cones and held keys and values among it."""
    model, rows = shared_model("llama"), rows_of([6] * 4, [3] * 4)
    for row in rows:
        row[0][:4] = row[1][:4] = rows[0][0][:4]
    prompts = forced(rows, [0] * 4)
    fast, naive = (engine(model, prompts, Mean(means), LogProb()) for engine in (PackedEngine, ReferenceEngine))
    assert fast.holds_keys_values
    masks = random_masks(5, len(model.universe))
    expected = naive.all_logits(masks)
    assert expected.shape == (5, 4, 3, model.d_vocab)
    assert difference(fast.all_logits(masks), expected) < 1e-5
    full = model.universe.full()
    single = torch.stack([model.universe.without(full, [node]) for node in model.universe.nodes])
    values = fast.score(single, full)
    torch.testing.assert_close(values, naive.score(single), rtol=1e-4, atol=1e-4)
    quick_check(fast)


def test_edges():
    model, rows = shared_model("gpt2"), rows_of([3, 5], [2, 3])
    prompts = forced(rows, [0, 0])
    circuit = Circuit(tuple(node for place, node in enumerate(model.universe.nodes) if place % 3), model.n_layers, model.n_heads)
    edges = PackedEngine(model, prompts, Resample(), LogProb()).edges(circuit)
    masks, wanted = random_masks(3, len(edges.universe), keep=0.8), list(edges.universe.edges)[::4]
    whole = step_by_step(model, rows, Resample(), masks, lambda engine: engine.edges(circuit).score(masks))
    alone = step_by_step(model, rows, Resample(), wanted, lambda engine: engine.edges(circuit).alone(wanted))
    torch.testing.assert_close(edges.score(masks), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edges.alone(wanted), alone, rtol=1e-4, atol=1e-4)


def test_sum_and_mean_by_hand():
    """Probabilities 1/2 and 1/4 of two tokens, and 1/4 of one."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], [[0.9, 0.05, 0.05], [0.25, 0.25, 0.5]]]))
    targets = torch.tensor([[0, 1], [-1, 0]])
    total = functional.continuation_log_prob(logits.expand(3, 2, 2, 3), targets, mean=False)
    torch.testing.assert_close(total, torch.tensor([math.log(1 / 8), math.log(1 / 4)]).expand(3, 2))
    mean = functional.continuation_log_prob(logits, targets, mean=True)
    torch.testing.assert_close(mean, torch.tensor([math.log(1 / 8) / 2, math.log(1 / 4)]))
    with pytest.raises(ConfigError, match=r"reduction over the tokens of an answer \(metric.reduce\) named 'max'"):
        LogProb("max")


def test_the_filter_wants_every_token_to_be_the_likeliest():
    model = shared_model("llama")
    rows = rows_of([4, 4, 3], [2, 2, 2])
    for row in rows:
        for step in range(2):
            row[2][step] = int(model.hf(torch.tensor([row[0] + row[2][:step]])).logits[0, -1].argmax())
    prompts = forced(rows, [0, 0, 0])
    assert Solves(model)(prompts).tolist() == [True] * 3
    rows[1][2][1] = (rows[1][2][1] + 1) % VOCAB
    assert Solves(model)(forced(rows, [0, 0, 0])).tolist() == [True, False, True]


@pytest.mark.parametrize("metric", [LogitDiff, ProbDiff, KL, Accuracy, AnswerRank])
def test_metrics_that_read_one_token_refuse(metric):
    prompts = forced(rows_of([3, 3], [2, 2]), [0, 0])
    for engine in (PackedEngine, ReferenceEngine, DryEngine):
        with pytest.raises(
            MeasurementError, match=r"reads one token, and these prompts have answers of up to 2 tokens. Use metric=log_prob"
        ):
            engine(shared_model("gpt2"), prompts, Zero(), metric())


def test_gradients_are_of_one_token():
    model = shared_model("gpt2")
    with pytest.raises(MeasurementError, match="Gradients are taken of answers of one token, and these prompts have answers of up to 2"):
        Gradients(model, forced(rows_of([3, 3], [2, 2]), [0, 0]), Zero(), LogProb(), model.universe)


TOKENIZER = wrap(["<s>", *"abcdefg"], pre_tokenizers.Whitespace())


def test_text_and_files(tmp_path):
    given_prompts = Prompt("a b", "b b", " c d e", ()), Prompt("a b c", "b b b", " d", ())
    prompts = encode(given_prompts, Encoder(TOKENIZER), equal=False, several=True)
    shown = [TOKENIZER.convert_ids_to_tokens(row[row >= 0].tolist()) for row in prompts.targets]
    assert shown == [["c", "d", "e"], ["d"]] and prompts.n_scored == 3
    assert [TOKENIZER.convert_ids_to_tokens(row[pad:].tolist()) for row, pad in zip(prompts.corrupt, prompts.pads, strict=True)] == [
        ["b", "b", "c", "d"], ["b", "b", "b"],
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"clean": each.clean, "corrupt": each.corrupt, "answer": each.answer}) for each in given_prompts))
    assert FromFile(path).prompts(TOKENIZER).content_hash() == prompts.content_hash()
    with pytest.raises(PromptError, match="must add exactly one token"):
        encode(given_prompts, Encoder(TOKENIZER), equal=False)


def test_targets_that_do_not_fit():
    prompts = forced(rows_of([3, 3], [2, 2]), [0, 0])
    for targets, sentence in (
        (torch.zeros(1, 2).long(), "2 rows of targets, each with at least one token at its end; found 1 rows of 2"),
        (torch.full((2, 2), -1), "at least one token at its end"),
        (torch.zeros(2, 9).long(), "at least as many tokens as the longest answer, which has 9, and the shortest has 4"),
    ):
        with pytest.raises(PromptError, match=sentence):
            PromptSet(prompts.clean, prompts.corrupt, prompts.answers, prompts.wrongs, prompts.groups, targets=targets)
