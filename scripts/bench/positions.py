"""Table: every head and MLP of GPT-2 Small removed at every position alone."""

from __future__ import annotations

import random

from bench import limits, subjects
from bench.competitors import PlainHooks
from bench.measure import Contender, Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel


def table(options: Options) -> Table:
    """Ours against one full forward a (node, position), by plain hooks."""
    model = subjects.gpt2(quick=options.quick)
    prompts = subjects.prompts(model, options.n_prompts(1))
    graph = model.universe.at(range(prompts.n_pos))
    masks = subjects.single_masks(graph)
    say("Counting")
    counted = counts(model, prompts)
    naive, draw, some = PlainHooks(model, prompts), random.Random(0), max(4, round(options.part * len(graph) / 20))
    naive.prepare()
    contenders: dict[str, Contender] = {
        "circuitkit": lambda: subjects.engine(model, prompts, graph=graph).percent(masks, graph.full()) is None or None,
        "plain hooks": lambda: [naive.score_at(node) for node in draw.sample(graph.nodes, some)] and some / (len(graph) + 2),
    }
    memory = {"circuitkit": peak_bytes(contenders["circuitkit"]), "plain hooks": peak_bytes(lambda: naive.score_at(graph.nodes[0]))}
    say(f"Timing {options.rounds} rounds")
    taken = interleaved(contenders, options.rounds, warm=False)
    result = Table(f"Map of {len(graph)} (node, position) pairs, {model.name} shape, {len(prompts)} prompts x {prompts.n_pos} tokens")
    for name in contenders:
        result.rows.append({
            "who": name,
            "median wall": seconds(taken.median(name)),
            "wall / ours": times(taken.ratio(name, "circuitkit")),
            "GFLOP": gflop(counted[name]),
            "FLOP / ours": times(counted[name] / counted["circuitkit"]),
            "% of limit": f"{100 * counted['limit'] / counted[name]:.1f}",
            "peak MiB": mib(memory[name]),
        })  # fmt: skip
    result.notes.append(
        f"Limit with the causal cone: {gflop(counted['limit'])} GFLOP, {times(counted['plain hooks'] / counted['limit'])} fewer than plain "
        f"hooks, which run {some} pairs a round, drawn anew, and are scaled to all."
    )
    return result


def counts(model: HookedModel, prompts: PromptSet) -> dict[str, int]:
    """FLOPs of the whole map: ours, by plain hooks, and the limit."""
    graph = model.universe.at(range(prompts.n_pos))
    engine, naive = subjects.engine(model, prompts, graph=graph), PlainHooks(model, prompts)
    ours = flops(lambda: (engine.score(graph.empty()[None]), engine.score(subjects.single_masks(graph), graph.full())))
    prepared, one = flops(naive.prepare), flops(lambda: naive.score_at(graph.nodes[0]))
    return {
        "circuitkit": ours,
        "plain hooks": prepared + (len(graph) + 2) * one,
        "limit": len(prompts) * limits.every_position(model, prompts.n_pos, len(prompts.asked)),
    }
