"""Features of dictionaries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from circuitkit.core.errors import ConfigError
from circuitkit.core.node import FEATURE_SITES
from circuitkit.core.universe import NodeUniverse, Universe
from circuitkit.engine.featurizing import Featurizers, Place
from circuitkit.engine.units.base import Units
from circuitkit.featurizers.base import Featurizer
from circuitkit.featurizers.reading import load_dictionary
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class Features(Units):
    """Every feature of some dictionaries (sparse autoencoders, transcoders), and what each dictionary leaves unexplained. Final.

    Attributes:
        dictionaries: Files or folders that say where they lie in the model; or for each place, such as ``r8`` for the residual stream
            behind layer 8, ``m8`` for what its MLP gives and ``a8`` for what its attention gives, the file or folder.
        errors: Whether the error terms are units too; else they always stay.
    """

    reads_files: ClassVar[tuple[str, ...]] = ("dictionaries",)

    dictionaries: Mapping[str, str | Path] | Iterable[str | Path]
    errors: bool = True

    def __post_init__(self) -> None:
        given = self.dictionaries
        if isinstance(given, str | Path):
            given = [given]
        kept = {str(place): str(path) for place, path in given.items()} if isinstance(given, Mapping) else tuple(map(str, given))
        if not kept:
            raise ConfigError("units.dictionaries is empty: expected files or folders, such as [saes/layer_8] or {r8: saes/layer_8}.")
        object.__setattr__(self, "dictionaries", kept)

    def universe(self, model: HookedModel) -> NodeUniverse:
        for site, layer in self._read:
            if layer >= model.n_layers:
                raise ConfigError(
                    f"{model.name} has layers 0 to {model.n_layers - 1}, found a dictionary at {site} of layer "
                    f"{layer}. Take the model it was made for."
                )
        sizes = {place: featurizer.n_features for place, featurizer in self._read.items()}
        return Universe.of_features(model.n_layers, model.n_heads, sizes, errors=self.errors)

    def featurizers(self) -> Featurizers:
        return self._read

    @cached_property
    def _read(self) -> dict[Place, Featurizer]:
        named = self.dictionaries
        found: dict[Place, Featurizer] = {}
        for name, path in named.items() if isinstance(named, Mapping) else [("", path) for path in named]:
            placed = load_dictionary(path)
            place = _place(name) if name else placed.place
            if place in found:
                raise ConfigError(f"Two dictionaries lie at {place[0]} of layer {place[1]}. Name one for each place (units.dictionaries).")
            found[place] = placed.dictionary
        return found


def _place(name: str) -> Place:
    match = re.fullmatch(r"([amr])(\d+)", name)
    if match is None:
        raise ConfigError(
            f"{name!r} is no place of a dictionary (units.dictionaries). Expected r, m or a with a layer behind it: r8 for the residual "
            "stream behind layer 8, m8 for what its MLP gives, a8 for what its attention gives."
        )
    return FEATURE_SITES[match[1]], int(match[2])
