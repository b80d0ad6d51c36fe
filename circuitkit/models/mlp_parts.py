"""The parts of an MLP, found by what flows between them and not by their names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class MlpParts:
    """An MLP is down(act(gate(x))), or where it is gated down(act(gate(x)) * up(x)).

    Attributes:
        gate: The projection whose output the activation function reads.
        act: The activation function.
        up: The projection that is multiplied with the activation; None where the MLP is not gated.
        down: The output projection.
    """

    gate: nn.Module
    act: nn.Module
    up: nn.Module | None
    down: nn.Module


_known: WeakKeyDictionary[nn.Module, MlpParts] = WeakKeyDictionary()


def mlp_parts(model: HookedModel, layer: int) -> MlpParts:
    """Runs the MLP of a layer once on a random vector, and sees which module's output is whose input. Known from then on.

    Raises:
        ModelError: The MLP is built in another way.
    """
    mlp = model.module(layer, "mlp")
    if model.map.blocks[layer].neurons is None:
        raise ModelError(
            f"What adds to the residual stream in layer {layer} of {model.name} ({model.map.family}) as an MLP is a module without neurons "
            "of its own, such as routed experts. Take units and rules that do not need its inside."
        )
    if mlp not in _known:
        _known[mlp] = _found(model, layer, mlp)
    return _known[mlp]


def _found(model: HookedModel, layer: int, mlp: nn.Module) -> MlpParts:
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen[module] = args[0], out

    leaves = [module for module in mlp.modules() if module is not mlp and not list(module.children())]
    handles = [module.register_forward_hook(see) for module in leaves]
    try:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, 1, model.d_model, generator=generator).to(model.device_of(layer), model.dtype)
        with torch.no_grad():
            out = mlp.forward(probe)  # past hooks that others have put on it
    finally:
        for handle in handles:
            handle.remove()
    linear = [module for module in seen if any(parameter.ndim == 2 for parameter in module.parameters(recurse=False))]
    found = partial(_one, model=model, layer=layer)
    act = found("activation function", [m for m in seen if not list(m.parameters()) and not torch.equal(*seen[m])])
    gate = found("projection before the activation function", [m for m in linear if _same(seen[m][1], seen[act][0])])
    down = found("output projection", [m for m in linear if _same(seen[m][1], out) and m is not gate])
    ups = [m for m in linear if m is not gate and m is not down]
    return MlpParts(gate, act, found("projection beside the gate", ups) if ups else None, down)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _one(what: str, found: list[nn.Module], *, model: HookedModel, layer: int) -> nn.Module:
    if len(found) != 1:
        raise ModelError(
            f"The MLP of layer {layer} of {model.name} should have one {what} that is a module of its own, found {len(found)}. Expected "
            "down(act(gate(x))) or down(act(gate(x)) * up(x)); take units and rules that do not need its inside."
        )
    return found[0]
