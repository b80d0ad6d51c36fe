"""What heads look at, and the implementation of attention that it takes to see it.

Only eager attention ever holds the pattern: the fused kernels (sdpa, flash) go from queries, keys and values to the output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel, Layer

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
