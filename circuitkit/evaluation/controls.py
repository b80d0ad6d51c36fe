"""Controls: sets of components of the same size, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Collection

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Kind, Node
from circuitkit.core.universe import NodeUniverse


def random_sets(universe: NodeUniverse, like: Circuit, *, draws: int, seed: int, avoid: Collection[Node] = ()) -> list[tuple[Node, ...]]:
    """Sets with as many heads and as many MLPs as a circuit, drawn at random without replacement.

    Args:
        universe: All components of the model.
        like: The circuit whose size they have.
        draws: How many sets.
        seed: Of the draws.
        avoid: Components that no set should have. Where too few others are left, all of those are taken and the rest is drawn from these:
            a circuit with nearly all MLPs leaves no other choice.
    """
    source = random.Random(seed)
    sizes = {Kind.HEAD: len(like.heads), Kind.MLP: len(like.mlps)}
    drawn = [[node for kind, size in sizes.items() for node in _drawn(source, universe, kind, size, avoid)] for _ in range(draws)]
    return [universe.members(universe.mask(nodes)) for nodes in drawn]


def _drawn(source: random.Random, universe: NodeUniverse, kind: Kind, size: int, avoid: Collection[Node]) -> list[Node]:
    free = [node for node in universe.nodes if node.kind is kind and node not in avoid]
    if size <= len(free):
        return source.sample(free, size)
    return free + source.sample([node for node in universe.nodes if node.kind is kind and node in avoid], size - len(free))
