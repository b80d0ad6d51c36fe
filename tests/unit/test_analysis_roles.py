"""Attention roles: scores against patterns worked out by hand, and a model whose heads play known roles."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import FAMILIES, shared_model, tiny_model, tiny_prompts
from planted_roles import DUPLICATE, MOVER, NEXT, PREVIOUS, member_prompts, planted_roles

from circuitkit.analysis import OTHER_MEMBER, ROLES, MeanPattern, best, chance, mean_patterns, repeated_tokens, role_scores
from circuitkit.analysis import attention as attention_module
from circuitkit.core.errors import MeasurementError, PromptError
from circuitkit.core.node import Node
from circuitkit.models.attention import attention_patterns

BY_NAME = {role.name: role for role in (*ROLES, OTHER_MEMBER)}

# One head, four positions.
ROWS = [[1.0, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.1, 0.7, 0.2, 0.0], [0.3, 0.1, 0.5, 0.1]]


def by_hand(labels, repeats=(), rows=ROWS, n=1):
    cells = torch.zeros(4, 4, dtype=torch.bool)
    for query, key in repeats:
        cells[query, key] = True
    return MeanPattern("g", ("a", "b", "c", "d"), labels, cells, torch.tensor(rows)[None, None], n)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("similar_member", ((0.6 - 1 / 2) + (0.8 - 2 / 3)) / 2),  # 1 -> 0, 2 -> 0 and 1
        ("previous_member", ((0.6 - 1 / 2) + (0.7 - 1 / 3)) / 2),
        ("last_to_newest", 0.5 - 1 / 4),
        ("last_to_members", 0.9 - 3 / 4),
        ("last_to_repeats", 0.1 - 1 / 4),  # 3 -> 1
        ("duplicate_token", ((0.1 - 1 / 3) + (0.1 - 1 / 4)) / 2),  # 2 -> 0, 3 -> 1
        ("induction", ((0.7 - 1 / 3) + (0.5 - 1 / 4)) / 2),  # 2 -> 1, 3 -> 2
        ("previous_token", ((0.6 - 1 / 2) + (0.7 - 1 / 3) + (0.5 - 1 / 4)) / 3),
    ],
)
def test_scores_by_hand(role, expected):
    pattern = by_hand({"S1": 0, "S2": 1, "S3": 2, "last": 3}, repeats=[(2, 0), (3, 1)])
    assert role_scores([pattern], BY_NAME[role]).item() == pytest.approx(expected, abs=1e-6)


def test_kinds_of_members_are_kept_apart():
    pattern = by_hand({"N1": 0, "S1": 1, "N2": 2, "S2": 3, "last": 3})
    assert role_scores([pattern], BY_NAME["similar_member"]).item() == pytest.approx(((0.1 - 1 / 3) + (0.1 - 1 / 4)) / 2, abs=1e-6)
    others = ((0.6 - 1 / 2) + (0.7 - 1 / 3) + (0.8 - 2 / 4)) / 3  # 1 -> 0, 2 -> 1, 3 -> 0 and 2
    assert role_scores([pattern], OTHER_MEMBER).item() == pytest.approx(others, abs=1e-6)


def test_groups_count_by_their_prompts_and_those_without_the_positions_not_at_all():
    labels = {"S1": 0, "S2": 1}
    even = [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1 / 3] * 3 + [0.0], [0.25] * 4]
    patterns = [by_hand(labels, n=1), by_hand(labels, rows=even, n=3), by_hand({}, n=100)]
    assert role_scores(patterns, BY_NAME["previous_member"]).item() == pytest.approx((0.6 - 0.5) / 4, abs=1e-6)
    with pytest.raises(PromptError, match="previous_member.*label their members S1, S2"):
        role_scores(patterns[2:], BY_NAME["previous_member"])


@pytest.mark.parametrize("family", FAMILIES)
def test_means_over_slices_are_those_of_all_prompts_at_once(family, monkeypatch):
    model, prompts = shared_model(family), tiny_prompts(n=7)
    whole = attention_patterns(model, prompts.clean)
    monkeypatch.setattr(attention_module.RowBudget, "__init__", lambda self, *_: setattr(self, "rows", 2))
    for group, pattern in enumerate(mean_patterns(model, prompts)):
        assert torch.allclose(pattern.mean, whole[:, prompts.groups == group].mean(1), atol=1e-6)
        assert pattern.labels == {"S1": group, "last": 4}
        assert pattern.n == (4, 3)[group]
        assert pattern.tokens == tuple(map(str, prompts.clean[group].tolist()))


def test_a_group_of_which_no_prompt_is_left_is_left_out():
    prompts = tiny_prompts()
    assert [pattern.group for pattern in mean_patterns(shared_model(), prompts.take(prompts.groups == 1))] == ["g1"]


def test_repeats_are_those_of_every_prompt():
    prompts = member_prompts()
    repeats = mean_patterns(planted_roles(), prompts)[0].repeats
    assert {(6, 3), (9, 3), (9, 6), (12, 3)} <= {tuple(cell) for cell in repeats.nonzero().tolist()}, "the periods"
    assert not repeats[:, [2, 5, 8, 11]].any(), "members differ"
    assert not repeats[[0, 13]].any()


def test_the_planted_pattern_is_the_one_that_was_planted():
    prompts = member_prompts()
    pattern = mean_patterns(planted_roles(), prompts)[0].mean
    assert torch.allclose(pattern[0, 3], torch.tril(torch.ones(14, 14)) / torch.arange(1, 15)[:, None], atol=1e-6), "alike"
    for key, query in ((2, 5), (5, 8), (8, 11)):
        assert pattern[0, 1, query, key] == pytest.approx(1, abs=1e-6)
    assert pattern[1, 3, 13, 11] == pytest.approx(1, abs=1e-6)


def test_roles_are_found_on_the_planted_heads_and_no_others():
    model, prompts = planted_roles(), member_prompts()
    patterns, control = mean_patterns(model, prompts), mean_patterns(model, repeated_tokens(model))
    expected = {
        "similar_member": {PREVIOUS},
        "previous_member": {PREVIOUS},
        "last_to_newest": {MOVER, NEXT},
        "last_to_members": {MOVER, NEXT},
        "duplicate_token": {DUPLICATE},
        "induction": set(),
        "previous_token": set(),
    }
    there = [role for role in ROLES if role.name != "last_to_repeats"]
    found = {role.name: {str(node) for node in best(role_scores(control if role.control else patterns, role))} for role in there}
    assert found == expected
    with pytest.raises(PromptError, match="last_to_repeats.*repeat the words of a template"):
        role_scores(patterns, BY_NAME["last_to_repeats"])


# Chance


def test_chance_by_hand():
    """The last query sees four keys. The first does not count, so the newest member at 2 is one of three, and the best of them."""
    newest = BY_NAME["last_to_newest"]
    low, middle, high = (by_hand({"S1": key, "last": 3}) for key in (3, 1, 2))
    head = Node.of_head(0, 0)
    assert chance([high], newest, head) == pytest.approx(1 / 3, abs=0.05)
    assert chance([middle], newest, head) == chance([low], newest, head) == 1.0, "0.1 each: all three draws reach it"
    first = by_hand({"S1": 0, "last": 3})
    assert chance([first], newest, head) == pytest.approx(1 / 2, abs=0.05), "where the role counts the first, so do the draws"


def test_chance_takes_as_many_keys_for_every_query():
    """Members at 0, 1, 2: query 1 has its one key, query 2 both; there is nothing else to draw, but itself."""
    pattern = by_hand({"S1": 0, "S2": 1, "S3": 2})
    # Query 1 draws 0 or 1 (0.6 or 0.4), query 2 two of 0, 1, 2 (0.8, 0.3 or 0.9): the mean reaches (0.6 + 0.8) / 2 in 2 of 6.
    assert chance([pattern], BY_NAME["similar_member"], Node.of_head(0, 0)) == pytest.approx(2 / 6, abs=0.05)


def test_chance_of_the_planted_head_is_small_and_of_an_even_one_certain():
    patterns = mean_patterns(planted_roles(), member_prompts())
    role = BY_NAME["previous_member"]
    assert chance(patterns, role, Node.parse(PREVIOUS)) < 0.01
    assert chance(patterns, role, Node.parse("a1.h1")) == 1.0, "all draws are as good"
    assert chance(patterns, role, Node.parse(PREVIOUS)) == chance(patterns, role, Node.parse(PREVIOUS)), "the draws have a seed"
    with pytest.raises(PromptError, match="last_to_repeats"):
        chance(patterns, BY_NAME["last_to_repeats"], Node.parse(PREVIOUS))


def test_best_takes_threshold_and_number():
    scores = torch.tensor([[0.3, 0.05], [0.5, 0.3]])
    assert [str(node) for node in best(scores)] == ["a1.h0", "a0.h0", "a1.h1"]
    assert [str(node) for node in best(scores, threshold=0.4)] == ["a1.h0"]
    assert [str(node) for node in best(scores, threshold=-1, top=2)] == ["a1.h0", "a0.h0"]
    assert best(scores, threshold=0.6) == ()


# The control


def test_random_tokens_are_said_twice():
    prompts = repeated_tokens(tiny_model("llama"), n=5, period=6, first=0)
    assert prompts.clean.shape == (5, 13) and (prompts.clean[:, 0] == 0).all()
    assert torch.equal(prompts.clean[:, 1:7], prompts.clean[:, 7:])
    assert all(len(set(row)) == 7 for row in prompts.clean.tolist()), "all different, and none is the first"
    again = repeated_tokens(tiny_model("llama"), n=5, period=6, first=0)
    assert torch.equal(prompts.clean, again.clean)
    assert not torch.equal(prompts.clean, repeated_tokens(tiny_model("llama"), n=5, period=6, first=0, seed=1).clean)


def test_they_fit_the_model():
    assert repeated_tokens(tiny_model("llama"), period=50).n_pos == 14, "of 16 positions"
    model = tiny_model("llama")
    model.n_ctx = 4
    with pytest.raises(MeasurementError, match="4 positions"):
        repeated_tokens(model)
