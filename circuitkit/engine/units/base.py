"""What a search is over."""

from __future__ import annotations

from abc import abstractmethod

from circuitkit.core.part import Part
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.featurizing import Featurizers
from circuitkit.models.hooked import HookedModel


class Units(Part):
    """Which units of a model masks are over, as a setting that is made before the model is there."""

    @abstractmethod
    def universe(self, model: HookedModel) -> NodeUniverse:
        """The units of a model.

        Raises:
            ConfigError: The model has none of them.
        """

    def featurizers(self) -> Featurizers:
        """What makes features of activations, for units that are features. By default none."""
        return {}
