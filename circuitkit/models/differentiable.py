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
from circuitkit.models.blocks import joint_norms
from circuitkit.models.columns import by_module, heads_in, together
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import shared
from circuitkit.models.model_map import put, taken

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
    last = model.forward(ids, keep=1, **inputs)[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def stream(model: HookedModel, ids: Int[Tensor, "row pos"], **inputs: Any) -> None:
    """Runs the model as it is now without gradients: for what hooks see."""
    with torch.no_grad():
        model.forward(ids, keep=1, **inputs)


@contextmanager
def before(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Within this context a module's input goes through a function."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: edit(kwargs[first])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, edit: Edit, *, item: int | None = None, first: bool = False) -> Iterator[None]:
    """Within this context a module's output, or one of its outputs, goes through a function.

    Args:
        module: The module.
        edit: The function.
        item: Which of its outputs; None where it gives a tensor.
        first: Before functions that are there already.
    """

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return put(out, item, edit(taken(out, item)))

    handle = module.register_forward_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()


def _edited(model: HookedModel, site: Site, layer: int, edit: Edit) -> Any:
    block = model.map.blocks[layer]
    match site:
        case Site.EMBED | Site.RESID_PRE:
            return before(model.module(layer, "block"), edit)
        case Site.RESID_POST:
            return after(model.module(layer, "block"), edit, item=block.item)
        case Site.Z:
            return before(model.module(layer, "out_proj"), lambda z: edit(z.unflatten(-1, (model.n_heads, -1))).flatten(-2))
        case Site.ATTN_OUT:
            return after(model.module(layer, "attention"), edit, item=None if block.attention is None else block.attention.item)
        case Site.MLP_ACT:
            return before(model.module(layer, "mlp_out_proj"), edit)
        case Site.MLP_OUT:
            return after(model.module(layer, "mlp"), edit, item=None if block.mlp is None else block.mlp.item)
    raise ModelError(
        "Gradients reach the sites embed, resid_pre, z, attn_out, mlp_act, mlp_out and resid_post, "
        f"found {site}. Take one of these."
    )


PortEdit = Callable[[str, Float[Tensor, "row pos head d_head"]], Float[Tensor, "row pos head d_head"]]
"""Of a port (``q``, ``k`` or ``v``, in this order) and what each head takes there makes what goes on."""


@contextmanager
def ports(model: HookedModel, layer: int, edit: PortEdit) -> Iterator[None]:
    """Within this context the queries, keys and values of a layer go through a function, behind norms of all heads together where there
    are some. What the function itself calls stays as it is. Needs ``own_keys_and_values``.

    Raises:
        ModelError: They are no plain projections of what the attention reads, or lie in one module with fewer keys and values than queries.
    """
    found, norms, busy = model.map.ports(layer), joint_norms(model, layer), False
    served = by_module(found)
    if len(served) < 3 and model.n_kv_heads != model.n_heads:
        raise ModelError(
            f"The heads of {model.name} ({model.map.family}) share keys and values that one module makes together with the queries, so "
            "they cannot be given keys and values of their own in a pass. Score edges without gradients, or take gradients of nodes."
        )

    def through(places: tuple[int, ...], out: Tensor) -> Tensor:
        nonlocal busy
        if busy:
            return out
        busy = True
        try:
            parts = [edit(PORTS[place], shared(model, heads_in(out, found[place]))) for place in places]
        finally:
            busy = False
        return together([found[place] for place in places], parts) if len(places) > 1 else parts[0].flatten(-2)


    with ExitStack() as stack:
        for path, places in served.items():
            norm = norms[places[0]]
            # Behind a projection, and behind a norm with all that is laid on it: a rule there has the norm's input for its own.
            stack.enter_context(after(norm or model.hf.get_submodule(path), partial(through, places), first=norm is None))
        yield


@contextmanager
def own_keys_and_values(model: HookedModel) -> Iterator[None]:
    """Within this context attention takes keys and values with a slice for each query head, which ``ports`` gives it."""
    if model.n_kv_heads == model.n_heads:
        yield
        return
    attentions: list[Any] = [model.module(layer, "attention") for layer in model.map.layers_with_heads]
    if not all(hasattr(attention, "num_key_value_groups") for attention in attentions):
        raise ModelError(
            f"The heads of {model.name} ({model.map.family}) share keys and values in a way of its own, so they cannot be given keys and "
            "values of their own in the middle of a pass. Score edges without gradients, or take gradients of nodes."
        )
    before = [attention.num_key_value_groups for attention in attentions]
    try:
        for attention in attentions:
            attention.num_key_value_groups = 1
        yield
    finally:
        for attention, groups in zip(attentions, before, strict=True):
            attention.num_key_value_groups = groups
