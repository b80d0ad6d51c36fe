"""What lies between the activation at a site and its coordinates."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.part import Part


class Featurizer(nn.Module, Part):
    """Writes an activation as coordinates and an error, and makes the activation of them again. Exact by construction.

    A featurizer of your own gives ``coordinates`` and ``reconstruct``; what the coordinates do not explain is the error:

        class Halves(Featurizer):
            def __init__(self):
                super().__init__(width=8, n_features=4)
            def coordinates(self, act):
                return act[..., :4]
            def reconstruct(self, coordinates):
                return torch.cat([coordinates, torch.zeros_like(coordinates)], -1)

    Each position of each row is to be encoded and decoded by itself.

    Args:
        width: Size of the activation.
        n_features: Number of coordinates.
        reads_input: Whether the coordinates are made of what the module at the site reads, and not of what it gives: so does a
            transcoder, on the output of an MLP.
    """

    def __init__(self, width: int, n_features: int, *, reads_input: bool = False) -> None:
        super().__init__()
        self.width = width
        self.n_features = n_features
        self.reads_input = reads_input

    @abstractmethod
    def coordinates(self, act: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        """The coordinates of an activation; with ``reads_input``, of what the module read to make it."""

    @abstractmethod
    def reconstruct(self, coordinates: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        """What the coordinates say that the activation is."""

    def encode(
        self, act: Float[Tensor, "*row width"], read: Float[Tensor, "*row width"] | None = None
    ) -> tuple[Float[Tensor, "*row feature"], Float[Tensor, "*row width"]]:
        """Coordinates, and what they leave unexplained of the activation.

        Args:
            act: The activation at the site.
            read: What the module at the site read; only with ``reads_input``.
        """
        coordinates = self.coordinates(act if read is None else read)
        reconstructed = self.reconstruct(coordinates)
        return coordinates, act.to(reconstructed.dtype) - reconstructed

    def decode(self, coordinates: Float[Tensor, "*row feature"], error: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """The activation that has these coordinates and this error."""
        return self.reconstruct(coordinates) + error
