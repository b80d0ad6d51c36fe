"""Orthonormal directions as coordinates, fixed or learned."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import ConfigError
from circuitkit.featurizers.base import Featurizer


class Rotation(Featurizer):
    """Coordinates along orthonormal directions; what is orthogonal to all of them is the error. Final.

    ``weight`` can be learned by gradient: whatever it becomes, the directions are orthonormal. As in distributed
    alignment search, which learns such directions: "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations" (arXiv 2303.02536).

    Args:
        width: Size of the activation.
        n_features: Number of directions; None for as many as the activation has axes.
        seed: Of the draw of the first directions.
    """

    def __init__(self, width: int, n_features: int | None = None, seed: int = 0) -> None:
        n_features = width if n_features is None else n_features
        if not 1 <= n_features <= width:
            raise ConfigError(
                f"A rotation of activations of width {width} has 1 to {width} directions, found {n_features}. "
                "Give a number in that range."
            )
        super().__init__(width, n_features)
        self.seed = seed
        drawn = torch.randn(n_features, width, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(_orthonormal(drawn))

    @classmethod
    def of(cls, directions: Float[Tensor, "feature width"]) -> Rotation:
        """The rotation along given directions.

        Raises:
            ConfigError: They are not orthonormal.
        """
        n_features, width = directions.shape
        made = cls(width, n_features)
        gram = directions.double() @ directions.double().T
        off = (gram - torch.eye(n_features, dtype=gram.dtype, device=gram.device)).abs().max().item()
        if off > 1e-4:
            raise ConfigError(f"The directions of a rotation must be orthonormal; their products are off by {off:.2g}. Orthogonalise them.")
        made.weight.data = directions.detach().float().clone()
        return made

    @property
    def directions(self) -> Float[Tensor, "feature width"]:
        """The directions as they are now, with gradients."""
        return _orthonormal(self.weight)

    def coordinates(self, act: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        directions = self.directions
        return act.to(directions.dtype) @ directions.T

    def reconstruct(self, coordinates: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        return coordinates @ self.directions


def _orthonormal(rows: Float[Tensor, "feature width"]) -> Float[Tensor, "feature width"]:
    """Gram-Schmidt: the first direction stays, of each later one what is orthogonal to those before it. Orthonormal rows stay."""
    basis, lengths = torch.linalg.qr(rows.T)
    signed: Tensor = basis * lengths.diagonal().sign()
    return signed.T
