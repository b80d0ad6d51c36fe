"""Backward rules: how gradients are propagated where the plain derivative misleads, by the field's names for them.

A rule changes the backward pass alone; the forward pass stays what it was, bit for bit. Sources: RelP (arXiv 2508.21258), AttnLRP
(arXiv 2402.05602), GIM (arXiv 2505.17630).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitkit.core.errors import ConfigError, ModelError, unknown_choice
from circuitkit.models.attention import eager_attention
from circuitkit.models.columns import by_module, columns_of
from circuitkit.models.hooked import HookedModel
from circuitkit.models.mlp_parts import mlp_parts
from circuitkit.models.norms import gain_of, norms


@dataclass(frozen=True)
class Rules:
    """Which rules the backward pass follows; none is the plain gradient. Final.

    Attributes:
        norm: The scale of a norm (standard deviation or root mean square) is a constant.
        activation: The activation function is y = x * c with the constant c = act(x) / x.
        gate: Of a gated product each factor gets half of the gradient.
        pattern: The attention pattern is a constant: nothing flows into queries and keys.
        attention_halves: Likewise half for each factor of pattern x values and of queries x keys: a quarter for queries and for keys, half
            for values.
        temperature: At which the derivative of the attention's softmax is taken; 1 is its own. Attention is computed eagerly meanwhile.
    """

    norm: bool = False
    activation: bool = False
    gate: bool = False
    pattern: bool = False
    attention_halves: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"The temperature of the softmax's derivative (rules.temperature) must be above 0, found {self.temperature}.")

    @classmethod
    def named(cls, name: str, model: HookedModel) -> Rules:
        """A published set of rules; what is about gates or MLPs is left out of it for a model that has none.

        Raises:
            ConfigError: No such set.
        """
        if name not in RULES:
            raise ConfigError(unknown_choice("set of backward rules", name, RULES))
        rules = RULES[name]
        if not model.map.layers_with_mlps:
            return replace(rules, gate=False, activation=False)
        return replace(rules, gate=rules.gate and mlp_parts(model, model.map.layers_with_mlps[0]).up is not None) if rules.gate else rules

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """Within this context forward passes are recorded so that their backward pass follows these rules. Run both inside.

        Raises:
            ModelError: The model has no place for a rule, or a rule met no gradient in the passes that ran.
        """
        fired = _Fired()
        with ExitStack() as stack:
            if self.norm:
                _register(stack, norms(model), fired, "norm", _norm_hook)
            if self.activation:
                acts = [mlp_parts(model, layer).act for layer in model.map.layers_with_mlps]
                _register(stack, acts, fired, "activation", _activation_hook)
            if self.gate:
                _register(stack, _gates(model), fired, "gate", lambda module: _scale_hook(0.5))
            if self.pattern or self.attention_halves:
                q, k, v = (0.25, 0.25, 0.5) if self.attention_halves else (1.0, 1.0, 1.0)
                factors = (0.0, 0.0, v) if self.pattern else (q, k, v)
                name = "pattern" if self.pattern else "attention_halves"
                for layer in model.map.layers_with_heads:
                    for path, factor in _factors(model, layer, factors).items():
                        module = model.hf.get_submodule(path)
                        _register(stack, [module], fired, name, partial(lambda factor, module: _scale_hook(factor), factor))
            if self.temperature != 1:
                stack.enter_context(_softmax_at(model, self.temperature, fired))
            yield
        fired.check(model)


RULES = {
    "plain": Rules(),
    "relp": Rules(norm=True, activation=True, gate=True),
    "attnlrp": Rules(norm=True, activation=True, gate=True, attention_halves=True),
    "gim": Rules(norm=True, gate=True, attention_halves=True, temperature=2.0),
}
"""Published sets by name."""


Hook = Callable[[Tensor, Tensor], Tensor]
"""Of a module's input and output makes the same output with another way back."""


class _Fired:
    """Counts how often each rule met a gradient. Final."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def check(self, model: HookedModel) -> None:
        silent = [rule for rule, count in self.counts.items() if not count]
        if silent:
            raise ModelError(
                f"The backward rule {silent[0]!r} did not fire anywhere in {model.name}: no gradient passed where it holds. Run the "
                "forward pass with gradients inside of the context, take units that lie before such a place, or leave the rule out."
            )


def _register(stack: ExitStack, modules: list[nn.Module], fired: _Fired, rule: str, make: Callable[[nn.Module], Hook]) -> None:
    fired.counts.setdefault(rule, 0)
    for module in {id(module): module for module in modules}.values():
        hook = make(module)

        def forward_hook(module: nn.Module, args: tuple[Any, ...], out: Tensor, hook: Hook = hook) -> Tensor:
            if not (torch.is_grad_enabled() and out.requires_grad):
                return out
            fired.counts[rule] += 1
            return hook(args[0], out)

        stack.callback(module.register_forward_hook(forward_hook).remove)


class _Way(torch.autograd.Function):
    """The value of one tensor, with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Scale(torch.autograd.Function):
    """The identity, with the gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Softmax(torch.autograd.Function):
    """Softmax with its derivative at another temperature, without the factor 1 / temperature (GIM, section 4.1)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, value: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.temperature = temperature
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        softer = torch.softmax(scores.to(grad.dtype) / ctx.temperature, -1)
        return (softer * (grad - (grad * softer).sum(-1, keepdim=True))).to(scores.dtype), None, None


def _scale_hook(factor: Tensor | float) -> Hook:
    def hook(read: Tensor, out: Tensor) -> Tensor:
        return _Scale.apply(out, factor.to(out.device, out.dtype) if isinstance(factor, Tensor) else factor)

    return hook


def _activation_hook(module: nn.Module) -> Hook:
    def hook(read: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            tiny = torch.full_like(read, 1e-4)  # at 0 the ratio is its limit
            safe = torch.where(read == 0, tiny, read)
            ratio = torch.where(read == 0, module.forward(tiny) / tiny, out / safe)
        return _Way.apply(out.detach(), read * ratio)

    return hook


def _norm_hook(module: nn.Module) -> Hook:
    gain = gain_of(module)

    def hook(read: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            scale, centred = gain(read)
        moved = read - read.mean(-1, keepdim=True) if centred else read
        return _Way.apply(out.detach(), moved * scale)

    return hook


def _gates(model: HookedModel) -> list[nn.Module]:
    parts = [mlp_parts(model, layer) for layer in model.map.layers_with_mlps]
    found = [module for part in parts if part.up is not None for module in (part.act, part.up)]
    if not found:
        raise ModelError(f"The MLPs of {model.name} have no gate, so gated products cannot be halved. Leave the rule 'gate' out.")
    return found


def _factors(model: HookedModel, layer: int, factors: tuple[float, float, float]) -> dict[str, Tensor | float]:
    """For each projection of a layer what its output's gradient is multiplied by."""
    ports = model.map.ports(layer)
    found: dict[str, Tensor | float] = {}
    for path, places in by_module(ports).items():
        columns = {column: factors[place] for place in places for column in columns_of(ports[place])}
        row = torch.tensor([columns.get(column, 1.0) for column in range(max(columns) + 1)])
        found[path] = factors[places[0]] if len(places) == 1 else row
    return found


class _AttentionSoftmax(TorchFunctionMode):
    """Sees every softmax while it is active, and changes the way back of those inside of an attention."""

    def __init__(self, temperature: float, fired: _Fired) -> None:
        super().__init__()
        self.inside = False
        self._temperature = temperature
        self._fired = fired

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.softmax and self.inside and out.requires_grad:
            self._fired.counts["temperature"] += 1
            return _Softmax.apply(args[0], out.detach(), self._temperature)
        return out


@contextmanager
def _softmax_at(model: HookedModel, temperature: float, fired: _Fired) -> Iterator[None]:
    fired.counts["temperature"] = 0
    mode = _AttentionSoftmax(temperature, fired)

    def enter(*_: Any) -> None:
        mode.inside = True

    def leave(*_: Any) -> None:
        mode.inside = False

    with ExitStack() as stack:
        stack.enter_context(eager_attention(model))
        for layer in model.map.layers_with_heads:
            module = model.module(layer, "attention")
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield
