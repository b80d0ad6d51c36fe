"""The layers of a model and what each adds to the residual stream, matched by value in the record of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend
from circuitkit.models.resolve.compare import as_written, error, is_norm, is_sum, mixes, same, scales, tolerance
from circuitkit.models.resolve.probe import Call, Record, inside

Site = tuple[Call, int | None, Tensor]
"""An output: whose, which, and its value."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer in the record. Final.

    Attributes:
        call: Its run.
        item: Which of its outputs is the residual stream; None where it returns a tensor.
        entered, left: The residual stream before and behind it.
    """

    call: Call
    item: int | None
    entered: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class Added:
    """An addend of a layer, found. Final.

    Attributes:
        addend: It, as in the map.
        call: The run of its module.
        owner: The run of the module that computes it from what it reads; mostly the same.
        value: What the module gave, before its post-norm and its scale.
        read: What the owner read: the residual stream, or what a norm made of it.
        reads: How many addends of the layer are in the residual stream that it reads; 0 where it reads what enters the layer.
        is_mixer: Whether it carries something from one position to another.
    """

    addend: Addend
    call: Call
    owner: Call
    value: Tensor
    read: Tensor
    reads: int
    is_mixer: bool


def layers(record: Record, n_layers: int | None) -> list[Layer]:
    """The layers: modules of one list, each of which reads what the one before gave.

    Args:
        record: A pass.
        n_layers: How many the configuration names; None where there is no configuration.

    Raises:
        ModelError: There is no such list.
    """
    parents: dict[str, list[Call]] = {}
    for call in record.calls:
        if call.path:
            parents.setdefault(call.path.rpartition(".")[0], []).append(call)
    chains = [chain for parent in parents.values() for chain in _chains(parent, record)]
    if n_layers is not None and any(len(chain) == n_layers for chain in chains):
        chains = [chain for chain in chains if len(chain) == n_layers]
    chains = [chain for chain in chains if any(True for _ in record.within(chain[0].call.path))]
    best = max(chains, key=lambda chain: (_is_listed(chain), len(chain), -chain[0].call.path.count(".")), default=[])
    if not best or (n_layers is not None and len(best) != n_layers):
        raise ModelError(
            f"Expected a list of {'layers' if n_layers is None else f'{n_layers} layers'} each of which reads the residual stream that the "
            f"one before gave, found {len(best) or 'none'}{f' at {best[0].call.path}' if best else ''}. The residual stream has to go from "
            "layer to layer as one tensor; give the map of the model by hand if it does."
        )
    for layer in best:
        record.once(layer.call.path)
    return best


def _is_listed(chain: list[Layer]) -> bool:
    """Whether the members are numbered, as those of lists are."""
    return all(layer.call.path.rpartition(".")[2].isdecimal() for layer in chain)


def _chains(calls: list[Call], record: Record) -> list[list[Layer]]:
    """Runs of siblings that hand a tensor on, of one shape."""
    found: list[list[Layer]] = []
    current: list[Layer] = []
    for call in calls:
        if current and (inputs := [tensor for _, tensor in call.inputs if same(tensor, current[-1].left)]):
            entered = inputs[0]
        else:
            if current:
                found.append(current)
            current = []
            streams = [tensor for _, tensor in call.inputs if is_stream(tensor, record)]
            if not streams:
                continue
            entered = streams[0]
        outputs = [(place, out) for place, out in call.outputs if out.shape == entered.shape and out.dtype == entered.dtype]
        if outputs:
            current = [*current, Layer(call, outputs[0][0], entered, outputs[0][1])]
        elif current:
            found.append(current)
            current = []
    return [*found, current] if current else found


def is_stream(tensor: Tensor, record: Record) -> bool:
    """Whether a tensor is of the shape of a residual stream: row x position x width."""
    return tensor.ndim == 3 and tensor.shape[:2] == record.ids.shape and tensor.is_floating_point() and tensor.shape[2] > 1


@dataclass(frozen=True, eq=False)
class Term:
    """A term of the sum that a layer computes. Final.

    Attributes:
        sites: The modules that give it.
        scale: By what it is multiplied.
        stream: The residual stream that it is added to.
    """

    sites: list[Site]
    scale: float
    stream: Tensor


def added(record: Record, layer: Layer) -> tuple[list[Added], bool]:
    """What a layer adds to the residual stream, in the order of computation; and whether the stream is nothing but the sum.

    Where it is not, norms on the stream itself follow each sum (BERT).

    Raises:
        ModelError: What its modules give does not sum to what it changes.
    """
    groups = _groups(record, layer)
    terms = _summed(layer, groups)
    renormed = [] if terms else _renormed(record, layer, groups)
    if not terms and not renormed:
        raise ModelError(
            f"What the modules of {layer.call.path} give does not sum to what it changes in the residual stream: expected the "
            "output of one to three modules, as they are or multiplied by a number, and found none that fit. Models whose layers also "
            "rescale the stream have no addends; give the map by hand if this one has."
        )
    return [_one(record, layer, groups, terms or renormed, place) for place in range(len(terms or renormed))], bool(terms)


def _summed(layer: Layer, groups: list[list[Site]]) -> list[Term]:
    """The fewest values that sum to what the layer changes; unscaled if there are such."""
    values = [group[0][2] for group in groups]
    for count in (1, 2, 3):
        for chosen in combinations(range(len(groups)), count):
            if is_sum(layer.left, [layer.entered, *(values[place] for place in chosen)]):
                return _terms(layer, [(groups[place], 1.0) for place in chosen])
    for places, numbers in scales(layer.left.double() - layer.entered.double(), values, layer.left.dtype) if values else ():
        for tried in (list(map(as_written, numbers)), [float(f"{number:.7g}") for number in numbers], numbers):
            if is_sum(layer.left, [layer.entered, *(values[place] * number for place, number in zip(places, tried, strict=True))]):
                return _terms(layer, [(groups[place], number) for place, number in zip(places, tried, strict=True)])
    return []


def _terms(layer: Layer, chosen: list[tuple[list[Site], float]]) -> list[Term]:
    """In the order of computation, each with the stream before it."""
    found, stream = list[Term](), layer.entered
    for group, scale in sorted(chosen, key=lambda pair: pair[0][0][0].ended):
        found.append(Term(group, scale, stream))
        stream = stream + (group[0][2] if scale == 1 else group[0][2] * scale)
    return found


def _renormed(record: Record, layer: Layer, groups: list[list[Site]]) -> list[Term]:
    """The terms of a layer that puts a norm on the stream behind each sum, from the last sum to the first."""
    norms = [call for call in record.within(layer.call.path) if is_norm(call)]
    bases = [layer.entered, *(call.outputs[0][1] for call in norms)]
    target, found = layer.left, list[Term]()
    while not same(target, layer.entered):
        totals = [call.inputs[0][1] for call in norms if same(call.outputs[0][1], target)]
        sums = [Term(group, 1.0, base) for total in totals for base in bases for group in groups
                if base.shape == total.shape and is_sum(total, [base, group[0][2]])]  # fmt: skip
        if not sums or len(found) == 3:
            return []
        found.insert(0, sums[0])
        target = sums[0].stream
    return found


def _groups(record: Record, layer: Layer) -> list[list[Site]]:
    """The outputs of the modules in a layer that have the stream's shape, those of equal value together."""
    groups: list[list[Site]] = []
    for call in record.within(layer.call.path):
        for place, out in call.outputs:
            if out.numel() != layer.left.numel() or out.shape[-1] != layer.left.shape[-1] or not out.is_floating_point():
                continue
            value = out.view(layer.left.shape)
            if not bool(value.any()) or same(value, layer.entered) or same(value, layer.left):
                continue
            for group in groups:
                if same(group[0][2], value):
                    group.append((call, place, value))
                    break
            else:
                groups.append([(call, place, value)])
    return groups


def _one(record: Record, layer: Layer, groups: list[list[Site]], terms: list[Term], place: int) -> Added:
    """An addend: the norm behind it and the part whose output the norm reads, or the part itself; and what the part reads."""
    group, post_norm = terms[place].sites, None
    streams = [term.stream for term in terms[: place + 1]]
    for call, _, _ in group:
        if is_norm(call) and not any(_near(call.inputs[0][1], stream) for stream in streams):
            behind = [sites for sites in groups if same(sites[0][2], call.inputs[0][1].view(layer.left.shape))]
            if behind:
                post_norm, group = call.path, behind[0]
                break
    call, item, value = _part(group)
    record.once(call.path)
    owner = _owner(record, layer, call, [term.sites[0][0].path for term in terms if term is not terms[place]])
    norm, read, reads, is_whole = _reader(record, layer, owner, call, streams)
    is_mixer = _is_mixer(record, owner)
    if next(out.shape for at, out in call.outputs if at == item) != layer.left.shape:
        raise ModelError(
            f"{call.path} gives rows and positions as one axis, of shape {tuple(call.outputs[0][1].shape)}. Expected row x position x "
            "width, so that a position can be told from another; such models cannot be taken apart yet."
        )
    is_whole = is_whole and (is_mixer or len(call.args) + len(call.kwargs) == 1)
    addend = Addend(call.path, item, call.n_items, norm, post_norm, terms[place].scale, is_whole, call.listed)
    return Added(addend, call, owner, value, read, reads, is_mixer)


def _owner(record: Record, layer: Layer, call: Call, others: list[str]) -> Call:
    """The outermost module in the layer that computes an addend and no other one."""
    whole, path = call, call.path
    while (path := path.rpartition(".")[0]) != layer.call.path and not any(inside(other, path) for other in others):
        whole = next(iter(record.of(path)), whole)
    return whole


def _part(group: list[Site]) -> Site:
    """The outermost module of those that give a value, leaving out those that only hand it on (dropout)."""
    makers = [site for site in group if not any(same(tensor, site[2]) for _, tensor in site[0].inputs)] or group
    return min(makers, key=lambda site: (site[0].path.count("."), site[0].started))


def _near(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.shape[-1] == other.shape[-1] and is_sum(one.view(other.shape), [other])


def _reader(record: Record, layer: Layer, owner: Call, call: Call, streams: list[Tensor]) -> tuple[str | None, Tensor, int, bool]:
    """How a part reads the residual stream.

    Returns:
        The norm through which it does; what it reads; behind how many addends; and whether it can run by itself on what it reads: else its
        norm is inside, or it adds the residual stream by itself, or the layer has its projections one by one.
    """
    norms = [(other, place) for other in record.within(layer.call.path) for place, stream in enumerate(streams)
             if other.started < call.started and any(_near(tensor, stream) for _, tensor in other.inputs) and is_norm(other)]  # fmt: skip
    for _, tensor in owner.inputs:
        for other, place in norms:
            if not inside(other.path, owner.path) and same(tensor, other.outputs[0][1]):
                return other.path, tensor, place, owner is call
    read = [(tensor, place) for _, tensor in owner.inputs for place, stream in enumerate(streams) if _near(tensor, stream)]
    if owner is call and read and not any(inside(other.path, owner.path) for other, _ in norms):
        return None, *read[0], True
    for other, place in reversed(norms):
        if not any(_near(other.outputs[0][1], stream) for stream in streams) and _feeds(layer, other, call):
            return other.path, other.outputs[0][1], place, False
    readers = [place for other in record.within(layer.call.path) for place, stream in enumerate(streams)
               if other.started < call.started and any(_near(tensor, stream) for _, tensor in other.inputs)]  # fmt: skip
    if read or readers:
        place = read[-1][1] if read else readers[-1]
        return None, streams[place], place, False
    raise ModelError(
        f"{call.path} reads neither the residual stream nor what a norm makes of it. Expected one of both, so that it is known what edges "
        "into it change; give the map of the model by hand."
    )


def _feeds(layer: Layer, source: Call, call: Call) -> bool:
    """Whether what a module gives depends on what another one gave: the layer runs again with another output of that."""
    outputs: list[Tensor] = []
    place, before = call.outputs[0]

    def see(_: nn.Module, args: object, out: Any) -> None:
        outputs.append(out if place is None else out[place])

    handles = [
        source.module.register_forward_hook(lambda module, args, out: out.flip(-1) + out.roll(1, -1)),
        call.module.register_forward_hook(see),
    ]
    try:
        with torch.no_grad():
            layer.call.module.forward(*layer.call.args, **layer.call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return len(outputs) == 1 and error(outputs[0], before) > tolerance(before.dtype)


def _is_mixer(record: Record, owner: Call) -> bool:
    return any(inside(attention.path, owner.path) for attention in record.attentions) or mixes(owner, record.ids.shape)
