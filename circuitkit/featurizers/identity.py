"""The activation's own axes as coordinates."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from circuitkit.featurizers.base import Featurizer


class Identity(Featurizer):
    """Every axis of the activation is a coordinate, such as the neurons of an MLP. The error is zero. Final."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def coordinates(self, act: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        return act

    def reconstruct(self, coordinates: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        return coordinates

    def encode(
        self, act: Float[Tensor, "*row width"], read: Float[Tensor, "*row width"] | None = None
    ) -> tuple[Float[Tensor, "*row feature"], Float[Tensor, "*row width"]]:
        return act, act.new_zeros(()).expand(act.shape)

    def decode(self, coordinates: Float[Tensor, "*row feature"], error: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        return coordinates
