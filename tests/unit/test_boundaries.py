"""Rules just where they turn, in numbers that are worked out by hand: the end of a window, twice as likely, a score on the threshold."""

from __future__ import annotations

from functools import lru_cache
from math import log

import pytest
import torch
from models_for_tests import engines, linear_llama, wire_head

from circuitkit.core.circuit import Circuit
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.filtering import Solves
from circuitkit.methods import EdgePruning, IterativePruning
from circuitkit.methods.guessing import Guesser
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero

# A sliding window. Heads give the mean of what they see, and see the last few tokens. Dimension 0 is 1, dimension 1 the token's value.
#   a0.h0 adds 1 x mean value, a0.h1 adds 2 x mean value to dimension 2; a1.h0 adds the mean of dimension 2 to dimension 3, the logit of
#   token 1. All prompts begin with the tokens 6 3 0.

CLEAN = ((6, 3, 0, 3, 6, 9), (6, 3, 0, 9, 3, 0))
CORRUPT = ((6, 3, 0, 0, 3, 0), (6, 3, 0, 3, 9, 3))


@lru_cache
def windowed(window: int | None) -> HookedModel:
    model = linear_llama(n_layers=2, n_heads=2, d_model=4, vocab=10, window=window)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(10.0)
        model.hf.lm_head.weight[1, 3] = 1.0
        wire_head(model, 0, 0, 1, 2, 1.0)
        wire_head(model, 0, 1, 1, 2, 2.0)
        wire_head(model, 1, 0, 2, 3, 1.0)
    return model


def prompts_of(clean, corrupt, answer: int = 1, wrong: int = 2) -> PromptSet:
    """Prompts with the same answer and the same wrong token, all in one group."""
    ones = torch.ones(len(clean), dtype=torch.long)
    return PromptSet(torch.tensor(clean), torch.tensor(corrupt), answer * ones, wrong * ones, 0 * ones, ("all",))


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        # Window 3. Mean values of the last three tokens, at positions 3, 4, 5: clean 2 3 6, corrupt 1 1 1; second prompt clean 4 4 4,
        # corrupt 2 4 5. a1.h0 gives the mean of dimension 2 at these three positions.
        ("", (11.0, 12.0)),  # dimension 2: 6 9 18 and 12 12 12
        ("a0.h0", (25 / 3, 35 / 3)),  # 1+4 1+6 1+12, 2+8 4+8 5+8
        ("a0.h1", (17 / 3, 34 / 3)),  # 2+2 2+3 2+6, 4+4 8+4 10+4
        ("a0.h0 a0.h1", (3.0, 11.0)),  # 3 3 3, 6 12 15
        ("a1.h0", (3.0, 11.0)),
    ],
)
def test_a_window_of_three_tokens_by_hand(removed, expected, which):
    """Prompts share three tokens, and the window ends inside of them: what is held for shared tokens does not do for the others."""
    engine = engines(windowed(3), prompts_of(CLEAN, CORRUPT), Resample())[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    assert engine.score(torch.stack([mask, mask]))[1].tolist() == pytest.approx(expected, abs=1e-4)


def mean_of_last(values: list[float], window: int | None) -> list[float]:
    """At each position the mean of the values that a window shows."""
    seen = [values[max(0, place + 1 - window) if window else 0 : place + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in seen]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 7, None])
@pytest.mark.parametrize("at", [None, 3, 4])
def test_windows_up_to_the_length_of_the_prompts_and_beyond(window, at):
    """Plain arithmetic, for a head that is replaced everywhere or at one position, scored alone and next to the full model."""
    universe = windowed(window).universe if at is None else windowed(window).universe.at([at])
    fast, naive = engines(windowed(window), prompts_of(CLEAN, CORRUPT), Resample(), universe)
    expected = []
    for clean, corrupt in zip(CLEAN, CORRUPT, strict=True):
        kept, given = (mean_of_last(list(map(float, values)), window) for values in (clean, corrupt))
        head_0 = [other if at in (None, place) else own for place, (own, other) in enumerate(zip(kept, given, strict=True))]
        expected.append(mean_of_last([one + 2 * two for one, two in zip(head_0, kept, strict=True)], window)[-1])
    name = "a0.h0" if at is None else f"a0.h0@{at}"
    for engine in (fast, naive):
        mask = engine.universe.without(engine.universe.full(), [name])
        found = engine.score(torch.stack([engine.universe.full(), mask]), engine.universe.full())
        assert found[1].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("window", "cone"), [(3, False), (5, False), (6, False), (7, True), (None, True)])
def test_shared_tokens_are_left_out_only_where_the_window_shows_the_whole_prompt(window, cone):
    """Six tokens, three of them shared: the cost of it, counted in tokens. A window of six still forgets a token in transformers' cache."""
    fast, _ = engines(windowed(window), prompts_of(CLEAN, CORRUPT), Resample())
    masks = torch.stack([fast.universe.without(fast.universe.full(), [name]) for name in ("a0.h0", "a0.h1", "a1.h0", "a1.h1")])
    fast.score(masks, fast.universe.full())
    before = fast.work.layer_tokens, fast.work.layer_rows
    fast.score(masks, fast.universe.full())
    tokens, rows = fast.work.layer_tokens - before[0], fast.work.layer_rows - before[1]
    assert tokens == rows * (3 if cone else 6)


# Twice as likely. The logits of a prompt are those that its last token asks for: logs of probabilities.

PROBABILITIES = (
    # answer (token 0), last shown member (token 1), other (token 2), accepted
    (0.60, 0.20, 0.20, True),
    (0.50, 0.24, 0.26, True),  # 2.08 times as likely
    (0.50, 0.26, 0.24, False),  # 1.92 times
    (0.40, 0.39, 0.21, False),  # the most likely one, but hardly
    (0.40, 0.10, 0.50, False),  # four times as likely, but something else is likelier still
    (0.30, 0.60, 0.10, False),  # the other way round
    (0.45, 0.05, 0.50, False),
    (0.34, 0.165, 0.30, True),
)


@pytest.fixture(scope="module")
def table() -> HookedModel:
    """No head and no MLP does anything: the logits are a table, one column a token."""
    model = linear_llama(n_layers=1, n_heads=2, d_model=8, vocab=8)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight.copy_(torch.eye(8))
        model.hf.lm_head.weight.fill_(-30.0)
        for token, (answer, wrong, other, _) in enumerate(PROBABILITIES):
            model.hf.lm_head.weight[:3, token] = torch.tensor([log(answer), log(wrong), log(other)])
    return model


@pytest.mark.parametrize("max_rows", [None, 3])
def test_prompts_are_accepted_where_the_answer_is_likeliest_and_more_than_twice_as_likely_as_the_last_member(table, max_rows):
    clean = [[7 - token, token] for token in range(8)]
    accepted = Solves(table, max_rows)(prompts_of(clean, clean, answer=0, wrong=1))
    assert accepted.tolist() == [row[-1] for row in PROBABILITIES]


def test_the_rule_is_about_probabilities_and_not_about_logits(table):
    """A logit that is twice another says nothing: here 6 and 5, which is e times as likely, and 1 and 0.4, which is 1.8 times."""
    with torch.no_grad():
        before = table.hf.lm_head.weight.clone()
        table.hf.lm_head.weight[:2, 0] = torch.tensor([6.0, 5.0])
        table.hf.lm_head.weight[:3, 1] = torch.tensor([1.0, 0.4, 0.0])
    accepted = Solves(table)(prompts_of([[5, 0], [5, 1]], [[5, 0], [5, 1]], answer=0, wrong=1))
    with torch.no_grad():
        table.hf.lm_head.weight.copy_(before)
    assert accepted.tolist() == [True, False]


# A score on the threshold. One layer, four tokens of value 4: a0.h0 gives 3, a0.h1 gives 1, so the logit is 4 and without a0.h1 it is 3,
# which is 75 % to the last bit. On the corrupt prompts all values are 0.


@lru_cache
def three_and_one() -> HookedModel:
    model = linear_llama(n_layers=1, n_heads=2, d_model=4, vocab=8)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        model.hf.lm_head.weight[1, 2] = 1.0
        wire_head(model, 0, 0, 1, 2, 0.75)
        wire_head(model, 0, 1, 1, 2, 0.25)
    return model


FOURS = prompts_of([[4, 4, 4, 4]] * 2, [[0, 0, 0, 0]] * 2)
BELOW = 0.75 - 2**-30


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize(("threshold", "kept"), [(0.75, ("a0.h0", "a0.h1")), (BELOW, ("a0.h0",)), (0.25, ("a0.h0",)), (0.2499, ("a0.h1",))])
def test_a_node_without_which_the_score_is_just_at_the_threshold_stays(threshold, kept, speculate, which):
    """It goes only above. At 0.2499 the first one tried, a0.h0, goes, and then the other cannot."""
    engine = engines(three_and_one(), FOURS, Zero())[which]
    steps = []
    circuit = IterativePruning(threshold, speculate=speculate).discover(engine, on_step=steps.append)
    assert circuit.names == kept
    first = {step.node: step.score for step in reversed(steps)}
    assert (first["m0"], first["a0.h0"]) == (100.0, 25.0)
    if threshold >= 0.25:
        assert first["a0.h1"] == 75.0


@pytest.mark.parametrize("rule", ["single", "cumulative"])
@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.75, ["input->a0.h0<v>", "input->a0.h1<v>", "a0.h0->logits", "a0.h1->logits"]),
        (BELOW, ["input->a0.h0<v>", "a0.h0->logits"]),
    ],
)
def test_an_edge_without_which_the_score_is_just_at_the_threshold_stays(threshold, kept, rule, which, caplog):
    circuit = Circuit.of(three_and_one().universe, three_and_one().universe.mask(["a0.h0", "a0.h1"]))
    steps = []
    engine = engines(three_and_one(), FOURS, Mean())[which]
    method = EdgePruning(circuit, threshold, rule)
    found = method.discover(method.over(engine), on_step=steps.append)
    assert [str(edge) for edge in found.edges] == kept
    scores = {step.node: (step.score, step.kept) for step in steps}
    assert scores["a0.h1->logits"] == (75.0, threshold == 0.75)
    gone = rule == "cumulative" and threshold < 0.75  # a0.h1 was cut off before
    assert scores["a0.h0->logits"] == (0.0 if gone else 25.0, True)
    assert scores["input->a0.h0<q>"] == (75.0 if gone else 100.0, False), "what a head looks at is the same whatever it reads"
    assert found.score == (100.0 if threshold == 0.75 else 75.0)
    assert not caplog.records


@pytest.mark.parametrize(("threshold", "warned"), [(1.0, True), (0.999, False)])
def test_a_circuit_whose_score_is_just_at_the_threshold_is_spoken_of(threshold, warned, caplog):
    circuit = Circuit.of(three_and_one().universe, three_and_one().universe.mask(["a0.h0", "a0.h1"]))
    method = EdgePruning(circuit, threshold)
    method.discover(method.over(engines(three_and_one(), FOURS, Mean())[0]), on_step=lambda step: None)
    assert ("which is not above the threshold of 100.0 %" in caplog.text) == warned


def test_a_decision_at_the_threshold():
    decisions = Guesser(3, removing=True).decide(["a", "b", "c"], [80.0 + 1e-9, 80.0, 90.0], 80.0)
    assert [(decision.candidate, decision.kept) for decision in decisions] == [("a", False), ("b", True)]
