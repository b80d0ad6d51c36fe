"""Looking ahead in a greedy search by guessing: whatever is guessed, decisions are those of going one by one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.node import Node
from circuitkit.core.records import Step
from circuitkit.core.universe import Universe
from circuitkit.methods.guessing import Decision, Guesser

NODES = Universe.of_nodes(3, 2)
EDGES = EdgeUniverse(tuple(Node.parse(name) for name in ("a0.h0", "m0", "m1")), parallel=False)


def search(graph, weights, threshold, guesser, history=()):
    """A greedy search whose score is the sum of the weights that are left, and how often it scored."""
    mask, decided, scored = graph.full(), [], 0
    candidates = list(graph)
    while len(decided) < len(candidates):
        ahead = candidates[len(decided) : len(decided) + guesser.depth]
        found = guesser.recall(ahead, history[len(decided) :])
        if not found:
            scored += 1
            found = guesser.decide(ahead, (float(weights[trial].sum()) for trial in guesser.masks(graph, mask, ahead)), threshold)
        for decision in found:
            mask = mask if decision.kept else graph.without(mask, [decision.candidate])
        decided += found
    return decided, scored


@settings(deadline=None, max_examples=150)
@given(
    graph=st.sampled_from([NODES, EDGES]), seed=st.integers(0, 2**31), threshold=st.integers(-5, 40), limit=st.integers(1, 9),
    removing=st.booleans(),
)  # fmt: skip
def test_guessing_changes_no_decision_and_recalling_no_score(graph, seed, threshold, limit, removing):
    weights = torch.randint(-2, 6, (len(graph),), generator=torch.Generator().manual_seed(seed)).double()
    one_by_one, scored = search(graph, weights, threshold, Guesser(1, removing=removing))
    ahead, times = search(graph, weights, threshold, Guesser(limit, removing=removing))
    assert ahead == one_by_one and times <= scored == len(graph)
    steps = [Step(0, place, str(each.candidate), each.score, each.kept, 0) for place, each in enumerate(ahead)]
    for done in range(len(steps) + 1):
        again, now = search(graph, weights, threshold, Guesser(limit, removing=removing), steps[:done])
        assert again == ahead and now <= times and (done < len(steps) or now == 0)


def test_masks_of_both_guesses():
    mask, candidates = NODES.full(), [NODES.nodes[place] for place in (4, 2, 0)]
    for removing, expected in ((True, [[4], [2, 4], [0, 2, 4]]), (False, [[4], [2], [0]])):
        masks = Guesser(3, removing=removing).masks(NODES, mask, candidates)
        assert [(~trial).nonzero().flatten().tolist() for trial in masks] == expected
    assert mask.all()


def test_decisions_end_behind_the_first_wrong_guess_and_no_score_is_drawn_behind_it():
    drawn = []

    def scores():
        for score in (90.0, 80.0, 95.0):  # 80 is not above 80: that one stays
            drawn.append(score)
            yield score

    guesser = Guesser(4, removing=True)
    assert guesser.decide(["one", "two", "three"], scores(), 80.0) == [Decision("one", 90.0, False), Decision("two", 80.0, True)]
    assert drawn == [90.0, 80.0] and not guesser.removing


def test_it_looks_twice_as_far_after_right_guesses_and_half_as_far_after_a_wrong_one():
    guesser, depths = Guesser(6, removing=True), []
    for scores in ((90.0, 90.0), (90.0,) * 4, (90.0,) * 6, (90.0, 70.0, 90.0), (70.0,) * 3):
        guesser.decide(range(guesser.depth)[: len(scores)], scores, 80.0)
        depths.append((guesser.depth, guesser.removing))
    assert depths == [(4, True), (6, True), (6, True), (3, False), (6, False)]


def test_what_an_earlier_process_did_not_get_to_the_end_of_is_scored_again():
    def step(kept: bool) -> Step:
        return Step(0, 0, "m0", 90.0, kept, 0)

    assert Guesser(4, removing=True).recall("abc", [step(False), step(False)]) == []
    assert len(Guesser(4, removing=True).recall("abc", [step(False), step(True)])) == 2  # a wrong guess had ended it
    assert len(Guesser(4, removing=True).recall("ab", [step(False)] * 3)) == 2
    assert Guesser(4, removing=True).recall("ab", []) == []
