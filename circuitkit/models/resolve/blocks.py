"""The layers of a model and what each adds to the residual stream, matched by value in the record of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend
from circuitkit.models.resolve.compare import is_scale_free, is_sum, mixes, same, scales
from circuitkit.models.resolve.probe import Call, Record, inside


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
        value: What the module gave, before its post-norm and its scale.
        read: What the module read: the residual stream, or what a norm made of it.
        reads: How many addends of the layer are in the residual stream that it reads; 0 where it reads what enters the layer.
        is_mixer: Whether it carries something from one position to another.
    """

    addend: Addend
    call: Call
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


def added(record: Record, layer: Layer) -> list[Added]:
    """What a layer adds to the residual stream, in the order of computation.

    Raises:
        ModelError: What its modules give does not sum to what it changes.
    """
    groups = _groups(record, layer)
    for count, is_scaled in ((1, False), (2, False), (3, False), (1, True), (2, True)):
        for chosen in combinations(groups, count):
            factors = _factors(layer, [group[0][2] for group in chosen], is_scaled)
            if factors is not None:
                ordered = sorted(zip(chosen, factors, strict=True), key=lambda pair: pair[0][0][0].ended)
                return _described(record, layer, ordered)
    raise ModelError(
        f"What the modules of {layer.call.path} give does not sum to what it changes in the residual stream: expected the output of one or "
        "two modules, as they are or multiplied by a number, and found none that fit. Models whose layers also rescale or renormalise the "
        "stream have no addends; give the map by hand if this one has."
    )


Site = tuple[Call, int | None, Tensor]


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


def _factors(layer: Layer, values: list[Tensor], is_scaled: bool) -> list[float] | None:
    if not is_scaled:
        return [1.0] * len(values) if is_sum(layer.left, [layer.entered, *values]) else None
    found = scales(layer.left.double() - layer.entered.double(), values)
    return None if found is None or any(abs(factor) < 1e-3 for factor in found) else found


def _described(record: Record, layer: Layer, chosen: list[tuple[list[Site], float]]) -> list[Added]:
    found: list[Added] = []
    for group, scale in chosen:
        streams = [layer.entered, *(_after(layer, chosen[: place + 1]) for place in range(len(found)))]
        found.append(_one(record, layer, group, scale, streams))
    return found


def _after(layer: Layer, chosen: list[tuple[list[Site], float]]) -> Tensor:
    stream = layer.entered
    for group, scale in chosen:
        stream = stream + (group[0][2] if scale == 1 else group[0][2] * scale)
    return stream


def _one(record: Record, layer: Layer, group: list[Site], scale: float, streams: list[Tensor]) -> Added:
    """An addend: the norm behind it and the part whose output the norm reads, or the part itself; and what the part reads."""
    groups = _groups(record, layer)
    post_norm = None
    for call, _, _ in group:
        if len(call.inputs) == 1 and is_scale_free(call) and not any(_near(call.inputs[0][1], stream) for stream in streams):
            behind = [sites for sites in groups if same(sites[0][2], call.inputs[0][1])]
            if behind:
                post_norm, group = call.path, behind[0]
                break
    call, place, value = _part(group)
    record.once(call.path)
    norm, read, reads = _reader(record, layer, call, streams)
    addend = Addend(call.path, place, call.n_items, norm, post_norm, scale)
    return Added(addend, call, value, read, reads, _is_mixer(record, call))


def _part(group: list[Site]) -> Site:
    """The outermost module of those that give a value, leaving out those that only hand it on (dropout)."""
    makers = [site for site in group if not any(same(tensor, site[2]) for _, tensor in site[0].inputs)] or group
    return min(makers, key=lambda site: (site[0].path.count("."), site[0].started))


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and is_sum(one, [other])


def _reader(record: Record, layer: Layer, call: Call, streams: list[Tensor]) -> tuple[str | None, Tensor, int]:
    """The norm through which a part reads the residual stream, what it reads, and behind how many addends."""
    inputs = [tensor for _, tensor in call.inputs if tensor.shape == layer.entered.shape]
    norms = [(other, place) for other in record.within(layer.call.path) if other.started < call.started and not inside(call.path, other.path)
             for place, stream in enumerate(streams) if any(_near(tensor, stream) for _, tensor in other.inputs)]  # fmt: skip
    for tensor in inputs:
        for other, place in norms:
            if any(same(tensor, out) for _, out in other.outputs):
                return other.path, tensor, place
        for place, stream in enumerate(streams):
            if _near(tensor, stream):
                return None, tensor, place
    # The part is a projection inside of the module that reads: the norm is the last one of the stream before it.
    for other, place in reversed(norms):
        if is_scale_free(other):
            return other.path, other.outputs[0][1], place
    raise ModelError(
        f"{call.path} reads neither the residual stream nor what a norm makes of it. Expected one of both, so that it is known what edges "
        "into it change; give the map of the model by hand."
    )


def _is_mixer(record: Record, call: Call) -> bool:
    return any(inside(attention.path, call.path) for attention in record.attentions) or mixes(call)
