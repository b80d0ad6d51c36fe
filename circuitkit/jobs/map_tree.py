"""The map of a model as a tree: where each part was found, and how well the checks of the map hold there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.tree import Tree

from circuitkit.models.model_map import Addend, Block, Heads, ModelMap, Projection


def map_tree(model_map: ModelMap, name: str) -> Tree:
    """A line for each part; layers that are built alike share theirs, with the largest error of any of them."""
    root = Tree(f"{name}: {model_map.family}, {_properties(model_map)}")
    root.add(f"embedding: {model_map.embed}")
    described = [(layer, block, tuple(_lines(block))) for layer, block in enumerate(model_map.blocks)]
    for lines, alike in groupby(described, lambda each: each[2]):
        same = list(alike)
        errors = _errors(model_map, [block for _, block, _ in same])
        branch = root.add(f"{_layers([layer for layer, _, _ in same])}: {same[0][1].module}{errors}")
        for depth, text in lines:
            (branch if depth == 0 else branch.children[-1]).add(text)
    root.add(f"final norm: {model_map.final_norm or 'none'}")
    root.add(f"unembedding: {model_map.unembed}")
    for one in model_map.evidence:
        if not one.where:
            root.add(f"{one.name}: {one.error:.1e}")
    return root


def _properties(model_map: ModelMap) -> str:
    found = [
        "positions read earlier ones" if model_map.causal else "positions read all others",
        "" if model_map.caches else "no cache of keys and values",
        "" if model_map.interface else "attention of its own",
        "" if model_map.additive else "each sum goes through a norm",
        "" if model_map.direct else "a head before the unembedding",
        f"override {model_map.override}" if model_map.override else "",
        "" if model_map.evidence else "given, not found",
    ]
    return ", ".join(each for each in found if each)


def _lines(block: Block) -> Iterator[tuple[int, str]]:
    """What a layer has, with paths relative to it."""
    if block.attention is not None:
        kind = "mixer" if block.is_mixer else "attention"
        yield 0, f"{kind}: {_addend(block.attention, block)}"
        if block.heads is not None:
            yield from ((1, text) for text in _heads(block.heads, block))
    if block.mlp is not None:
        reads = " (reads what the attention reads)" if block.parallel else ""
        yield 0, f"{'MLP' if block.neurons else 'MLP without neurons'}: {_addend(block.mlp, block)}{reads}"
        if block.neurons is not None:
            yield 1, f"neurons: what {_within(block.neurons, block)} reads"


def _addend(addend: Addend, block: Block) -> str:
    found = [
        _within(addend.module, block) + ("" if addend.item is None else f"[{addend.item}]"),
        f"reads {_within(addend.norm, block)}" if addend.norm else "reads the residual stream as it is",
        f"added through {_within(addend.post_norm, block)}" if addend.post_norm else "",
        f"times {addend.scale:g}" if addend.scale != 1 else "",
        "" if addend.whole else "only its last projection",
    ]
    return ", ".join(each for each in found if each)


def _heads(heads: Heads, block: Block) -> Iterator[str]:
    groups = "" if heads.n_kv_heads == heads.n_heads else f", {heads.n_kv_heads} of keys and values"
    yield f"{heads.n_heads} heads of {heads.d_head}{groups}: what {_within(heads.out_proj, block)} reads"
    if heads.ports is None:
        yield "queries, keys and values: not told apart"
        return
    yield "queries, keys, values: " + ", ".join(_projection(port, block) for port in heads.ports)


def _projection(port: Projection, block: Block) -> str:
    norm = f" behind {_within(port.norm, block)}" if port.norm else ""
    return _within(port.module, block) + ("" if port.is_whole else f" from column {port.starts[0]}") + norm


def _within(path: str, block: Block) -> str:
    return path.removeprefix(f"{block.module}.")


def _errors(model_map: ModelMap, blocks: list[Block]) -> str:
    """The largest error of each check that looked at these layers or at parts of them."""
    modules = {block.module for block in blocks}
    largest: dict[str, float] = {}
    for one in model_map.evidence:
        if any(one.where == module or one.where.startswith(f"{module}.") for module in modules):
            largest[one.name] = max(largest.get(one.name, 0.0), one.error)
    return "".join(f"; {name} {error:.1e}" for name, error in largest.items())


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
