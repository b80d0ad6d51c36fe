"""Table: the map of single knock-outs, every head and MLP of GPT-2 Small removed alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from bench import limits, subjects
from bench.competitors import PlainHooks
from bench.measure import Contender, Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from bench.peer import TransformerLens
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel


def table(options: Options) -> Table:
    """Ours against one full forward per node, by plain hooks and by TransformerLens."""
    model = subjects.gpt2(quick=options.quick)
    prompts = subjects.prompts(model, options.n_prompts(8))
    counted = counts(model, prompts)
    with ExitStack() as stack:
        peer = stack.enter_context(TransformerLens(model, prompts)) if options.peer and TransformerLens.is_there() else None
        return _measure(options, model, prompts, counted, peer)


def counts(model: HookedModel, prompts: PromptSet) -> dict[str, int]:
    """FLOPs of the whole map: ours, by plain hooks, and the limit. All include the clean, the corrupt and the fully patched run."""
    masks = subjects.single_masks(model.universe)
    engine, naive = subjects.engine(model, prompts), PlainHooks(model, prompts)
    ours = flops(lambda: (engine.score(model.universe.empty()[None]), engine.score(masks, model.universe.full())))
    prepared, one = flops(naive.prepare), flops(lambda: naive.score([model.universe.nodes[0]]))
    return {
        "ours": ours,
        "hooks": prepared + (len(masks) + 2) * one,
        "limit": len(prompts) * limits.scoring(model, prompts.n_pos, masks, n_tokens=len(prompts.asked)),
    }


def _measure(options: Options, model: HookedModel, prompts: PromptSet, counted: dict[str, int], peer: TransformerLens | None) -> Table:
    nodes = model.universe.nodes
    masks = subjects.single_masks(model.universe)
    naive = PlainHooks(model, prompts)
    naive.prepare()
    some = max(1, round(options.part * len(nodes)))
    draw = random.Random(0)

    def ours() -> None:
        subjects.engine(model, prompts).percent(masks, model.universe.full())

    def part_of(score: Callable[[list[Node]], object]) -> Contender:
        def run() -> float:
            score(draw.sample(nodes, some))
            return some / (len(nodes) + 2)  # the clean and the fully patched run

        return run

    contenders: dict[str, Contender] = {"ours": ours, "hooks": part_of(lambda chosen: [naive.score([node]) for node in chosen])}
    memory = {"ours": peak_bytes(ours), "hooks": peak_bytes(lambda: naive.score(nodes[:1]))}
    if peer is not None:
        contenders["peer"] = part_of(lambda chosen: peer.scores([str(node) for node in chosen]))
        counted["peer"] = (len(nodes) + 2) * peer.flops([str(nodes[0])])
        memory["peer"] = peer.peak_bytes([str(nodes[0])])
    say(f"Timing {options.rounds} rounds")
    taken = interleaved(contenders, options.rounds)
    labels = {"ours": "circuitkit", "hooks": "plain hooks, a forward a node", "peer": f"TransformerLens {peer.version if peer else ''}"}
    result = Table(f"Single-node map, {len(nodes)} nodes, {model.name} shape, {len(prompts)} prompts x {prompts.n_pos} tokens")
    for name in contenders:
        result.rows.append({
            "who": labels[name],
            "median wall": seconds(taken.median(name)),
            "wall / ours": times(taken.ratio(name, "ours")),
            "GFLOP": gflop(counted[name]),
            "FLOP / ours": times(counted[name] / counted["ours"]),
            "% of limit": f"{100 * counted['limit'] / counted[name]:.1f}",
            "peak MiB": mib(memory[name]),
        })  # fmt: skip
    result.notes.append(
        f"Limit: {gflop(counted['limit'])} GFLOP, {times(counted['hooks'] / counted['limit'])} fewer than plain hooks. In each round the "
        f"others run {some} of {len(nodes)} nodes, drawn anew, and are scaled to all; ours runs everything from nothing. "
        + _agreement(naive, peer, prompts, model, masks)
    )
    return result


def _agreement(naive: PlainHooks, peer: TransformerLens | None, prompts: PromptSet, model: HookedModel, masks: Tensor) -> str:
    nodes = model.universe.nodes[:: max(1, len(masks) // 12)]
    chosen = torch.tensor([model.universe.index(node) for node in nodes])
    ours = subjects.engine(model, prompts).score(masks[chosen], model.universe.full()).mean(-1)
    by_hooks = torch.stack([naive.score([node]).mean() for node in nodes])
    found = {"plain hooks": (ours - by_hooks).abs().max()}
    if peer is not None:
        found["TransformerLens"] = (ours - peer.scores([str(node) for node in nodes])).abs().max()
    return "Largest difference of a score: " + ", ".join(f"{value:.1g} logits to {name}" for name, value in found.items()) + "."
