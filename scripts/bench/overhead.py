"""Table: what the engine adds to the arithmetic, against the same passes written out by hand and against a bare forward pass."""

from __future__ import annotations

import torch

from bench import subjects
from bench.by_hand import ByHand
from bench.measure import Options, Table, Times, flops, gflop, interleaved, seconds
from circuitkit.core.prompts import PromptSet
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel, Layer


def table(options: Options) -> Table:
    """Every row: ours, the bare equal, and how much longer ours takes."""
    result = Table("Overhead of the engine")
    tiny = subjects.tiny_gpt2()
    cases = [(subjects.gpt2(quick=True), 2)] if options.quick else [(tiny, 8), (tiny, 64), (subjects.gpt2(), 8)]
    for model, default in cases:
        prompts = subjects.prompts(model, options.n_prompts(default))
        result.rows += [_map(options, model, prompts), _trace(options, model, prompts)]
    result.notes.append(
        "`map`: the single-node map from nothing, against the same passes as a plain loop over modules (by_hand.py; equal FLOPs). `pass`: "
        "one packed forward pass whose heads are all read and written back unchanged, against the transformers model's own forward on the "
        "same rows."
    )
    return result


def _map(options: Options, model: HookedModel, prompts: PromptSet) -> dict[str, str]:
    masks = subjects.single_masks(model.universe)
    rows = subjects.engine(model, prompts).budget.rows
    by_hand = ByHand(model.hf, prompts, rows)

    def ours() -> torch.Tensor:
        engine = subjects.engine(model, prompts)
        engine.score(model.universe.empty()[None])
        return engine.score(masks, model.universe.full())

    difference = (ours() - by_hand()).abs().max().item()
    assert difference < 1e-3, f"by hand and engine differ by {difference}"
    taken = interleaved({"ours": lambda: ours() is None, "bare": lambda: by_hand() is None}, options.rounds, warm=False)
    return _row("map", model, prompts, rows, taken, flops(ours), flops(by_hand))


def _trace(options: Options, model: HookedModel, prompts: PromptSet) -> dict[str, str]:
    rows = max(1, subjects.engine(model, prompts).budget.rows // len(prompts)) * len(prompts)
    ids = prompts.clean.repeat(rows // len(prompts), 1)

    def visit(layer: Layer) -> None:
        layer.z = layer.z

    def ours() -> None:
        model.run(ids, visit)

    def bare() -> None:
        with unwrapped(model.hf):
            model.hf(ids, use_cache=False, logits_to_keep=1)

    taken = interleaved({"ours": ours, "bare": bare}, options.rounds if options.quick else 5 * options.rounds)
    return _row("pass", model, prompts, rows, taken, flops(ours), flops(bare))


def _row(what: str, model: HookedModel, prompts: PromptSet, rows: int, taken: Times, ours: int, bare: int) -> dict[str, str]:
    return {
        "what": what,
        "model": model.name,
        "prompts": str(len(prompts)),
        "rows a pass, at most": str(rows),
        "wall ours": seconds(taken.median("ours")),
        "wall bare": seconds(taken.median("bare")),
        "overhead": f"{100 * (taken.ratio('ours', 'bare') - 1):.1f} %",
        "GFLOP ours": gflop(ours),
        "GFLOP bare": gflop(bare),
    }
