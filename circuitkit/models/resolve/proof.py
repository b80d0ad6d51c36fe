"""What proves a map: each of its claims compared with what the model computes, and the refusal of a model that breaks one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend, Block, Evidence, Heads, ModelMap
from circuitkit.models.resolve.compare import error, same, tolerance
from circuitkit.models.resolve.probe import Record, logits_of


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
    return ((total - left.double()).abs() / (size + size.mean())).max().item()


def _heads_error(record: Record, heads: Heads, value: Tensor) -> float:
    """How far the output projection of every single head, summed, is from what the attention gives."""
    call = record.once(heads.out_proj)
    z = call.inputs[0][1].reshape(*value.shape[:-1], heads.n_heads, heads.d_value)
    with torch.no_grad():
        bias = call.module.forward(torch.zeros_like(call.inputs[0][1])).view(value.shape).float()
        total = bias.clone()
        for head in range(heads.n_heads):
            alone = torch.zeros_like(z)
            alone[..., head, :] = z[..., head, :]
            total += call.module.forward(alone.view(call.inputs[0][1].shape)).view(value.shape).float() - bias
    return error(total, value)


def is_causal(logits: Float[Tensor, "row pos d_vocab"]) -> float:
    """How far a change of the last token moves the logits at earlier positions: rows 0 and 1 differ in the last token only."""
    return error(logits[1, :-1], logits[0, :-1])


def is_deterministic(hf: nn.Module, record: Record, names: frozenset[str]) -> Iterator[Evidence]:
    """Runs the model again, one row of it padded on the left, and compares.

    Raises:
        ModelError: The same tokens give other logits.
    """
    ids = record.ids
    inputs: dict[str, Tensor] = {}
    pads = 2 if {"attention_mask", "position_ids"} <= names else 0
    again = ids.clone()
    if pads:
        again[1, pads:] = ids[0, :-pads]
        mask = torch.ones_like(ids)
        mask[1, :pads] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    logits = logits_of(hf, again, **inputs)
    one = Evidence("the same twice", "", error(logits[0], record.logits[0]))
    if not one.error <= tolerance(logits.dtype):
        raise ModelError(
            f"The model gives other logits when it runs again on the same tokens: found a difference of {one.error:.2g} of their spread. It "
            "samples inside of its forward, or remembers the pass before. Expected the same numbers twice; put it into evaluation mode, and "
            "take out what is random."
        )
    yield one
    if pads:
        yield Evidence("padding on the left", "", error(logits[1, pads:], record.logits[0, :-pads]))


def weights_sum(hf: nn.Module) -> dict[str, float]:
    """A number for each tensor of weights, to see whether it changed; NaN where one of them is."""
    return {name: tensor.detach().double().sum().item() if tensor.numel() < 1 << 16 else tensor.detach().sum(dtype=torch.float32).item()
            for name, tensor in hf.named_parameters() if tensor.is_floating_point() and tensor.device.type != "meta"}  # fmt: skip


def check_finite(sums: dict[str, float]) -> None:
    """Raises:
    ModelError: Some weights are no numbers.
    """
    for name, total in sums.items():
        if total != total or total in (float("inf"), float("-inf")):
            raise ModelError(
                f"The weights {name} hold what is no finite number. Expected numbers only: the file is broken, or they were trained into "
                "overflow. Load them again, or take another checkpoint."
            )


def check_unchanged(before: dict[str, float], after: dict[str, float]) -> None:
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
