"""What proves a map: each of its claims compared with what the model computes, and the refusal of a model that breaks one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend, Block, Evidence, Heads, ModelMap
from circuitkit.models.resolve.compare import error, same, tolerance
from circuitkit.models.resolve.probe import Record, logits_of, watched_attention


def evidence(found: ModelMap, record: Record) -> Iterator[Evidence]:
    """The checks that one pass allows.

    Raises:
        ModelError: One of them fails.
    """
    entered = None
    for block in found.blocks:
        call = record.once(block.module)
        left = next(out for place, out in call.outputs if place == block.item)
        stream = [tensor for _, tensor in call.inputs if tensor.shape == left.shape and (entered is None or same(tensor, entered))]
        if not stream:
            raise ModelError(f"{block.module} does not read what the layer before it gave, found another tensor. {_BY_HAND}")
        if found.additive:
            yield _held(Evidence("addends sum to the layer", block.module, _sum_error(record, block, stream[0], left)), left)
        if block.heads is not None and block.attention is not None:
            value = output(record, block.attention)
            yield _held(Evidence("heads sum to the attention", block.heads.out_proj, _heads_error(record, block.heads, value)), value)
        if block.neurons is not None and block.mlp is not None:
            value = output(record, block.mlp)
            given = record.once(block.neurons).outputs[0][1]
            yield _held(Evidence("neurons give the MLP", block.neurons, error(given.view(value.shape), value)), value)
        entered = left


_BY_HAND = "Give the map of the model by hand if you know it better."


def _held(one: Evidence, value: Tensor) -> Evidence:
    """The check, if it holds.

    Raises:
        ModelError: It does not.
    """
    if not one.error <= tolerance(value.dtype):
        raise ModelError(
            f"{one.where}: {one.name} was expected, found a difference of {one.error:.2g} of the spread where rounding allows "
            f"{tolerance(value.dtype):.0e}. {_BY_HAND}"
        )
    return one


def output(record: Record, addend: Addend) -> Tensor:
    """What the module of an addend gave, before post-norm and scale."""
    return next(out for place, out in record.once(addend.module).outputs if place == addend.item)


def _sum_error(record: Record, block: Block, entered: Tensor, left: Tensor) -> float:
    total, size = entered.double(), entered.double().abs()
    for addend in block.addends:
        value = output(record, addend) if addend.post_norm is None else record.once(addend.post_norm).outputs[0][1]
        total = total + addend.scale * value.view(left.shape).double()
        size = size + (addend.scale * value.view(left.shape).double()).abs()
    # Relative to the size of the terms: single dimensions of real models are a thousand times as large as the others.
    return ((total - left.double()).abs() / (size + size.mean()).clamp(min=1e-30)).max().item()


def _heads_error(record: Record, heads: Heads, value: Tensor) -> float:
    """How far the output projection of every single head, summed, is from what the attention gives."""
    call = record.once(heads.out_proj)
    z = call.inputs[0][1].reshape(-1, heads.n_heads, heads.d_value)[-1]
    alone = torch.zeros(heads.n_heads + 1, *z.shape, dtype=z.dtype, device=z.device)
    alone[range(heads.n_heads), range(heads.n_heads)] = z
    with torch.no_grad():
        out = call.module.forward(alone.flatten(1)[:, None])[:, 0].double()
    return error(out[-1] + (out[:-1] - out[-1]).sum(0), value.reshape(-1, value.shape[-1])[-1])


def is_causal(logits: Float[Tensor, "row pos d_vocab"]) -> float:
    """How far a change of the last token moves the logits at earlier positions: rows 0 and 1 differ in the last token only."""
    return error(logits[1, :-1], logits[0, :-1])


_PADS = (1, 3)
"""By how many tokens each of the two rows is padded."""


def again(record: Record, names: frozenset[str], causal: bool) -> tuple[frozenset[str], list[Evidence]]:
    """Runs the model again on the same tokens, padded on the left where it takes a mask, and compares.

    Args:
        record: A pass.
        names: The arguments that the model's forward takes.
        causal: Whether no position reads later ones.

    Returns:
        The names, without the mask where padding changes the numbers; and the checks.

    Raises:
        ModelError: The same tokens give other logits.
    """
    allowed, checks = tolerance(record.logits.dtype), list[Evidence]()
    if causal and "attention_mask" in names:
        ids, mask = record.ids.clone(), torch.ones_like(record.ids)
        for row, pads in enumerate(_PADS):  # every row: with a whole one among them some models leave the mask out
            ids[row, pads:], mask[row, :pads] = record.ids[0, :-pads], 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        logits = _once_more(record, ids, {name: value for name, value in inputs.items() if name in names})
        apart = max(error(logits[row, pads:], record.logits[0, :-pads]) for row, pads in enumerate(_PADS))
        checks.append(Evidence("padding on the left", "", apart))
        if apart > 10 * allowed:  # it may count positions in its own way (RoBERTa)
            names = names - {"attention_mask", "position_ids"}
        if apart <= 0.3 * allowed:
            return names, [Evidence("the same twice", "", apart), *checks]
    same_twice = Evidence("the same twice", "", error(_once_more(record, record.ids, {}), record.logits))
    if not same_twice.error <= 0.3 * allowed:
        raise ModelError(
            f"The model gives other logits when it runs again on the same tokens: found a difference of {same_twice.error:.2g} of their "
            "spread. It samples inside of its forward, or remembers the pass before. Expected the same numbers twice; take out what is "
            "random."
        )
    return names, [same_twice, *checks]


def nothing_passes_by(record: Record, found: ModelMap) -> Evidence:
    """Runs the model with the residual stream of the first row behind the last layer in every row: all have to give its logits.

    Raises:
        ModelError: The logits depend on something else.
    """
    block = found.blocks[-1]

    def same_for_all(_: nn.Module, args: object, out: Any) -> Any:
        stream = out if block.item is None else out[block.item]
        stream = stream[:1].expand_as(stream).clone()
        return stream if block.item is None else (*out[: block.item], stream, *out[block.item + 1 :])

    handle = record.hf.get_submodule(block.module).register_forward_hook(same_for_all)
    try:
        logits = _once_more(record, record.ids, {})
    finally:
        handle.remove()
    return _held(Evidence("all of the logits come from the last layer", block.module, error(logits[2], record.logits[0])), logits)


def holds_keys(hf: nn.Module, ids: Int[Tensor, "row pos"], logits: Float[Tensor, "row pos d_vocab"]) -> Evidence:
    """Runs all but the last three tokens, then these with the keys and values of the others handed back."""
    with torch.no_grad():
        try:
            held = hf(ids[:, :-3], use_cache=True).past_key_values
            found = hf(ids[:, -3:], use_cache=True, past_key_values=held).logits
        except Exception:  # whatever a model does that cannot
            return Evidence(_HELD, "", float("inf"))
    return Evidence(_HELD, "", error(found, logits[:, -3:]))


_HELD = "keys and values handed back"


def check_alike(found: ModelMap) -> None:
    """Raises:
    ModelError: The layers have different numbers of heads.
    """
    numbers = {heads.n_heads: block.module for block in found.blocks if (heads := block.heads) is not None}
    if len(numbers) > 1:
        said = ", ".join(f"{n_heads} in {path}" for n_heads, path in numbers.items())
        raise ModelError(
            f"The layers have different numbers of heads: {said}. Expected the same in every layer with heads; such models are not taken "
            "yet."
        )


def _once_more(record: Record, ids: Int[Tensor, "row pos"], inputs: dict[str, Tensor]) -> Tensor:
    with watched_attention(record.hf, lambda module, q, k, v, z, pattern: z):
        return logits_of(record.hf, ids, **inputs)


def weights_sum(hf: nn.Module) -> dict[str, float]:
    """A number for each tensor of weights, to see whether it changed; NaN where one of them is."""
    return {name: tensor.detach().double().sum().item() if tensor.numel() < 1 << 16 else tensor.detach().sum(dtype=torch.float32).item()
            for name, tensor in hf.named_parameters() if tensor.is_floating_point() and tensor.device.type != "meta"}  # fmt: skip


def check_finite(sums: Mapping[str, float]) -> None:
    """Raises:
    ModelError: Some weights are no numbers.
    """
    for name, total in sums.items():
        if total != total or total in (float("inf"), float("-inf")):
            raise ModelError(
                f"The weights {name} hold what is no finite number. Expected numbers only: the file is broken, or they were trained into "
                "overflow. Load them again, or take another checkpoint."
            )


def check_unchanged(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Raises:
    ModelError: Some weights changed in between.
    """
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        raise ModelError(
            f"The forward pass of the model changes its weights {changed[0]}{' and others' if len(changed) > 1 else ''}. Expected that it "
            "only reads them; results would depend on what ran before."
        )


def tokens(hf: nn.Module, vocabulary: int, length: int, device: torch.device) -> Int[Tensor, "row pos"]:
    """Random token ids of three rows; the second is the first but for its last token."""
    generator = torch.Generator().manual_seed(0)
    low = min(3, vocabulary // 2)  # what comes first in vocabularies is often padding
    ids = torch.randint(low, max(vocabulary, low + 2), (3, length), generator=generator)
    ids[1] = ids[0]
    ids[1, -1] = low + (ids[0, -1] - low + 1) % (max(vocabulary, low + 2) - low)
    return ids.to(device)
