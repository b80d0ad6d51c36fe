"""Corruptions: which members a corrupt prompt shows. The corruption decides the circuit, so a study reports several.

A corruption is a pure function of ``(shown, members, others, rng)`` that returns as many members as are shown. A
new one is a function of that form in ``CORRUPTIONS``, or given to a task as ``corruption=``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

Corruption = Callable[[Sequence[str], Sequence[str], Sequence[str], Random], tuple[str, ...]]
"""From the members shown, all members of the task, the members of another kind, and the source of chance."""


def ends_in_step(shown: Sequence[str], members: Sequence[str]) -> bool:
    """Whether the last member shown is the successor of the one before it."""
    return members.index(shown[-1]) - members.index(shown[-2]) == 1


def random_members(shown: Sequence[str], members: Sequence[str], others: Sequence[str], rng: Random) -> tuple[str, ...]:
    """Each member is any member of the task, repeats allowed; only the last pair is never consecutive (the paper's)."""
    while True:
        drawn = tuple(rng.choice(members) for _ in shown)
        if not ends_in_step(drawn, members):
            return drawn


def repeat_last(shown: Sequence[str], members: Sequence[str], others: Sequence[str], rng: Random) -> tuple[str, ...]:
    """The last member stands in the place before it as well: 1 2 3 4 becomes 1 2 4 4."""
    return (*shown[:-2], shown[-1], shown[-1])


def repeat_all(shown: Sequence[str], members: Sequence[str], others: Sequence[str], rng: Random) -> tuple[str, ...]:
    """The last member stands in every place: 1 2 3 4 becomes 4 4 4 4."""
    return (shown[-1],) * len(shown)


def shuffled(shown: Sequence[str], members: Sequence[str], others: Sequence[str], rng: Random) -> tuple[str, ...]:
    """The same members in another order, the last pair not consecutive."""
    while True:
        order = tuple(rng.sample(list(shown), len(shown)))
        if not ends_in_step(order, members):
            return order


def other_kind(shown: Sequence[str], members: Sequence[str], others: Sequence[str], rng: Random) -> tuple[str, ...]:
    """Random members of another kind of sequence, such as months for numerals, the last pair not consecutive."""
    return random_members(shown, others, members, rng)


CORRUPTIONS: dict[str, Corruption] = {
    "random": random_members,
    "repeat_last": repeat_last,
    "repeat_all": repeat_all,
    "shuffled": shuffled,
    "other_kind": other_kind,
}
"""By the name that a task is configured with."""
