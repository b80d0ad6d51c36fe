"""Principal components as coordinates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.errors import ConfigError
from circuitkit.featurizers.base import Featurizer


class PCA(Featurizer):
    """Coordinates along the directions in which activations vary most, from their mean; the rest is the error. Final.

    Args:
        mean: Of the activations.
        directions: Orthonormal, the one of largest variance first.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, mean: Float[Tensor, " width"], directions: Float[Tensor, "feature width"]) -> None:
        super().__init__(directions.shape[1], directions.shape[0])
        self.register_buffer("mean", mean.detach())
        self.register_buffer("directions", directions.detach())

    @classmethod
    def fit(cls, activations: Float[Tensor, "row width"], n_features: int) -> PCA:
        """The first principal components of some activations.

        Args:
            activations: One row per position of a prompt.
            n_features: How many components.

        Raises:
            ConfigError: There cannot be so many.
        """
        most = min(activations.shape[0] - 1, activations.shape[1])
        if not 1 <= n_features <= most:
            raise ConfigError(
                f"{activations.shape[0]} activations of width {activations.shape[1]} have at most {most} principal components, found "
                f"n_features={n_features}. Give more activations, or ask for fewer components."
            )
        exact = activations.double()
        mean = exact.mean(0)
        directions = torch.linalg.svd(exact - mean, full_matrices=False).Vh[:n_features]
        # A component's sign is arbitrary: its largest entry is made positive, so that a fit is the same everywhere.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return cls(mean.float(), (directions * largest.sign()).float())

    def coordinates(self, act: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        return (act.to(self.mean.dtype) - self.mean) @ self.directions.T

    def reconstruct(self, coordinates: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        return coordinates @ self.directions + self.mean
