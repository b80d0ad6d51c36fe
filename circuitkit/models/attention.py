"""What heads look at, and the implementation of attention that it takes to see it.

Only eager attention ever holds the pattern: the fused kernels (sdpa, flash) go from queries, keys and values to the output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuitkit.core.errors import ModelError
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.resolve.compare import error, tolerance
from circuitkit.models.resolve.probe import watched_attention

_log = logging.getLogger(__name__)


@contextmanager
def eager_attention(model: HookedModel) -> Iterator[None]:
    """Within this context the model computes its attention eagerly; then as before, also after an error. Weights are not touched."""
    before = model.attention
    if not model.map.interface or not isinstance(model.hf, PreTrainedModel):
        raise ModelError(
            f"The attention of {model.name} ({model.map.family}) does not go through transformers' attention interface, so its patterns "
            "are not to be seen. Measure heads by removing them (method=knockout)."
        )
    if before == "eager":
        yield
        return
    _log.info("%s does not keep attention patterns: %s computes attention eagerly while they are read.", before, model.name)
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def attention_patterns(
    model: HookedModel, ids: Int[Tensor, "prompt pos"], layers: Iterable[int] | None = None
) -> Float[Tensor, "layer prompt head query key"]:
    """Which positions each head looks at, and how much: rows sum to 1, and no query sees a later key.

    Args:
        model: The model, with any implementation of attention.
        ids: Token ids.
        layers: Which layers, in the order in which they are wanted; negative ones count from the end. None for all.

    Returns:
        Patterns in float32, on the device that token ids go to.

    Raises:
        ModelError: The model has no such layer.
    """
    chosen = list(range(model.n_layers)) if layers is None else list(layers)
    for layer in chosen:
        if not -model.n_layers <= layer < model.n_layers:
            raise ModelError(f"{model.name} has layers 0 to {model.n_layers - 1}, found layer {layer}. Ask for one of these.")
    chosen = [layer % model.n_layers for layer in chosen]
    if not chosen:
        raise ModelError(f"The list of layers is empty. Name some of the {model.n_layers}, or none for all.")
    for layer in chosen:
        heads = model.map.blocks[layer].heads
        if heads is None or not heads.pattern:
            raise ModelError(
                f"Layer {layer} of {model.name} ({model.map.family}) has no attention heads whose pattern can be seen. Layers that have: "
                f"{', '.join(str(layer) for layer, block in enumerate(model.map.blocks) if block.heads and block.heads.pattern) or 'none'}."
            )
    seen: dict[int, Tensor] = {}

    def visit(layer: Layer) -> None:
        if layer.index in chosen:
            seen[layer.index] = layer.pattern

    with eager_attention(model):
        model.run(ids, visit, stop=max(chosen))
    return torch.stack([seen[layer].to(model.device, torch.float32) for layer in chosen])


@dataclass(frozen=True)
class AttentionTensors:
    """What one layer's attention function is given, and what it makes of it. Final.

    Attributes:
        q, k, v: As attention sees them, behind rotary embedding and norms; keys and values have one slice for each key/value head, or one
            for each query head where the model repeats them before.
        pattern: What each head looks at; None where the family's eager function does not give it.
        z: What it gives, before any gate and the output projection.
    """

    q: Float[Tensor, "prompt head pos d_head"]
    k: Float[Tensor, "prompt some_heads pos d_head"]
    v: Float[Tensor, "prompt some_heads pos d_value"]
    pattern: Float[Tensor, "prompt head query key"] | None
    z: Float[Tensor, "prompt pos head d_value"]


def attention_tensors(model: HookedModel, ids: Int[Tensor, "prompt pos"], **inputs: Any) -> dict[int, AttentionTensors]:
    """Queries, keys, values, patterns and outputs of every layer with attention heads, in a pass of the family's own eager attention.

    Args:
        model: The model, with any implementation of attention.
        ids: Token ids.
        inputs: Further arguments of the model's forward, such as ``attention_mask``.

    Returns:
        By layer.

    Raises:
        ModelError: The model's attention does not go through transformers' attention interface, or is another one where it is watched.
    """
    if not model.map.interface:
        raise ModelError(
            f"The attention of {model.name} ({model.map.family}) does not go through transformers' attention interface, so what it is "
            "given is not to be seen. Read heads' outputs (z) instead."
        )
    layers = {model.module(layer, "out_proj"): layer for layer in model.map.layers_with_heads}
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]] = []
    found: dict[int, AttentionTensors] = {}

    def see(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, z: Tensor, pattern: Tensor | None) -> Tensor:
        seen.append((q.clone(), k.clone(), v.clone(), None if pattern is None else pattern.clone(), z.clone()))
        return z

    def behind(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[layers[module]] = AttentionTensors(*seen[-1])  # the output projection comes right behind its attention

    with ExitStack() as stack:
        stack.enter_context(unwrapped(model.hf))
        stack.enter_context(torch.no_grad())
        expected = model.forward(ids, keep=1, **inputs)
        for module in layers:
            stack.callback(module.register_forward_pre_hook(behind).remove)
        stack.enter_context(watched_attention(model.hf, see))
        apart = error(model.forward(ids, keep=1, **inputs), expected)
    # Some families (sparse attention behind an index) attend in another way where their attention is watched.
    if not apart <= 10 * tolerance(model.dtype):
        raise ModelError(
            f"{model.name} ({model.map.family}) gives other logits where its attention is watched, by {apart:.2g} of their spread, so what "
            "was seen is not what it does. Read heads' outputs (z) instead."
        )
    return found
