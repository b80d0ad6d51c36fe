"""Table: a whole node search by the published algorithm, with the decisions that lead to the published circuits."""

from __future__ import annotations

import random

from torch import Tensor

from bench import limits, subjects
from bench.competitors import PublishedLoop
from bench.measure import Contender, Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel

MEANS = ("plain", "conditional")


def table(options: Options) -> Table:
    """Ours with both kinds of means against the published loop."""
    model = subjects.gpt2(quick=options.quick)
    prompts = subjects.prompts(model, options.n_prompts(8))
    result = Table(f"Node search, {len(model.universe)} nodes, {model.name} shape, {len(prompts)} prompts x {prompts.n_pos} tokens")
    circuits = subjects.circuits(model.universe)
    timed = next(iter(circuits))
    for task, circuit in circuits.items():
        for means in MEANS:
            row, asked = _counted(model, prompts, circuit, means)
            result.rows.append({"circuit": task, "means": means, **row})
            if task == timed:
                say(f"Timing {task}, {means} means, {options.rounds} rounds")
                result.rows[-1] |= _timed(options, model, prompts, circuit, means, asked)
    result.notes.append(
        "FLOPs are those of one candidate at a time; in timed runs the engine guesses ahead as it does for a user. The published loop runs "
        f"three passes for every evaluation, so in each round it runs {_some(options, 181)} random evaluations and is scaled to all. "
        + _agreement(model, prompts, circuits[timed])
    )
    return result


def counts(model: HookedModel, prompts: PromptSet, circuit: Tensor, means: str) -> tuple[dict[str, int], list[Tensor]]:
    """FLOPs of a search: ours, the published loop's, and the limit; and the masks that were scored."""
    asked: list[Tensor] = []
    ours = flops(lambda: asked.extend(subjects.search(model, prompts, circuit, means, speculate=False)))
    loop = PublishedLoop(model, prompts, conditional=means == "conditional")
    one = flops(lambda: loop.evaluate(model.universe.nodes[:2]))
    limit = len(prompts) * limits.scoring(model, prompts.n_pos, asked, n_tokens=len(prompts.asked), conditional=means == "conditional")
    return {"ours": ours, "published": len(asked) * one, "limit": limit}, asked


def _counted(model: HookedModel, prompts: PromptSet, circuit: Tensor, means: str) -> tuple[dict[str, str], list[Tensor]]:
    counted, asked = counts(model, prompts, circuit, means)
    row = {
        "evaluations": str(len(asked)),
        "GFLOP ours": gflop(counted["ours"]),
        "GFLOP published": gflop(counted["published"]),
        "FLOP ratio": times(counted["published"] / counted["ours"]),
        "limit": times(counted["published"] / counted["limit"]),
        "% of limit": f"{100 * counted['limit'] / counted['ours']:.1f}",
    }
    return row, asked


def _timed(options: Options, model: HookedModel, prompts: PromptSet, circuit: Tensor, means: str, asked: list[Tensor]) -> dict[str, str]:
    loop = PublishedLoop(model, prompts, conditional=means == "conditional")
    draw, some = random.Random(0), _some(options, len(asked))
    contenders: dict[str, Contender] = {
        "ours": lambda: subjects.search(model, prompts, circuit, means) and None,
        "published": lambda: [loop.evaluate(model.universe.members(~mask)) for mask in draw.sample(asked, some)] and some / len(asked),
    }
    memory = {"ours": peak_bytes(contenders["ours"]), "published": peak_bytes(lambda: loop.evaluate(model.universe.members(~asked[-1])))}
    taken = interleaved(contenders, options.rounds, warm=False)
    return {
        "wall ours": seconds(taken.median("ours")),
        "wall published": seconds(taken.median("published")),
        "wall ratio": times(taken.ratio("published", "ours")),
        "peak MiB ours": mib(memory["ours"]),
        "peak MiB published": mib(memory["published"]),
    }


def _some(options: Options, evaluations: int) -> int:
    return min(evaluations, max(2, round(options.part * evaluations / 4)))


def _agreement(model: HookedModel, prompts: PromptSet, circuit: Tensor) -> str:
    found = []
    for means in MEANS:
        loop = PublishedLoop(model, prompts, conditional=means == "conditional")
        ours = subjects.engine(model, prompts, means).score(circuit[None])[0]
        found.append(f"{(ours - loop.evaluate(model.universe.members(~circuit))).abs().max():.1g} logits with {means} means")
    return f"Largest difference of a prompt's score in the circuit: {', '.join(found)}."
