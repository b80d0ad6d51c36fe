"""Table: the gradient of the metric by every node's and every edge's mask, on the GPT-2 Small shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import subjects
from bench.measure import Contender, Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import NodeUniverse, Universe
from circuitkit.engine.dense.gradients import Gradients
from circuitkit.metrics import LogitDiff
from circuitkit.models.differentiable import frozen
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Resample

PLAIN = "plain forward and backward"


def table(options: Options) -> Table:
    """Ours against one forward and backward of the same batch by plain autograd."""
    model = subjects.gpt2(quick=options.quick)
    result = Table(f"Gradients of the mean logit difference, Resample, {model.name} shape")
    for n_pos in (subjects.N_POS, 2 * subjects.N_POS if options.quick else 300):
        prompts = subjects.prompts(model, options.n_prompts(8), n_pos)
        say(f"{len(prompts)} prompts x {n_pos} tokens, {options.rounds} rounds")
        result.rows += _rows(options, model, prompts)
    result.notes.append(
        f"`{PLAIN}` is the gate's unit: plain autograd of the metric by what the first layer reads, weights without gradients, the last "
        "position unembedded. Ours starts with nothing each time, the corrupt run included; `again` has it from before, as along a path of "
        "masks. At the full mask, but for `soft`. Peak: memory above what was held before."
    )
    return result


def _rows(options: Options, model: HookedModel, prompts: PromptSet) -> list[dict[str, str]]:
    nodes = model.universe
    edges = Universe.of_edges(model.n_layers, model.n_heads)
    soft = torch.rand(len(nodes), generator=torch.Generator().manual_seed(0))
    soft_edges = torch.rand(len(edges), generator=torch.Generator().manual_seed(0))
    held_nodes, held_edges = gradients(model, prompts, nodes), gradients(model, prompts, edges)
    jobs: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain(model, prompts),
        "the same with gradients of all weights": lambda: with_weights(model, prompts),
        f"all {len(nodes)} nodes": lambda: gradients(model, prompts, nodes).grad(),
        "all nodes, again": lambda: held_nodes.grad(),
        "all nodes, soft": lambda: gradients(model, prompts, nodes).grad(soft),
        f"all {len(edges):,} edges": lambda: gradients(model, prompts, edges).grad(),
        "all edges, again": lambda: held_edges.grad(),
        "all edges, soft": lambda: gradients(model, prompts, edges).grad(soft_edges),
    }
    contenders: dict[str, Contender] = {name: lambda job=job: job() is None or None for name, job in jobs.items()}
    taken = interleaved(contenders, options.rounds)
    memory = {name: peak_bytes(contender) for name, contender in contenders.items()}
    unit = memory[PLAIN]
    return [
        {
            "prompts x tokens": f"{len(prompts)} x {prompts.n_pos}",
            "what": name,
            "median wall": seconds(taken.median(name)),
            "wall / plain": times(taken.ratio(name, PLAIN)),
            "GFLOP": gflop(flops(jobs[name], compute=True)),
            "peak MiB": mib(memory[name]),
            "peak / plain": times((memory[name] or 0) / unit) if unit else "-",
        }
        for name in jobs
    ]


def gradients(model: HookedModel, prompts: PromptSet, universe: NodeUniverse | EdgeUniverse) -> Gradients:
    """With nothing computed, as a user gets it."""
    return Gradients(model, prompts, Resample(), LogitDiff(), universe)


def plain(model: HookedModel, prompts: PromptSet) -> Tensor:
    """The gradient by the embedding, by plain autograd."""
    with frozen(model):
        embedded = model.hf.get_input_embeddings()(prompts.clean).requires_grad_()
        return torch.autograd.grad(_metric(model, prompts, inputs_embeds=embedded), embedded)[0]


def with_weights(model: HookedModel, prompts: PromptSet) -> None:
    """The gradient by every weight."""
    try:
        with torch.enable_grad():
            model.hf.requires_grad_(True)
            _metric(model, prompts, input_ids=prompts.clean).backward()
    finally:
        model.hf.requires_grad_(False)
        model.hf.zero_grad(set_to_none=True)


def _metric(model: HookedModel, prompts: PromptSet, **inputs: Tensor) -> Tensor:
    logits = model.hf(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return LogitDiff().score(logits, prompts).mean()
