"""Passes that gradients are taken of: plain torch hooks between the modules as transformers made them, the weights held fixed.

A trace would run every edit in a thread of its own and end with the forward pass, while these edits are part of an autograd graph that is
used later; and a hook costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.core.node import PORTS, Site
from circuitkit.models.bare import unwrapped
from circuitkit.models.blocks import joint_norms, projections
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import shared, split
from circuitkit.models.mlp_parts import mlp_parts

Edit = Callable[[Tensor], Tensor]
"""Gives what goes on in the place of what flows at a site, in a way that autograd can follow."""


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Within this context autograd works, weights get no gradients, the model is in eval mode, without nnsight; then all is as before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    modes = [(module, module.training) for module in model.hf.modules()]
    try:
        model.hf.requires_grad_(False)
        model.hf.eval()
        with torch.enable_grad(), unwrapped(model.hf):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def edited(model: HookedModel, edits: Mapping[tuple[Site, int], Edit]) -> Iterator[None]:
    """Within this context what flows at some sites goes through functions.

    Args:
        model: The model.
        edits: By site and layer. ``z`` is given as row x position x head x d_head, all others as row x position x width. Sites: ``embed``
            (what enters layer 0), ``resid_pre``, ``z``, ``attn_out``, ``mlp_act``, ``mlp_out``, ``resid_post``.

    Raises:
        ModelError: No such site.
    """
    contexts = [_edited(model, site, layer, edit) for (site, layer), edit in edits.items()]  # finds modules before any of them is hooked
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def logits(model: HookedModel, ids: Int[Tensor, "row pos"], **inputs: Any) -> Float[Tensor, "row d_vocab"]:
    """Logits of the model as it is now, hooks included, at the last position; in float32 at least, part of the autograd graph."""
    last = model.hf(ids.to(model.device), logits_to_keep=1, **{"use_cache": False, **inputs}).logits[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def stream(model: HookedModel, ids: Int[Tensor, "row pos"], **inputs: Any) -> None:
    """Runs the model as it is now without gradients and without unembedding: for what hooks see."""
    with torch.no_grad():
        model.hf.base_model(ids.to(model.device), **{"use_cache": False, **inputs})


@contextmanager
def before(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Within this context a module's input goes through a function."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, edit: Edit, *, first: bool = False) -> Iterator[None]:
    """Within this context a module's output, or the first of its outputs, goes through a function.

    Args:
        module: The module.
        edit: The function.
        first: Before functions that are there already.
    """

    def hook(module: nn.Module, args: Any, out: Tensor | tuple[Any, ...]) -> Tensor | tuple[Any, ...]:
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handle = module.register_forward_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()


def _edited(model: HookedModel, site: Site, layer: int, edit: Edit) -> Any:
    block = model.hf.get_submodule(f"{model.architecture.blocks}.{layer}")
    match site:
        case Site.EMBED | Site.RESID_PRE:
            return before(block, edit)
        case Site.RESID_POST:
            return after(block, edit)
        case Site.Z:
            return before(model.module(layer, "out_proj"), lambda z: edit(z.unflatten(-1, (model.n_heads, -1))).flatten(-2))
        case Site.ATTN_OUT:
            return after(model.module(layer, "attention"), edit)
        case Site.MLP_ACT:
            return before(mlp_parts(model, layer).down, edit)
        case Site.MLP_OUT:
            return after(model.module(layer, "mlp"), edit)
    raise ModelError(
        "Gradients reach the sites embed, resid_pre, z, attn_out, mlp_act, mlp_out and resid_post, "
        f"found {site}. Take one of these."
    )


PortEdit = Callable[[str, Float[Tensor, "row pos head d_head"]], Float[Tensor, "row pos head d_head"]]
"""Of a port (``q``, ``k`` or ``v``, in this order) and what each head takes there makes what goes on."""


@contextmanager
def ports(model: HookedModel, layer: int, edit: PortEdit) -> Iterator[None]:
    """Within this context the queries, keys and values of a layer go through a function, behind norms of all heads together where there
    are some. What the function itself calls stays as it is. Needs ``own_keys_and_values``."""
    busy = False

    def edited(port: str, out: Tensor) -> Tensor:
        nonlocal busy
        busy = True
        try:
            return edit(port, out)
        finally:
            busy = False

    def single(port: str, out: Tensor) -> Tensor:
        n_heads = model.n_heads if port == "q" else model.n_kv_heads
        return out if busy else edited(port, shared(model, out.unflatten(-1, (n_heads, -1)))).flatten(-2)

    def fused(out: Tensor) -> Tensor:
        parts = [edited(port, shared(model, part)) for port, part in zip(PORTS, split(model, [out]), strict=True)]
        if model.architecture.fused_by_head:
            return torch.stack(parts, -2).flatten(-3)
        return torch.cat([part.flatten(-2) for part in parts], -1)

    modules, norms = projections(model, layer), joint_norms(model, layer)
    with ExitStack() as stack:
        if len(modules) == 1:
            stack.enter_context(after(modules[0], fused, first=True))
        else:
            for port, module, norm in zip(PORTS, modules, norms, strict=True):
                # Behind a projection, and behind a norm with all that is laid on it: a rule there has the norm's input for its own.
                stack.enter_context(after(norm or module, partial(single, port), first=norm is None))
        yield


@contextmanager
def own_keys_and_values(model: HookedModel) -> Iterator[None]:
    """Within this context attention takes keys and values with a slice for each query head, which ``ports`` gives it."""
    if model.n_kv_heads == model.n_heads:
        yield
        return
    attentions: list[Any] = [model.module(layer, "attention") for layer in range(model.n_layers)]
    before = [attention.num_key_value_groups for attention in attentions]
    try:
        for attention in attentions:
            attention.num_key_value_groups = 1
        yield
    finally:
        for attention, groups in zip(attentions, before, strict=True):
            attention.num_key_value_groups = groups
