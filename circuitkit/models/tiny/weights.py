"""Weights of a tiny model: large enough that attention is not uniform, and that biases, norms and gates matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD = 0.3
"""Of whatever is added to a weight that transformers starts at a fixed value, such as a norm's or a bias."""


def draw(model: nn.Module, seed: int, gain: float = 1.2) -> None:
    """Draws all weights anew, in place, by the order of their names.

    A matrix that transformers draws around 0 gets a standard deviation of ``gain / sqrt(inputs)``, so that the residual stream keeps its
    size and attention has a pattern. What starts at fixed values (norms, biases, decay rates) keeps them, plus noise.
    """
    generator = torch.Generator().manual_seed(seed)
    flipped = {id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"}  # GPT-2: inputs first
    unembeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    # An embedding that unembeds too is smaller, so that logits do not saturate.
    embeddings = {
        id(module.weight): module.embedding_dim**-0.25 if id(module.weight) in unembeddings else 1.0
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):  # a tied table comes once
            if not weight.is_floating_point():
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2 or not _is_drawn(weight):
                weight.copy_(torch.where(weight.isfinite(), weight, 0.0) + SPREAD * noise)
            elif id(weight) in embeddings:
                weight.copy_(embeddings[id(weight)] * noise)
            else:
                inputs = weight.shape[0] if id(weight) in flipped else weight.shape[1:].numel() if weight.ndim > 3 else weight.shape[-1]
                weight.copy_(noise * gain / inputs**0.5)


def _is_drawn(weight: Tensor) -> bool:
    """Whether transformers leaves a table at zero or draws it around 0, or does not set it at all; else it has fixed values."""
    if not weight.isfinite().all():
        return True
    return bool(weight.mean().abs() <= 4 * weight.std() / weight.numel() ** 0.5)
