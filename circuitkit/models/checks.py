"""Whether a model can be trusted to be taken apart: checks that need nothing but the model and some prompts.

Each check is a function of a model and prompts that leaves both as they were. Those of the engine are in ``engine/proof/doctor.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from circuitkit.core.prompts import PromptSet
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel, Layer

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}
"""Largest difference of two exact ways to compute the same, relative to its standard deviation. Kernels of other shapes sum in another
order; what is wrong instead of rounded differs by 1 and more."""


@dataclass(frozen=True)
class Check:
    """What was checked, and what came out.

    Attributes:
        name: One word for it.
        what: What was compared with what.
        difference: The largest difference found, or how many things are wrong where things are counted.
        tolerance: The largest difference that is allowed; 0 where it must be bitwise equal.
        passed: Whether it is allowed.
        detail: What else to know.
    """

    name: str
    what: str
    difference: float
    tolerance: float
    passed: bool
    detail: str = ""

    @classmethod
    def of(cls, name: str, what: str, difference: float, tolerance: float, detail: str = "") -> Check:
        """Judges a difference. NaN never passes."""
        return cls(name, what, float(difference), tolerance, bool(difference <= tolerance), detail)


def tolerance(model: HookedModel) -> float:
    """What rounding may do to a difference in the model's dtype."""
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the standard deviation of what is expected. 0 is bitwise equal; NaN stays NaN."""
    if torch.equal(found, expected):
        return 0.0
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).abs().max() / expected.std().clamp(min=1e-30)).item()


def random_prompts(model: HookedModel, n: int = 4, n_pos: int = 8, seed: int = 0) -> PromptSet:
    """Prompts of random token ids, for models without a tokenizer. Clean and corrupt differ at every position."""
    longest = model.n_ctx or n_pos
    n_tokens = min(model.n_tokens, model.d_vocab)
    generator = torch.Generator().manual_seed(seed)
    shape = (n, min(n_pos, longest))

    def draw(*size: int, low: int = 0) -> Tensor:
        return torch.randint(low, n_tokens, size, generator=generator)

    clean, answers = draw(*shape), draw(n)
    corrupt, wrongs = (clean + draw(*shape, low=1)) % n_tokens, (answers + draw(n, low=1)) % n_tokens
    return PromptSet(clean, corrupt, answers, wrongs, torch.arange(n) % 2, ("even", "odd"))


def finite(model: HookedModel, prompts: PromptSet) -> Check:
    """No weight and no logit is NaN or infinite."""
    weights = [(name, weight) for name, weight in model.hf.named_parameters() if weight.device.type != "meta"]
    wrong = [name for name, weight in weights if not weight.isfinite().all()]
    for which, ids in (("clean", prompts.clean), ("corrupt", prompts.corrupt)):
        wrong += [] if plain(model, ids).isfinite().all() else [f"logits of the {which} prompts"]
    return Check.of("finite", "weights and logits without NaN and infinity (number of tables with some)", len(wrong), 0.0, shortened(wrong))


def no_edit(model: HookedModel, prompts: PromptSet) -> Check:
    """Reading every site changes nothing."""

    def visit(layer: Layer) -> None:
        for site in _sites(layer):
            getattr(layer, site)

    found = model.run(prompts.clean, visit, keep=0)
    assert found is not None
    return Check.of("no_edit", "a pass in which every site is read = the plain forward", relative(found, plain(model, prompts.clean)), 0.0)


def self_patch(model: HookedModel, prompts: PromptSet) -> Check:
    """Writing back what was read changes nothing, and neither does leaving a module out for its own output."""
    seen: dict[tuple[int, str], Tensor] = {}

    def write_back(layer: Layer) -> None:
        for site in _sites(layer):
            seen[layer.index, site] = getattr(layer, site)
            setattr(layer, site, seen[layer.index, site].clone())

    def leave_out(layer: Layer) -> None:
        if layer.block.attention is not None:
            layer.skip_attention(seen[layer.index, "attention_out"])
        if layer.block.mlp is not None:
            layer.skip_mlp(seen[layer.index, "mlp_out"])

    expected = plain(model, prompts.clean)
    differences = {}
    for how, visit in (("written back", write_back), ("left out", leave_out)):
        found = model.run(prompts.clean, visit, keep=0)
        assert found is not None
        differences[how] = relative(found, expected)
    wrong = ", ".join(how for how, difference in differences.items() if difference != 0)
    return Check.of("self_patch", "every site replaced by itself = no edit", largest(differences.values()), 0.0, wrong)


def prefix(model: HookedModel, prompts: PromptSet) -> Check:
    """A pass may start at any layer from what entered it."""
    resids = held(model, prompts.clean)
    expected = plain(model, prompts.clean)
    differences = []
    for start in range(1, model.n_layers):
        found = model.run(prompts.clean, start=start, resid=resids[start], keep=0)
        assert found is not None
        differences.append(relative(found, expected))
    return Check.of("prefix", "starting at each layer from what entered it = the whole forward", largest(differences), 0.0)


def heads_sum(model: HookedModel, prompts: PromptSet) -> Check:
    """The heads' slices through the output projection, one by one, add up to what the attention gives (in Gemma 2 before its norm)."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(layer: Layer) -> None:
        if layer.block.heads is not None:
            seen[layer.index] = layer.z, layer.attention_out

    model.run(prompts.clean, visit, stop=model.n_layers - 1)
    differences = []
    for index, (z, out) in seen.items():
        bias = model.project(index, torch.zeros_like(z)).double()
        total = bias.clone()
        for head in range(model.n_heads):
            alone = torch.zeros_like(z)
            alone[..., head, :] = z[..., head, :]
            total += model.project(index, alone).double() - bias
        differences.append(relative(total, out.double()))
    return Check.of(
        "heads_sum", "heads through the output projection, summed = the attention's output", largest(differences), tolerance(model)
    )


def groups(model: HookedModel, prompts: PromptSet) -> Check:
    """Without the values of one key/value head just the query heads that share it have other outputs."""
    layers = [layer for layer, block in enumerate(model.map.blocks) if block.heads is not None and block.heads.values is not None]
    if not layers:
        return Check.of("groups", "query heads read the values of their key/value head", 0.0, 0.0, "the map names no values of heads")
    one = prompts.clean[:1]
    resids = held(model, one)
    wrong = []
    for index in layers:
        n_groups = _n_groups(model, index)
        rows = one.repeat(n_groups, 1)
        expected = torch.arange(model.n_heads) // (model.n_heads // n_groups) == torch.arange(n_groups)[:, None]
        resid = resids[index].repeat(n_groups, 1, 1)
        untouched = _z(model, rows, index, resid)
        with _values_removed(model, index):
            found = _z(model, rows, index, resid)
        changed = (found != untouched).any(-1).any(1).cpu()
        wrong += [f"a{index}.h{head}" for head in (changed != expected).any(0).nonzero().flatten().tolist()]
    counts = sorted({_n_groups(model, index) for index in layers})
    each = " or ".join(f"{n} key/value heads, {model.n_heads // n} each" for n in counts)
    what = f"{model.n_heads} query heads read the values of {each} (number of heads that do not)"
    return Check.of("groups", what, len(wrong), 0.0, shortened(wrong))


def narrowed(model: HookedModel, prompts: PromptSet) -> Check:
    """The last layer and the unembedding may be computed for the last position only."""

    what = "last layer and unembedding at the last position only = everywhere"
    if not model.map.causal:
        return Check.of("narrowed", what, 0.0, 0.0, "off: positions read later ones")

    def visit(layer: Layer) -> None:
        if layer.index == model.n_layers - 1:
            if layer.block.heads is not None:
                layer.z = layer.z[:, -1:]
            if layer.block.mlp is not None:
                layer.mlp_in = layer.mlp_in[:, -1:]

    found = model.run(prompts.clean, visit)
    assert found is not None
    difference = relative(found[:, -1], plain(model, prompts.clean)[:, -1])
    return Check.of("narrowed", what, difference, tolerance(model))


def padding(model: HookedModel, prompts: PromptSet) -> Check:
    """Tokens on the left that are masked away change nothing, in a batch of prompts of different lengths."""
    what = "prompts padded on the left and masked, in one batch = each without padding"
    if "attention_mask" not in model.map.forward:
        return Check.of("padding", what, 0.0, 0.0, "off: the model takes no attention_mask, and prompts that need padding are refused")
    n_rows, n_pos = prompts.clean.shape
    longest = model.n_ctx or n_pos + 1
    width = min(n_pos + 1, longest)
    lengths = [max(1, width - 1 - row % 3) for row in range(n_rows)]
    ids, mask = (torch.zeros(n_rows, width, dtype=torch.long) for _ in range(2))
    alone = []
    for row, length in enumerate(lengths):
        ids[row, -length:] = prompts.clean[row, :length]
        mask[row, -length:] = 1
        alone.append(plain(model, prompts.clean[row : row + 1, :length])[0, -1])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = plain(model, ids, attention_mask=mask, position_ids=positions)[:, -1]
    return Check.of("padding", what, relative(found, torch.stack(alone)), tolerance(model), f"attention implementation: {model.attention}")


def called(model: HookedModel, prompts: PromptSet) -> Check:
    """Every module in which patches are laid is computed exactly once a pass."""
    counts: dict[str, int] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(model.map.blocks):
            there = {"attention": block.attention, "out_proj": block.heads, "mlp": block.mlp}
            for part in (part for part, found in there.items() if found is not None):
                name = f"{part} of layer {index}"
                counts[name] = 0
                hooks.callback(model.module(index, part).register_forward_hook(_counting(counts, name)).remove)
        plain(model, prompts.clean[:1])
    wrong = [f"{name}: {count} times" for name, count in counts.items() if count != 1]
    return Check.of(
        "called",
        "attention, output projection and MLP of each layer run once a pass (number that do not)",
        len(wrong),
        0.0,
        shortened(wrong),
    )


MODEL_CHECKS: tuple[Callable[[HookedModel, PromptSet], Check], ...] = (
    finite, called, no_edit, self_patch, prefix, heads_sum, groups, narrowed, padding,
)  # fmt: skip
"""In the order in which they are best read: later ones rest on earlier ones."""


def hooks_of(model: HookedModel) -> dict[str, tuple[int, ...]]:
    """How many hooks of each kind every module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: tuple(len(getattr(module, kind)) for kind in kinds) for name, module in model.hf.named_modules()}


def digests_of(model: HookedModel) -> dict[str, str]:
    """A hash of every weight and buffer, also of those that are not saved, such as rotary frequencies. Offloaded weights have none."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in (*model.hf.named_parameters(), *model.hf.named_buffers())
        if tensor.device.type != "meta"
    }


def hooks_gone(model: HookedModel, before: dict[str, tuple[int, ...]]) -> Check:
    """No hook is left behind. ``before`` is what ``hooks_of`` said."""
    wrong = [name or "the model itself" for name, counts in hooks_of(model).items() if counts != before.get(name)]
    return Check.of("hooks_gone", "modules with other hooks than before (number of them)", len(wrong), 0.0, shortened(wrong))


def weights_kept(model: HookedModel, before: dict[str, str]) -> Check:
    """All weights are as before, bit for bit. ``before`` is what ``digests_of`` said."""
    after = digests_of(model)
    wrong = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    offloaded = sum(tensor.device.type == "meta" for tensor in model.hf.parameters())
    left_out = f"{offloaded} offloaded weights were not looked at" if offloaded else ""
    return Check.of(
        "weights_kept", "weights and buffers that are not as before (number of them)", len(wrong), 0.0, shortened(wrong) or left_out
    )


def plain(model: HookedModel, ids: Int[Tensor, "row pos"], **inputs: Any) -> Tensor:
    """Logits at all positions of the model as transformers made it, without nnsight."""
    with torch.no_grad(), unwrapped(model.hf):
        return model.forward(ids, **inputs)


def held(model: HookedModel, ids: Int[Tensor, "row pos"]) -> dict[int, Tensor]:
    """What enters each layer."""
    resids: dict[int, Tensor] = {}

    def visit(layer: Layer) -> None:
        resids[layer.index] = layer.resid

    model.run(ids, visit, stop=model.n_layers - 1)
    return resids


def largest(differences: Any) -> float:
    """The largest of some differences, NaN if one is; 0 of none."""
    values = torch.tensor([0.0, *differences], dtype=torch.float64)
    return values.max().item()


def shortened(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _sites(layer: Layer) -> list[str]:
    """The sites of a layer that are read and written one by one, in the order of computation."""
    block = layer.block
    there = {"resid": block, "z": block.heads, "attention_out": block.attention, "mlp_in": block.mlp, "mlp_out": block.mlp}
    return [site for site, part in there.items() if part is not None]


def _n_groups(model: HookedModel, layer: int) -> int:
    heads = model.map.blocks[layer].heads
    assert heads is not None
    return heads.n_kv_heads


def _z(model: HookedModel, ids: Tensor, index: int, resid: Tensor) -> Tensor:
    """The heads' outputs in one layer."""
    seen: list[Tensor] = []
    model.run(ids, lambda layer: seen.append(layer.z), start=index, resid=resid, stop=index)
    return seen[0]


@contextmanager
def _values_removed(model: HookedModel, index: int) -> Iterator[None]:
    """Within this context row g of a pass has zeros for the values of key/value head g in one layer, by a plain torch hook."""
    heads = model.map.blocks[index].heads
    assert heads is not None and heads.values is not None
    values = heads.values

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        for group in range(values.n_heads):
            out[group, :, values.starts[group] : values.starts[group] + values.width] = 0
        return out

    handle = model.hf.get_submodule(values.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _counting(counts: dict[str, int], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        counts[name] += 1

    return hook
