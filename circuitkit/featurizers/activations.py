"""Activation functions of dictionaries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import ConfigError
from circuitkit.core.part import Part


class JumpReLU(nn.Module, Part):
    """Zero up to each feature's threshold, and the value itself above it. Final.

    Source: "Jumping Ahead" (arXiv 2407.14435), equation 4.

    Args:
        threshold: One for each feature, not negative.
    """

    threshold: Tensor

    def __init__(self, threshold: Float[Tensor, " feature"]) -> None:
        super().__init__()
        if (threshold < 0).any():
            raise ConfigError(f"Thresholds of a JumpReLU must not be negative, found {threshold.min():.3g}. Take weights of another file.")
        self.register_buffer("threshold", threshold.detach().clone())

    def forward(self, pre: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        return pre.relu() * (pre > self.threshold)


class TopK(nn.Module, Part):
    """The k largest values of each row, where they are positive; the others become zero. Final.

    Source: "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section 2.3.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"TopK keeps at least 1 feature per row, found k = {k}. Give 1 or more.")
        self.k = k

    def forward(self, pre: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        values, places = pre.topk(min(self.k, pre.shape[-1]), -1)
        return torch.zeros_like(pre).scatter(-1, places, values.relu())
