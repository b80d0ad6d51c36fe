"""Tables on an accelerator: the single-node map of Llama-2-7B against the card's own matmul rate, and a whole search over 1,536 prompts."""

from __future__ import annotations

import torch

from bench import limits, subjects
from bench.competitors import PlainHooks
from bench.measure import Options, Table, flops, gflop, interleaved, mib, peak_bytes, say, seconds, times
from circuitkit.models.hooked import HookedModel

CUDA = torch.device("cuda")


def table(options: Options) -> Table:
    """Both, or a line that says why not."""
    result = Table("On an accelerator")
    if not torch.cuda.is_available():
        result.notes.append("Skipped: torch finds no CUDA device on this machine.")
        return result
    result.rows += [_map(options), *_search(options)]
    result.notes.append(
        "Rates: FLOPs counted for the job over its median wall time; the card's is that of a square product of the same dtype, measured "
        "in the same run. Every job starts from nothing: the clean, the corrupt and the fully patched run are in it. Plain hooks run 16 "
        "nodes a round, scaled to all."
    )
    return result


def _map(options: Options) -> dict[str, str]:
    model = subjects.llama_7b(quick=options.quick)
    prompts = subjects.prompts(model, options.n_prompts(8), n_pos=20)
    masks, full = subjects.single_masks(model.universe), model.universe.full()
    naive = PlainHooks(model, prompts)
    naive.prepare()
    nodes = model.universe.nodes[:: -(-len(masks) // 16)]

    def ours() -> None:
        engine = subjects.engine(model, prompts)
        engine.score(model.universe.empty()[None])
        engine.score(masks, full)

    say(f"Single-node map of {model.name}: {len(masks)} nodes")
    counted, memory = flops(ours), peak_bytes(ours, CUDA)
    hooks = lambda: [naive.score([node]) for node in nodes] and len(nodes) / (len(masks) + 2)  # noqa: E731
    taken = interleaved({"ours": ours, "hooks": hooks}, options.rounds, CUDA)
    limit = len(prompts) * limits.scoring(model, prompts.n_pos, masks, n_tokens=len(prompts.asked))
    return {
        "job": f"single-node map, {len(masks)} nodes",
        "hooks / ours": times(taken.ratio("hooks", "ours")),
        **_row(model, len(prompts), prompts.n_pos, taken.median("ours"), counted, limit, memory),
    }


def _search(options: Options) -> list[dict[str, str]]:
    model = subjects.gpt2(quick=options.quick, device="cuda")
    prompts = subjects.prompts(model, options.n_prompts(1536))
    task, circuit = next(iter(subjects.circuits(model.universe).items()))
    rows = []
    for means in ("plain", "conditional"):
        say(f"Search over {len(prompts)} prompts, {means} means")
        asked: list[torch.Tensor] = []

        def ours(means: str = means) -> None:
            subjects.search(model, prompts, circuit, means)

        counted = flops(lambda: asked.extend(subjects.search(model, prompts, circuit, means, speculate=False)))  # noqa: B023
        memory = peak_bytes(ours, CUDA)
        taken = interleaved({"ours": ours}, options.rounds, CUDA, warm=False)
        limit = len(prompts) * limits.scoring(model, prompts.n_pos, asked, n_tokens=len(prompts.asked), conditional=means == "conditional")
        rows.append({
            "job": f"search ({task}), {means} means, {len(asked)} evaluations",
            **_row(model, len(prompts), prompts.n_pos, taken.median("ours"), counted, limit, memory),
        })  # fmt: skip
    return rows


def _row(model: HookedModel, n: int, n_pos: int, wall: float, counted: int, limit: int, memory: int | None) -> dict[str, str]:
    card = rate(model.dtype)
    return {
        "model": f"{model.name}, {str(model.dtype).removeprefix('torch.')}",
        "prompts": f"{n} x {n_pos}",
        "median wall": seconds(wall),
        "GFLOP": gflop(counted),
        "% of limit": f"{100 * limit / counted:.1f}",
        "TFLOP/s": f"{counted / wall / 1e12:.1f}",
        "the card's": f"{card / 1e12:.1f}",
        "% of the card's": f"{100 * counted / wall / card:.1f}",
        "peak MiB": mib(memory),
    }


def rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOPs a second of a square product."""
    a, b = torch.randn(2, size, size, device=CUDA, dtype=dtype)
    taken = interleaved({"product": lambda: a @ b is None}, 10, CUDA)
    return 2 * size**3 / taken.median("product")
