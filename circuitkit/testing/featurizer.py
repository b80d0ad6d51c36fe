"""What every featurizer must keep to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from circuitkit.featurizers.base import Featurizer
from circuitkit.testing.base import hashed


class FeaturizerConformance(ABC):
    """What every featurizer must keep to. ``make`` returns one.

    Attributes:
        tolerance: Largest error of an activation that was encoded and decoded, relative to the activations' spread.
    """

    tolerance = 1e-5

    @abstractmethod
    def make(self) -> Featurizer:
        """Makes what is tested, anew at each call."""

    def _acts(self, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        featurizer, generator = self.make(), torch.Generator().manual_seed(seed)
        act, read = (torch.randn(*shape, featurizer.width, generator=generator) for _ in range(2))
        return act, read if featurizer.reads_input else None

    def test_decoding_gives_back_what_was_encoded(self) -> None:
        """Coordinates and error together are the activation, at any scale and for any number of leading axes."""
        for shape in ((1,), (3, 5), (2, 3, 4)):
            for scale in (0.0, 1.0, 100.0):
                act, read = self._acts(*shape)
                act = scale * act
                found = self.make().decode(*self.make().encode(act, read))
                spread = max(scale, 1.0)
                assert found.shape == act.shape, f"expected {tuple(act.shape)}, found {tuple(found.shape)}"
                assert (found - act).abs().max() <= self.tolerance * spread, "decode(encode(x)) is not x"

    def test_shapes(self) -> None:
        """One coordinate per feature, and an error of the activation's width."""
        featurizer, (act, read) = self.make(), self._acts(2, 3)
        coordinates, error = featurizer.encode(act, read)
        assert coordinates.shape == (2, 3, featurizer.n_features), f"expected {featurizer.n_features}, found {coordinates.shape}"
        assert error.shape == act.shape, f"expected an error of shape {tuple(act.shape)}, found {tuple(error.shape)}"

    def test_it_treats_rows_alike(self) -> None:
        """Rows and positions may come in any packing."""
        featurizer, (act, read) = self.make(), self._acts(4, 3)
        whole = featurizer.encode(act, read)
        for row in range(4):
            part = featurizer.encode(act[row : row + 1, 1:2], None if read is None else read[row : row + 1, 1:2])
            for one, all_of_them in zip(part, whole, strict=True):
                torch.testing.assert_close(one, all_of_them[row : row + 1, 1:2], msg="a position alone gave another value")

    def test_a_coordinate_changes_what_is_decoded(self) -> None:
        """Else there is nothing to find."""
        featurizer, (act, read) = self.make(), self._acts(2, 3)
        coordinates, error = featurizer.encode(act, read)
        assert not torch.equal(featurizer.decode(coordinates + 1, error), featurizer.decode(coordinates, error)), "coordinates do nothing"

    def test_half_precision_comes_back(self) -> None:
        """A model may compute in bfloat16, whatever the featurizer computes in."""
        act, read = self._acts(2, 3)
        act, read = act.bfloat16(), None if read is None else read.bfloat16()
        found = self.make().decode(*self.make().encode(act, read)).bfloat16()
        assert (found - act).abs().max() <= 0.01 * act.abs().max(), "decode(encode(x)) is not x in bfloat16"

    def test_its_values_are_in_its_hash(self) -> None:
        """Equal when made alike."""
        assert hashed(self.make()) == hashed(self.make()), "expected the same hash from two objects that were made alike"
