"""Controls: sets of components of the same size, drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

from circuitkit.core.node import Kind, Unit
from circuitkit.core.universe import Universe


def random_sets(
    universe: Universe, like: Collection[Unit], *, draws: int, seed: int, avoid: Collection[Unit] = ()
) -> list[tuple[Unit, ...]]:
    """Sets with as many units of each kind (heads, MLPs, neurons, edges, ...) as a circuit has, drawn at random without replacement.

    Args:
        universe: All units that there are.
        like: The members of the circuit whose size they have.
        draws: How many sets.
        seed: Of the draws.
        avoid: Components that no set should have. Where too few others are left, all of those are taken and the rest is drawn from these:
            a circuit with nearly all MLPs leaves no other choice.
    """
    source = random.Random(seed)
    counts = Counter(unit.kind for unit in like)
    sizes = {kind: counts[kind] for kind in Kind if counts[kind]}
    avoided = set(avoid)
    pools: dict[Kind, tuple[list[Unit], list[Unit]]] = {kind: ([], []) for kind in sizes}
    for unit in universe:
        if unit.kind in pools:
            pools[unit.kind][unit in avoided].append(unit)
    drawn = [[unit for kind, size in sizes.items() for unit in _drawn(source, size, *pools[kind])] for _ in range(draws)]
    return [universe.members(universe.mask(units)) for units in drawn]


def _drawn(source: random.Random, size: int, free: list[Unit], avoided: list[Unit]) -> list[Unit]:
    return source.sample(free, size) if size <= len(free) else free + source.sample(avoided, size - len(free))
