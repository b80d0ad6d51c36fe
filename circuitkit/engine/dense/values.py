"""What units are replaced by, as whole tensors: a row for every prompt, all heads or neurons of a layer at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import INPUT, Node, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.featurizing import Place, all_of
from circuitkit.engine.packed.replacements import GroupMean, entries
from circuitkit.models.differentiable import Edit, edited, stream
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

Edits = Callable[[slice], Mapping[Place, Edit]]
"""What is replaced in any case, for some prompts."""


def nothing_else(rows: slice) -> Mapping[Place, Edit]:
    """No edits."""
    return {}


class PatchedValues:
    """The values that a patcher gives at some sites. Final.

    Sources are collected from the corrupt prompts in one run, and values that do not depend on the activation are made once.

    Args:
        model: The model.
        prompts: The prompts.
        patcher: Gives the values. Neurons of a layer are handed to it together.
        places: Where values will be asked for.
        under: What is replaced in the corrupt run.
    """

    def __init__(
        self, model: HookedModel, prompts: PromptSet, patcher: Patcher, places: Iterable[Place], under: Edits = nothing_else
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._patcher = patcher
        self._places = tuple(places)
        self._under = under
        self._entries = entries(patcher.needs, prompts)
        self._sources: dict[Place, Tensor] = {}
        self._values: dict[Place, Tensor] = {}
        self._collected = patcher.needs.source == "none" or not self._places
        if patcher.reads_activation:
            check_differentiable(patcher)

    def collect(self, rows_a_pass: int) -> None:
        """Runs the corrupt prompts, if that is needed and was not done."""
        if self._collected:
            return
        means = {place: GroupMean(self._entries) for place in self._places}
        kept: dict[Place, list[Tensor]] = {place: [] for place in self._places}
        is_mean = self._patcher.needs.source == "mean"

        def see(place: Place, rows: slice, act: Tensor) -> Tensor:
            means[place].add(act, rows) if is_mean else kept[place].append(act.clone())
            return act

        for first in range(0, len(self._prompts), rows_a_pass):
            rows = slice(first, min(first + rows_a_pass, len(self._prompts)))
            watched = {place: partial(see, place, rows) for place in self._places}
            with edited(self._model, self._under(rows)), edited(self._model, watched):
                stream(self._model, self._prompts.corrupt[rows], **self._prompts.padding(rows))
        for place in self._places:
            self._sources[place] = means[place].value(self._model.dtype) if is_mean else _joined(kept.pop(place))
            if not self._patcher.reads_activation:
                source = self._sources.pop(place)
                self._values[place] = self._patched(place, source.new_zeros(()).expand(source.shape), source)
        self._collected = True

    def at(self, place: Place, act: Tensor, rows: slice) -> Tensor:
        """The values for what flows at a site; it broadcasts to the shape of ``act``."""
        if self._patcher.reads_activation:
            source = self._sources.get(place)
            return self._patched(place, act, None if source is None else self._pick(source, rows).expand_as(act))
        if place not in self._values:
            self._values[place] = self._patched(place, act.new_zeros(()).expand(1, *act.shape[1:]), None)
        return self._pick(self._values[place], rows)

    def _patched(self, place: Place, act: Tensor, source: Tensor | None) -> Tensor:
        site, layer = place
        if site is not Site.Z:
            nodes = {Site.EMBED: INPUT, Site.MLP_OUT: Node.of_mlp(layer), Site.ATTN_OUT: Node.of_attention(layer)}
            node = nodes.get(site) or all_of(place)
            return self._patcher.value(act, source, node)
        sources = [None] * act.shape[-2] if source is None else source.unbind(-2)
        both = zip(act.unbind(-2), sources, strict=True)
        values = [self._patcher.value(one, its, Node.of_head(layer, head)) for head, (one, its) in enumerate(both)]
        if source is not None and all(value is its for value, its in zip(values, sources, strict=True)):
            return source  # not copied together from views of itself
        return torch.stack(values, -2)

    def _pick(self, table: Tensor, rows: slice) -> Tensor:
        if len(table) == 1:
            return table
        if self._patcher.needs.source == "run":
            return table[rows]
        return table[self._entries[rows].to(table.device)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_differentiable(patcher: Patcher) -> None:
    """Holds autograd's derivative of a patcher that reads the activation against a finite difference.

    Raises:
        MeasurementError: They differ.
    """
    generator = torch.Generator().manual_seed(0)
    act, source, along = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    given = None if patcher.needs.source == "none" else source
    site, step = Node.of_mlp(0), 1e-6
    with torch.no_grad():
        apart = patcher.value(act + step * along, given, site) - patcher.value(act - step * along, given, site)
        expected = apart.double().sum() / (2 * step)
    with torch.enable_grad():
        leaf = act.clone().requires_grad_()
        value = patcher.value(leaf, given, site)
        found = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
    slope = 0.0 if found is None else float((found * along).sum())
    if abs(slope - float(expected)) > 1e-4 * max(1.0, abs(float(expected))):
        raise MeasurementError(
            f"{type(patcher).__name__} reads the activation in a way that autograd cannot follow: along one direction its value changes by "
            f"{float(expected):.4g}, and autograd says {slope:.4g}. Gradients need a patcher that is differentiable in the activation; "
            "write it without detach(), item() and in-place changes, or take Mean, Resample or Zero."
        )
