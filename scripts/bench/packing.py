"""Table: the same masks scored with more and more rows per pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import subjects
from bench.measure import Contender, Options, Table, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel


def table(options: Options) -> Table:
    """Unpacked (a mask per pass) against more masks per pass, for short and longer prompt sets."""
    result = Table("Packing: random masks from layer 0, scored with different bounds on the rows of a pass")
    tiny, small = subjects.tiny_gpt2, subjects.gpt2
    cases = [(subjects.gpt2(quick=True), 1, 4), (subjects.gpt2(quick=True), 2, 4)]
    if not options.quick:
        cases = [(tiny(), 1, 128), (tiny(), 16, 64), (small(), 1, 32), (small(), 8, 16)]
    for model, n_prompts, n_masks in cases:
        say(f"{model.name}: {n_masks} masks x {n_prompts} prompts, {options.rounds} rounds")
        result.rows += _rows(options, model, subjects.prompts(model, options.prompts or n_prompts), n_masks)
    result.notes.append("`unpacked / this` above 1 means that packing is faster. Peak: memory above what was held before the scoring.")
    return result


def _rows(options: Options, model: HookedModel, prompts: PromptSet, n_masks: int) -> list[dict[str, str]]:
    masks = torch.rand(n_masks, len(model.universe), generator=torch.Generator().manual_seed(0)) < 0.8
    masks[:, 0] = False  # so that all start at layer 0
    bounds = [len(prompts) * 2**power for power in range((n_masks - 1).bit_length() + 1)]
    contenders = {str(bound): _scoring(model, prompts, masks, bound) for bound in bounds}
    memory = {name: peak_bytes(contender) for name, contender in contenders.items()}
    taken = interleaved(contenders, options.rounds, warm=False)
    return [
        {
            "model": model.name,
            "masks x prompts": f"{n_masks} x {len(prompts)}",
            "rows a pass": name,
            "tokens a pass": f"{int(name) * prompts.n_pos:,}",
            "median wall": seconds(taken.median(name)),
            "ms a row": f"{1e3 * taken.median(name) / n_masks / len(prompts):.3g}",
            "unpacked / this": times(taken.ratio(str(bounds[0]), name)),
            "peak MiB": mib(memory[name]),
        }
        for name in contenders
    ]


def _scoring(model: HookedModel, prompts: PromptSet, masks: Tensor, bound: int) -> Contender:
    engine = subjects.engine(model, prompts, max_rows=bound)
    engine.baseline()
    full = model.universe.full()
    return lambda: engine.score(masks, full) is None or None
