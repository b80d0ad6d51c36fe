"""The control: a dictionary whose features mean nothing."""

from __future__ import annotations

import torch

from circuitkit.core.errors import ConfigError
from circuitkit.featurizers.dictionary import Dictionary


def random_dictionary(width: int, n_features: int, seed: int = 0) -> Dictionary:
    """A dictionary of so many directions of length 1, drawn at random, that encodes with the same directions and a ReLU.

    Args:
        width: Size of the activation.
        n_features: How many, as many as the dictionary has that it is a control for.
        seed: Of the draw.
    """
    if width < 1 or n_features < 1:
        raise ConfigError(f"A random dictionary needs a width and a number of features of at least 1, found {width} and {n_features}.")
    drawn = torch.randn(n_features, width, generator=torch.Generator().manual_seed(seed))
    directions = drawn / drawn.norm(dim=-1, keepdim=True)
    return Dictionary(directions.T.contiguous(), directions, torch.zeros(n_features), torch.zeros(width))
