"""Table: every edge of a circuit of 20 heads patched alone, on the GPT-2 Small shape."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench import subjects
from bench.competitors import PlainHooks
from bench.measure import Contender, Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.core.circuit import Circuit
from circuitkit.core.node import PORTS, Edge, Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel

N_HEADS = 20

States = dict[tuple[str, int], Tensor]
"""Activations of a pass: by what they are and layer."""


def table(options: Options) -> Table:
    """Ours against the published way: two whole forward passes an edge, by plain hooks."""
    model = subjects.gpt2(quick=options.quick)
    prompts = subjects.prompts(model, options.n_prompts(8))
    circuit = circuit_of(model)
    say("Counting")
    counted, work = counts(model, prompts, circuit)
    edges, loop, draw = ours(model, prompts, circuit).universe.edges, PathPatching(model, prompts, circuit), random.Random(0)
    loop.prepare()
    some = max(4, round(options.part * len(edges) / 10))
    contenders: dict[str, Contender] = {
        "circuitkit": lambda: ours(model, prompts, circuit).alone(edges) is None or None,
        "plain hooks, two forwards an edge": lambda: [loop.score(edge) for edge in draw.sample(edges, some)] and some / len(edges),
    }
    say(f"Timing {options.rounds} rounds")
    taken = interleaved(contenders, options.rounds, warm=False)
    some_edges = draw.sample(edges, min(some, 20))
    found, wanted = ours(model, prompts, circuit).alone(some_edges), torch.stack([loop.score(edge) for edge in some_edges])
    result = Table(f"{len(edges)} edges of a circuit of {len(circuit.heads)} heads and {len(circuit.mlps)} MLPs, {model.name} shape, "
                   f"{len(prompts)} prompts x {prompts.n_pos} tokens")  # fmt: skip
    for name, contender in contenders.items():
        result.rows.append({
            "who": name,
            "median wall": seconds(taken.median(name)),
            "wall / ours": times(taken.ratio(name, "circuitkit")),
            "GFLOP": gflop(counted[name]),
            "FLOP / ours": times(counted[name] / counted["circuitkit"]),
            "passes": f"{work[name][0]:,}",
            "of whole passes": f"{work[name][1]:,.1f}",
            "peak MiB": mib(peak_bytes(contender)),
        })  # fmt: skip
    rows = work["rows a pass"][0]
    result.notes.append(
        f"A pass has {rows} rows at most: {len(edges)} pairs of sender and receiver x {len(prompts)} prompts / {rows} rows = "
        f"{work['pairs / packed rows'][1]:.1f} passes. `of whole passes`: layers x rows computed, as passes of {rows} rows through all "
        f"{model.n_layers} layers. The others run {some} edges a round, drawn anew, and are scaled to all. Largest difference of a score: "
        f"{(found - wanted).abs().max().item():.0e} logits."
    )
    return result


def counts(model: HookedModel, prompts: PromptSet, circuit: Circuit) -> tuple[dict[str, int], dict[str, tuple[int, float]]]:
    """FLOPs and passes of all edges, ours and by plain hooks."""
    fast, loop = ours(model, prompts, circuit), PathPatching(model, prompts, circuit)
    edges, before = fast.universe.edges, fast.engine.work.layer_rows  # type: ignore[attr-defined]
    passes = fast.engine.work.passes  # type: ignore[attr-defined]
    fast_flops = flops(lambda: fast.alone(edges))
    work = fast.engine.work  # type: ignore[attr-defined]
    rows = fast.engine.budget.rows // len(prompts) * len(prompts)  # type: ignore[attr-defined]
    prepared = flops(loop.prepare)
    slow = prepared + sum(flops(lambda edge=edge: loop.score(edge)) for edge in edges[:: max(1, len(edges) // 16)]) * len(edges) // len(
        edges[:: max(1, len(edges) // 16)]
    )
    whole = rows * model.n_layers
    return {"circuitkit": fast_flops, "plain hooks, two forwards an edge": slow}, {
        "circuitkit": (work.passes - passes, (work.layer_rows - before) / whole),
        "plain hooks, two forwards an edge": (2 * len(edges), 2 * len(edges) * len(prompts) / rows),
        "rows a pass": (rows, rows),
        "pairs / packed rows": (0, len(edges) * len(prompts) / rows),
    }


def ours(model: HookedModel, prompts: PromptSet, circuit: Circuit) -> PackedEdges:
    """The fast engine, from nothing."""
    return PackedEdges(subjects.engine(model, prompts), circuit)


def circuit_of(model: HookedModel) -> Circuit:
    """The published circuit with the most heads and as many more as it takes to have 20; all heads and MLPs of a smaller model."""
    mask = subjects.circuits(model.universe).get("numwords", model.universe.full())
    heads = [node for node in model.universe if node.kind is Kind.HEAD]
    more = [node for node in heads if not mask[model.universe.index(node)]]
    missing = max(0, N_HEADS - sum(bool(mask[model.universe.index(node)]) for node in heads))
    return Circuit((*model.universe.members(mask), *more[-missing:][:missing]), model.n_layers, model.n_heads, model.name)


class PathPatching(PlainHooks):
    """Path patching as it is commonly written for GPT-2: a pass with the sender corrupt and the other heads frozen, in which the receiver's
    input is read, and a pass in which it is given that.

    Args:
        model: A GPT-2; only its torch modules are used.
        prompts: All run at once.
        circuit: Everything outside of it is replaced by its mean.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, circuit: Circuit) -> None:
        super().__init__(model, prompts)
        self._removed = [node for node in model.universe if node not in circuit]
        self._held: list[States] = []

    def prepare(self) -> None:
        """The means, and the circuit's activations on clean and corrupt prompts."""
        super().prepare()
        self._held = [self._run(ids, {}) for ids in (self._clean, self._corrupt)]

    @torch.no_grad()
    def score(self, edge: Edge) -> Tensor:  # type: ignore[override]
        """Logit difference of each prompt with one edge patched."""
        clean, corrupt = self._held
        given = {key: value for key, value in clean.items() if key[0] == "z"}
        kind = {Kind.INPUT: "embed", Kind.HEAD: "z", Kind.MLP: "mlp"}[edge.src.kind]
        key = (kind, max(0, edge.src.layer))
        if edge.src.kind is Kind.HEAD:
            given[key] = _with_head(clean[key], corrupt[key], edge.src.head or 0, self._model.n_heads)
        else:
            given[key] = corrupt[key]
        seen = self._run(self._clean, given)
        logits = self._run(self._clean, self._receiver(edge.dst, clean, seen))["logits", 0]
        return (logits.gather(-1, self._answers[:, None]) - logits.gather(-1, self._wrongs[:, None])).squeeze(-1).cpu()

    def _receiver(self, dst: Node, clean: States, seen: States) -> States:
        if dst.kind is Kind.LOGITS:
            return {("final", 0): seen["final", 0]}
        if dst.kind is Kind.MLP:
            return {("mlp", dst.layer): seen["mlp", dst.layer]}
        key = ("qkv", dst.layer)
        head = PORTS.index(dst.port or "q") * self._model.n_heads + (dst.head or 0)
        return {key: _with_head(clean[key], seen[key], head, 3 * self._model.n_heads)}

    def _run(self, ids: Tensor, given: States) -> States:
        seen: States = {}

        def put(key: tuple[str, int], value: Tensor) -> Tensor:
            seen[key] = given.get(key, value)
            return seen[key]

        body: Any = self._model.hf.transformer
        with torch.no_grad(), unwrapped(self._model.hf), ExitStack() as stack:
            stack.enter_context(self._ablated(self._removed))
            for layer, block in enumerate(body.h):
                stack.enter_context(_out(block.attn.c_attn, lambda value, key=("qkv", layer): put(key, value)))
                stack.enter_context(_in(block.attn.c_proj, lambda value, key=("z", layer): put(key, value)))
                stack.enter_context(_out(block.mlp, lambda value, key=("mlp", layer): put(key, value)))
            stack.enter_context(_in(body.h[0], lambda value: put(("embed", 0), value)))
            stack.enter_context(_in(body.ln_f, lambda value: put(("final", 0), value)))
            seen["logits", 0] = self._model.hf(ids, use_cache=False).logits[:, -1].float()
        return seen


def _with_head(base: Tensor, other: Tensor, head: int, n_heads: int) -> Tensor:
    whole = base.unflatten(-1, (n_heads, -1)).clone()
    whole[..., head, :] = other.unflatten(-1, (n_heads, -1))[..., head, :]
    return whole.flatten(-2)


@contextmanager
def _out(module: nn.Module, change: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in(module: nn.Module, change: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
