"""One forward pass in which every module, and every call of attention, is seen: what goes in and what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from circuitkit.core.errors import ModelError

_NAME = "circuitkit_probe"

Input = tuple[int | str, Tensor]
"""An argument of a module, by position or by name."""


@dataclass(eq=False)
class Call:
    """One run of a module. Final.

    Attributes:
        path: Of the module.
        module: The module itself.
        inputs: The arguments that are tensors of numbers or token ids, copied before the module ran.
        outputs: What it returned: for each tensor of numbers its place (None where the module returns a tensor) and a copy.
        n_items: How many outputs it returned; None where it returned a tensor.
        listed: Whether it returned them as a list.
        started, ended: When, counted in starts and ends of modules.
        args, kwargs: As they were given, so that the module can run again.
    """

    path: str
    module: nn.Module
    inputs: list[Input]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    started: int
    ended: int = -1
    outputs: list[tuple[int | None, Tensor]] = field(default_factory=list)
    n_items: int | None = None
    listed: bool = False


@dataclass(eq=False)
class Attention:
    """One call of the attention function. Final.

    Attributes:
        path: Of the module that called it.
        q, k, v: As attention sees them: row x head x position x width.
        pattern: What each head looks at; None where the family's own function does not give it.
        z: What it returned: row x position x head x width.
    """

    path: str
    q: Float[Tensor, "row head pos d_head"]
    k: Float[Tensor, "row kv_head key d_head"]
    v: Float[Tensor, "row kv_head key d_value"]
    z: Float[Tensor, "row pos head d_value"]
    pattern: Float[Tensor, "row head pos key"] | None


@dataclass(eq=False)
class Record:
    """What was seen in a pass. Final.

    Attributes:
        hf: The model.
        ids: The token ids.
        logits: What came out.
        calls: Runs of modules, in the order in which they began.
        attentions: Calls of the attention function, in order.
        in_place: Whether something that a module returned was changed in place afterwards.
    """

    hf: nn.Module
    ids: Int[Tensor, "row pos"]
    logits: Float[Tensor, "row pos d_vocab"]
    calls: list[Call]
    attentions: list[Attention]
    in_place: bool = False

    def of(self, path: str) -> list[Call]:
        """The runs of one module."""
        return [call for call in self.calls if call.path == path]

    def once(self, path: str) -> Call:
        """The run of a module that has to run once.

        Raises:
            ModelError: It ran not at all or several times.
        """
        calls = self.of(path)
        if len(calls) != 1:
            raise ModelError(
                f"Expected {path or 'the model'} to run once in a forward pass, found {len(calls)} times. Replacing its output would do "
                "so at each of them, so models that run a module several times cannot be taken apart."
            )
        return calls[0]

    def within(self, path: str) -> list[Call]:
        """The runs of the modules inside of a module, in the order in which they began."""
        return [call for call in self.calls if call.path.startswith(f"{path}.")]


def inside(path: str, outer: str) -> bool:
    """Whether a module is another one or a part of it."""
    return path == outer or not outer or path.startswith(f"{outer}.")


def forward_names(hf: nn.Module) -> frozenset[str]:
    """The names that a model's forward declares, of the arguments that we may hand it."""
    known = {"attention_mask", "position_ids", "use_cache", "past_key_values", "logits_to_keep"}
    parameters = inspect.signature(type(hf).forward).parameters
    names = known & set(parameters)
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if isinstance(hf, PreTrainedModel) and takes_more and "past_key_values" in names:
        names |= {"use_cache"}  # handed on to the model inside
    return frozenset(names)


def logits_of(hf: nn.Module, ids: Int[Tensor, "row pos"], **inputs: Any) -> Tensor:
    """Logits of one plain pass without a cache of keys and values.

    Raises:
        ModelError: The model gives something else.
    """
    if "use_cache" in forward_names(hf):
        inputs["use_cache"] = False
    with torch.no_grad():
        try:
            out = hf(ids, **inputs)
        except ModelError:
            raise
        except Exception as problem:
            raise ModelError(
                f"{type(hf).__name__} cannot run on {ids.shape[0]} rows of {ids.shape[1]} random token ids: {type(problem).__name__}: "
                f"{problem}. Expected a model that maps token ids alone to logits."
            ) from problem
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.ndim != 3:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(out).__name__} without `logits`"
        raise ModelError(
            f"{type(hf).__name__} should map token ids of shape {tuple(ids.shape)} (row x position) to logits of shape row x position x "
            f"vocabulary, as a tensor or as `logits` of what it returns; found {found}. Wrap it in a module that does."
        )
    return logits


def record(hf: nn.Module, ids: Int[Tensor, "row pos"], **inputs: Any) -> Record:
    """Runs a model once, with eager attention where it goes through transformers' attention interface, and keeps what was seen."""
    paths = {module: path for path, module in hf.named_modules()}
    calls: list[Call] = []
    attentions: list[Attention] = []
    open_calls: dict[nn.Module, list[Call]] = {}
    clock = iter(range(1 << 62))
    given: list[tuple[Tensor, int]] = []  # what modules returned, and how often it had been changed by then

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        there: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        inputs: list[Input] = [(key, value.detach().clone()) for key, value in there if _is_kept(value, ids)]
        copies = dict(inputs)
        kept = tuple(copies.get(place, value) for place, value in enumerate(args))
        call = Call(paths[module], module, inputs, kept, {key: copies.get(key, value) for key, value in kwargs.items()}, next(clock))
        calls.append(call)
        open_calls.setdefault(module, []).append(call)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given.extend((item, item._version) for item in (out if isinstance(out, tuple | list) else [out]) if _is_kept(item, ids))
        call = open_calls[module].pop()
        call.ended = next(clock)
        if isinstance(out, Tensor):
            call.outputs = [(None, out.detach().clone())] if _is_kept(out, ids) else []
        elif isinstance(out, tuple | list):
            call.n_items, call.listed = len(out), isinstance(out, list)
            call.outputs = [(place, item.detach().clone()) for place, item in enumerate(out) if _is_kept(item, ids)]

    def see(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, z: Tensor, pattern: Tensor | None) -> Tensor:
        one, two, three, four = (tensor.detach().clone() for tensor in (q, k, v, z))
        attentions.append(Attention(paths[module], one, two, three, four, None if pattern is None else pattern.detach().clone()))
        return z

    handles = []
    for module in paths:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with watched_attention(hf, see):
            logits = logits_of(hf, ids, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Record(hf, ids, logits.detach(), calls, attentions, any(tensor._version > version for tensor, version in given))


def _is_kept(value: Any, ids: Tensor) -> bool:
    """Tensors that have a row for each token, in whichever way rows and positions lie: also flattened, or with the heads between."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    if value.shape[:2] == ids.shape or value.shape[0] == ids.numel():
        return True
    return value.ndim == 4 and (value.shape[0], value.shape[2]) == tuple(ids.shape)


See = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Told the module, q, k, v, z and the pattern; gives the z that the module goes on with."""

_watching: ContextVar[See] = ContextVar("watching")


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = eager_of(module)(module, query, key, value, *args, **kwargs)
    z = _watching.get()(module, query, key, value, out[0], out[1] if isinstance(out[1], Tensor) else None)
    return (z, *out[1:])


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def watched_attention(hf: nn.Module, see: See) -> Iterator[None]:
    """Within this context a transformers model computes attention with its family's own eager function, and ``see`` is told of it.

    The function is found where the module's own forward finds its default, so that sinks, soft caps and windows are as eager has them; the
    mask is that of eager. Models off the attention interface are left as they are. Afterwards all is as before.
    """
    configs = _configs(hf)
    before = [config._attn_implementation_internal for config in configs]
    token = _watching.set(see)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _watching.reset(token)


def _configs(hf: nn.Module) -> list[Any]:
    """The configurations of a transformers model whose attention is chosen by name, each once."""
    models = [module for module in hf.modules() if isinstance(module, PreTrainedModel)]
    if not any(model._can_set_attn_implementation() for model in models):
        return []
    found: dict[int, Any] = {id(model.config): model.config for model in models}
    for module in hf.modules():  # modules of some families read a copy
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of a module's family.

    Raises:
        ModelError: There is none where the module's forward looks for it.
    """
    for kind in type(module).__mro__:
        forward = vars(kind).get("forward")
        if forward is None:
            continue
        names = getattr(inspect.unwrap(forward), "__globals__", {})
        if "eager_attention_forward" in names:
            return names["eager_attention_forward"]
        found = [value for name, value in names.items() if name.startswith("eager_") and name.endswith("attention_forward")]
        if len(found) == 1:
            return found[0]
    raise ModelError(
        f"{type(module).__name__} asks transformers' attention interface for a function, and there is no eager one in its own file. "
        "Expected `eager_attention_forward` beside it; give the map of the model by hand."
    )
