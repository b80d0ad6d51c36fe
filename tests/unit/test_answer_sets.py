"""Weighted sets of answers: what metrics make of them, by hand and against a loop; what is refused; and what counts as 0 %."""

from __future__ import annotations

import json
import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models_for_tests import random_masks, solvable_prompts, tiny_model, tiny_prompts
from test_tasks import wrap
from tokenizers import pre_tokenizers

from circuitkit.core.errors import ConfigError, MeasurementError, PromptError
from circuitkit.core.prompts import Prompt, PromptSet, weighted
from circuitkit.core.token_sets import TokenSets
from circuitkit.engine.base import Baseline
from circuitkit.engine.filtering import Solves
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.metrics import KL, Accuracy, AnswerRank, Floor, LogitDiff, LogProb, ProbDiff, functional
from circuitkit.patchers import Mean
from circuitkit.results import run_info
from circuitkit.tasks import FromFile, GreaterThan
from circuitkit.tasks.encoding import Encoder, encode

# Probabilities 1/8, 1/2, 1/4, 1/8; and equal ones
LOGITS = torch.tensor([[0.0, math.log(4), math.log(2), 0.0], [3.0, 3.0, 3.0, 3.0]])


def prompts_of(answers, wrongs) -> PromptSet:
    n = len(answers)
    return PromptSet(torch.zeros(n, 2).long(), torch.ones(n, 2).long(), TokenSets.of(answers), TokenSets.of(wrongs), torch.zeros(n).long())


PROMPTS = prompts_of([{1: 1.0, 0: 2.0}, {3: 1.0}], [{2: 1.0}, {0: 1.0, 1: 0.5}])
EXPECTED = {
    LogitDiff: (math.log((1 / 2 + 2 / 8) / (1 / 4)), math.log(1 / 1.5)),
    ProbDiff: (1 / 2 + 2 / 8 - 1 / 4, 1 / 4 - 1.5 / 4),
    LogProb: (math.log(1 / 2 + 2 / 8), math.log(1 / 4)),
    Accuracy: (1.0, 0.0),  # argmax takes the first of equal ones, and the answer of the second prompt is the last
    AnswerRank: (0.0, 1.5),
}


@pytest.mark.parametrize("metric", list(EXPECTED))
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_metrics_over_sets_by_hand(metric, leading):
    values = metric().score(LOGITS.expand(*leading, 2, 4), PROMPTS)
    torch.testing.assert_close(values, torch.tensor(EXPECTED[metric]).expand(*leading, 2), rtol=0, atol=1e-6)


def test_answers_that_tie_among_themselves_do_not_push_each_other_down():
    assert AnswerRank().score(torch.tensor([[5.0, 5.0, 5.0, 6.0]]), prompts_of([{0: 1.0, 1: 1.0}], [{3: 1.0}])).tolist() == [1.5]


@given(logits=arrays("float32", (3, 6), elements=st.floats(-20, 20, width=32)), data=st.data())
def test_metrics_over_sets_are_the_loop_over_their_tokens(logits, data):
    sets = []
    for _ in range(3):
        tokens = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=6, unique=True))
        cut = data.draw(st.integers(1, len(tokens) - 1))
        weights = [data.draw(st.sampled_from([1.0, 0.5, 3.0])) for _ in tokens]
        pairs = list(zip(tokens, weights, strict=True))
        sets.append((dict(pairs[:cut]), dict(pairs[cut:])))
    prompts = prompts_of(*map(list, zip(*sets, strict=True)))
    table = torch.from_numpy(logits)
    shares = table.double().softmax(-1).tolist()
    right, wrong = ([sum(w * row[t] for t, w in each[i].items()) for row, each in zip(shares, sets, strict=True)] for i in (0, 1))
    for metric, expected in (
        (LogitDiff(), [math.log(a / b) for a, b in zip(right, wrong, strict=True)]),
        (ProbDiff(), [a - b for a, b in zip(right, wrong, strict=True)]),
        (LogProb(), [math.log(a) for a in right]),
    ):
        torch.testing.assert_close(metric.score(table, prompts), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    # each prompt alone is what it is beside others with larger sets
    for row in range(3):
        alone = prompts_of([sets[row][0]], [sets[row][1]])
        for metric in (LogitDiff(), ProbDiff(), LogProb(), Accuracy(), AnswerRank()):
            torch.testing.assert_close(metric.score(table[row : row + 1], alone), metric.score(table, prompts)[row : row + 1])


def test_one_token_of_weight_one_is_looked_up_and_not_summed():
    """To the last bit, also where the table has room for more."""
    torch.manual_seed(0)
    logits, tokens = 30 * torch.randn(50, 9), torch.randint(0, 9, (50,))
    wide = TokenSets(torch.stack([tokens, tokens], 1), torch.tensor([[1.0, 0.0]]).expand(50, 2))
    assert torch.equal(wide.tokens, tokens)
    assert torch.equal(functional.log_mass(logits, wide), logits[torch.arange(50), tokens])
    assert torch.equal(functional.answer_rank(logits, wide), functional.answer_rank(logits, TokenSets.single(tokens)))


@pytest.mark.parametrize("metric", [LogitDiff, ProbDiff, LogProb])
def test_gradients_over_sets_by_finite_differences(metric):
    logits = LOGITS.double().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: metric().score(x, PROMPTS), logits)


@pytest.mark.parametrize("metric", [LogitDiff, ProbDiff, LogProb, Accuracy, AnswerRank, KL])
def test_engines_agree_over_sets(metric):
    model, drawn = tiny_model("llama"), tiny_prompts(n=5)
    sets = TokenSets.of([{0: 1.0, 3: 2.0}] * 5), TokenSets.of([{5: 1.0, 1: 0.5}] * 5)
    prompts = PromptSet(drawn.clean, drawn.corrupt, *sets, drawn.groups)
    masks = random_masks(3, len(model.universe))
    packed, naive = (engine(model, prompts, Mean(), metric(), max_rows=3).score(masks) for engine in (PackedEngine, ReferenceEngine))
    torch.testing.assert_close(packed, naive, rtol=1e-4, atol=1e-5)


def test_the_filter_takes_any_answer_of_the_set():
    model, prompts = tiny_model("gpt2"), tiny_prompts(n=4)
    with torch.no_grad():
        order = model.hf(prompts.clean).logits[:, -1].argsort(-1, descending=True).tolist()

    def accepted(answers, wrongs) -> list[bool]:
        sets = [TokenSets.of([{row[place]: weight for place, weight in each.items()} for row in order]) for each in (answers, wrongs)]
        return Solves(model)(PromptSet(prompts.clean, prompts.corrupt, *sets, prompts.groups)).tolist()

    assert accepted({0: 1.0, 7: 1.0}, {9: 1.0}) == accepted({7: 1.0, 0: 1.0}, {}) == [True] * 4
    assert accepted({1: 1.0, 2: 1.0}, {}) == [False] * 4, "the likeliest token is no answer"
    assert accepted({0: 1.0}, dict.fromkeys(range(1, len(order[0])), 1.0)) == [False] * 4, "all others together are too likely"


# What is refused


def test_an_answer_that_is_a_wrong_answer_too():
    with pytest.raises(PromptError, match=r"1 of 2 prompts have a token in both sets, the first in row 1: answers \[3, 2\], wrong"):
        prompts_of([{1: 1.0}, {3: 1.0, 2: 1.0}], [{2: 1.0}, {2: 1.0}])
    # padding is no token
    assert len(prompts_of([{1: 1.0, 2: 1.0}, {3: 1.0}], [{4: 1.0}, {0: 1.0}])) == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(PromptError, match=r"weight of an answer must be a number above 0, found .* for ' a'"):
        weighted({" a": weight})


def test_tables_of_sets_that_do_not_fit():
    with pytest.raises(PromptError, match="equal size, prompts x choices"):
        TokenSets(torch.zeros(2, 1).long(), torch.ones(2))
    with pytest.raises(PromptError, match="must be a number above 0"):
        TokenSets(torch.zeros(2, 1).long(), torch.full((2, 1), math.nan))


def test_a_reader_of_one_token_refuses_sets():
    with pytest.raises(PromptError, match="one answer and one wrong answer per prompt.*sets of 1 to 2 tokens.*metric over sets"):
        _ = PROMPTS.answers.tokens
    with pytest.raises(PromptError, match="one answer"):
        _ = TokenSets.of([{1: 0.5}]).tokens


@pytest.mark.parametrize(("metric", "what"), [(LogitDiff, "wrong answer"), (ProbDiff, "wrong answer"), (LogProb, "answer"), (KL, None)])
def test_a_metric_without_what_it_reads(metric, what):
    model, drawn = tiny_model("gpt2"), tiny_prompts(n=2)
    none, some = TokenSets.none(2), TokenSets.of([{1: 1.0}] * 2)
    prompts = PromptSet(drawn.clean, drawn.corrupt, some if what == "wrong answer" else none, none, drawn.groups)
    if what is None:
        assert PackedEngine(model, prompts, Mean(), metric()).score(model.universe.empty()[None]).isfinite().all()
        return
    with pytest.raises(MeasurementError, match=f"needs at least one {what} per prompt, and 2 of 2 prompts have none"):
        PackedEngine(model, prompts, Mean(), metric())


# As text, and from a file

TOKENIZER = wrap(["<s>", "1", "2", "3", "4", "5", "6"], pre_tokenizers.Whitespace())


def test_answers_as_text():
    given = Prompt("1 2 3", "3 1 1", {" 4": 1, " 5": 0.5}, " 3"), Prompt("2 3 4", "1 1 1", " 5", [" 4", " 6"])
    prompts = encode(given, Encoder(TOKENIZER))
    shown = [[TOKENIZER.convert_ids_to_tokens(row[:size]) for row, size in zip(each.ids.tolist(), each.sizes.tolist(), strict=True)]
             for each in (prompts.answers, prompts.wrongs)]  # fmt: skip
    assert shown == [[["4", "5"], ["5"]], [["3"], ["4", "6"]]]
    assert prompts.answers.weights.tolist() == [[1.0, 0.5], [1.0, 0.0]]


def read(tmp_path, *lines) -> PromptSet:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return FromFile(path, filter=False).prompts(TOKENIZER)


GOOD = {"clean": "1 2 3", "corrupt": "3 1 1", "answer": [" 4", " 5"], "wrong": {" 3": 1, " 1": 0.25}}


def test_sets_from_a_file(tmp_path):
    prompts = read(tmp_path, GOOD)
    assert TOKENIZER.convert_ids_to_tokens(prompts.answers.ids[0].tolist()) == ["4", "5"]
    assert prompts.answers.weights.tolist() == [[1.0, 1.0]] and prompts.wrongs.weights.tolist() == [[1.0, 0.25]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": []}, r"has \[\] as 'answer', which must be a text that is not empty, a list of such texts, or an object"),
        ({"answer": [" 4", 5]}, r"has \[' 4', 5\] as 'answer'"),
        ({"answer": {" 4": "1"}}, "'answer', whose weights must be numbers above 0"),
        ({"wrong": {" 4": 0}}, "'wrong': The weight of an answer must be a number above 0, found 0 for ' 4'"),
        ({"answer": [" 4", " 4"]}, "may be named once per prompt"),
        ({"answer": [" 4", " 3"]}, r"Answers and wrong answers must be different tokens, but in both sets is \['3'\]"),
        ({"answer": [" 4", " 5 6"]}, "must be the only one of its prompt, but ' 5 6' behind '1 2 3' has 2 tokens and stands beside 1 more"),
        ({"answer": " 7"}, r"must be in the tokenizer's vocabulary|must add exactly one token"),
        ({"corrupt": "1 1 1 1"}, "as many tokens as its clean twin, but '1 2 3' has 3 and '1 1 1 1' has 4"),
    ],
)
def test_errors_say_which_line(tmp_path, change, sentence):
    with pytest.raises(PromptError, match=rf"(?s)^Line 4 of '.*prompts.jsonl'.*{sentence}"):
        read(tmp_path, GOOD, "", GOOD, GOOD | change, GOOD)


# What counts as 0 %


def test_the_two_normalisations_by_hand():
    clean, ablated, values = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 4.0]])
    assert Baseline(clean, ablated, LogitDiff().floor, "logits").percent(values).tolist() == [75.0]
    assert Baseline(clean, ablated, LogitDiff("ablated").floor, "logits").percent(values).tolist() == [50.0]
    assert Baseline(clean, ablated, LogitDiff("zero").floor, "logits").percent(values).tolist() == [75.0]


def test_what_is_usual_for_a_metric_is_the_default():
    assert {metric.name: metric().floor.value for metric in (LogitDiff, ProbDiff, Accuracy, LogProb, KL, AnswerRank)} == {
        "logit_diff": "zero", "prob_diff": "zero", "accuracy": "zero", "log_prob": "ablated", "kl": "ablated", "answer_rank": "ablated",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"zero of the score \(score.zero\) named 'ablate'. Did you mean 'ablated'"):
        LogitDiff("ablate")
    assert Floor.ABLATED.formula == "100 (m(C) - m(ablated)) / (m(full) - m(ablated))"


def test_an_engine_scores_by_the_zero_of_its_metric_and_says_so():
    model = tiny_model("gpt2")
    prompts = solvable_prompts(model)
    masks = random_masks(3, len(model.universe))
    engine = PackedEngine(model, prompts, Mean(), LogitDiff("ablated"))
    full, ablated = (engine.score(each[None]).double().mean() for each in (model.universe.full(), model.universe.empty()))
    values = engine.score(masks).double().mean(-1)
    torch.testing.assert_close(engine.percent(masks).double(), 100 * (values - ablated) / (full - ablated))
    info = run_info("", engine, {"task": GreaterThan(), "metric": engine.metric}, None)
    assert info.provenance["score"] == {"zero": "ablated", "formula": Floor.ABLATED.formula}
    plain = run_info("", PackedEngine(model, prompts, Mean(), LogitDiff()), {"task": GreaterThan(), "metric": LogitDiff()}, None)
    assert plain.provenance["score"]["zero"] == "zero" and plain.content_hash != info.content_hash


def test_a_distance_has_no_plain_ratio():
    model = tiny_model("gpt2")
    with pytest.raises(MeasurementError, match=r"mean kl is 0 nats, and 0 % is at 0.*another zero \(score.zero: zero, ablated\)"):
        PackedEngine(model, solvable_prompts(model), Mean(), KL("zero")).baseline()


# Annotations


@pytest.mark.parametrize("metric", [*EXPECTED, KL])
def test_shapes_are_as_annotated(metric):
    """Checked with beartype: logits with any mask axes beside those of the untouched model, which has none."""
    beartype = pytest.importorskip("beartype").beartype
    checked = jaxtyping.jaxtyped(typechecker=beartype)
    score = checked(metric.score)
    for leading in ((), (1,), (2, 3)):
        score(metric(), LOGITS.expand(*leading, 2, 4), PROMPTS, clean_logits=LOGITS)
    with pytest.raises(jaxtyping.TypeCheckError):
        score(metric(), LOGITS[0], PROMPTS, clean_logits=LOGITS[0])
    for name, arguments in (
        ("gather", (LOGITS.expand(3, 2, 4), torch.tensor([0, 1]))),
        ("log_probs", (LOGITS.expand(3, 2, 4),)),
        ("log_mass", (LOGITS.expand(3, 2, 4), PROMPTS.answers)),
        ("mass", (LOGITS.expand(3, 2, 4), PROMPTS.answers)),
        ("kl_divergence", (LOGITS.expand(3, 2, 4), LOGITS)),
        ("is_top", (LOGITS.expand(3, 2, 4), PROMPTS.answers)),
    ):
        checked(getattr(functional, name))(*arguments)
