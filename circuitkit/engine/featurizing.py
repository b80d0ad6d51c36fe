"""Which universes an engine can search: what contradicts itself, and which featurizers it takes."""

from __future__ import annotations

from collections.abc import Mapping

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind, Node, Site
from circuitkit.core.universe import NodeUniverse
from circuitkit.featurizers.base import Featurizer
from circuitkit.featurizers.identity import Identity
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

Place = tuple[Site, int]
"""A site and a layer."""
Featurizers = Mapping[Place, Featurizer]
"""The featurizer at each place that has one."""


def all_of(place: Place) -> Node:
    """The node that stands for every neuron or feature at a place, as a patcher is told of them: its index is None."""
    site, layer = place
    return Node(Kind.NEURON, layer) if site is Site.MLP_ACT else Node(Kind.FEATURE, layer, on=site)


def featurizers_for(universe: NodeUniverse, featurizers: Featurizers, model: HookedModel, patcher: Patcher) -> dict[Place, Featurizer]:
    """For each place at which a universe has coordinates the featurizer that gives them, on the device of its layer.

    Raises:
        MeasurementError: One is missing, or of another width than the model, or has fewer features than the universe; or units of the
            universe contradict each other, or the patcher.
    """
    _check_contradictions(universe, patcher)
    found: dict[Place, Featurizer] = {}
    for place, most in _sizes(universe).items():
        site, layer = place
        width = model.d_mlp if site is Site.MLP_ACT else model.d_model
        _check_site(model, place)
        featurizer = Identity(width) if site is Site.MLP_ACT else featurizers.get(place)
        if featurizer is None:
            known = ", ".join(f"{known_site} of layer {known_layer}" for known_site, known_layer in featurizers) or "none"
            raise MeasurementError(
                f"The universe has features at {site} of layer {layer}, and there is no featurizer for that place. "
                f"Given: {known}. Give one for it, or take a universe without these features."
            )
        if featurizer.width != width:
            raise MeasurementError(
                f"The featurizer at {site} of layer {layer} is of width {featurizer.width}, but {model.name} has {width} there. It "
                "was made for another model or site; take one of this width."
            )
        if most > featurizer.n_features:
            raise MeasurementError(
                f"The universe has {all_of(place).kind} {most - 1} at {site} of layer {layer}, but there are {featurizer.n_features} of "
                f"them: 0 to {featurizer.n_features - 1}. Make a universe of features from the featurizers, and one of neurons "
                "from the model's d_mlp."
            )
        if featurizer.reads_input and site is not Site.MLP_OUT:
            raise MeasurementError(
                f"A transcoder explains what an MLP gives by what it reads, so it lies at {Site.MLP_OUT}; found one at {site} of "
                f"layer {layer}. Put it there, or take a dictionary of what flows at {site}."
            )
        found[place] = featurizer.to(model.device_of(layer))
    return found


def _check_site(model: HookedModel, place: Place) -> None:
    """Refuses a site that a layer has not."""
    site, layer = place
    block = model.map.blocks[layer]
    if {Site.MLP_ACT: block.neurons, Site.MLP_OUT: block.mlp, Site.ATTN_OUT: block.attention}.get(site, block) is None:
        raise MeasurementError(
            f"The universe has units at {site} of layer {layer}, and that layer of {model.name} ({model.map.family}) has no such site: an "
            "attention, an MLP or neurons of its own are missing there (routed experts have none). Leave the layer out."
        )


def _sizes(universe: NodeUniverse) -> dict[Place, int]:
    """For each place with coordinates one more than the largest that is a unit; 0 where the error term alone is one."""
    sizes: dict[Place, int] = {}
    for kind, site in ((Kind.NEURON, Site.MLP_ACT), *((kind, site) for site in FEATURE_PLACES for kind in (Kind.FEATURE, Kind.ERROR))):
        if kind not in universe.kinds:
            continue
        _, where = universe.places_of(kind, site)
        for layer in where[:, 0].unique().tolist():
            slots = where[where[:, 0] == layer, 1]
            most = 0 if kind is Kind.ERROR else int(slots.max()) + 1
            sizes[site, layer] = max(most, sizes.get((site, layer), 0))
    return sizes


FEATURE_PLACES = (Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST)
"""Sites at which features can be units, in the order of computation. Where a norm lies behind attention or MLP, features are of what that
adds to the residual stream, while a head or an MLP as a unit is replaced before it."""


def _check_contradictions(universe: NodeUniverse, patcher: Patcher) -> None:
    split, whole = (set(universe.places_of(kind)[1][:, 0].tolist()) for kind in (Kind.HEAD, Kind.ATTENTION))
    if split & whole:
        raise MeasurementError(
            "This universe has both single heads and whole attentions as units, so a mask could contradict itself. Take one of the two."
        )
    featured = {layer for site, layer in _sizes(universe) if site is Site.MLP_OUT}
    both = featured & set(universe.places_of(Kind.MLP)[1][:, 0].tolist())
    if both:
        raise MeasurementError(
            f"This universe has the MLP of layer {min(both)} as a unit, and the features of what it gives too, so a mask could contradict "
            "itself. Take one of the two."
        )
    others = ", ".join(sorted(kind.value for kind in universe.kinds - {Kind.HEAD, Kind.ATTENTION, Kind.MLP}))
    if patcher.needs.conditional and others:
        raise MeasurementError(
            "Conditional means are those of MLPs in a model whose removed heads are replaced, so they are for heads, attentions and MLPs "
            f"alone; this universe has units of kind {others}. Take plain means (patcher.means=plain)."
        )
