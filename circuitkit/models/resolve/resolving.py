"""``resolve``: from a model to its map."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.core.errors import ModelError
from circuitkit.models.bare import unwrapped
from circuitkit.models.model_map import Block, Evidence, Heads, ModelMap
from circuitkit.models.resolve import blocks, heads, kept, proof
from circuitkit.models.resolve.compare import alike, is_affine, is_norm, same, tolerance
from circuitkit.models.resolve.dependence import heads_by_dependence
from circuitkit.models.resolve.probe import Call, Record, forward_names, inside, record
from circuitkit.models.resolve.thin import thin, widened

_LENGTH = 11  # no model has as many heads, so that axes are not mistaken for each other
_TWIN = 50_000_000  # weights up to which a model is copied


def resolve(hf: nn.Module) -> ModelMap:
    """Finds the parts of a model by value, and proves what it found.

    A small model is looked at twice: its parts are found in a copy with random weights, because in a model made by hand what is zero can
    be found anywhere, and proved in the model itself. A large one is probed once, and runs once more to see that it gives the same again.

    Args:
        hf: Any module that maps token ids to logits, causal or not; it is left as it was.

    Raises:
        ModelError: A part could not be found, or something that was found does not hold: which and where is said.
    """
    with torch.device("cpu"), unwrapped(hf), _evaluating(hf):  # whatever device is the default just now
        config = _config(hf)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(hf).__name__} has an encoder and a decoder; expected one stack of layers that reads the tokens. Take a "
                "decoder-only or an encoder-only model."
            )
        name = kept.key(hf)
        known = None if name is None else kept.kept(name, hf)
        if known is not None:
            return known
        sums = proof.weights_sum(hf)
        proof.check_finite(sums)
        if any(tensor.device.type == "meta" for tensor in hf.parameters()) and not any(hasattr(each, "_hf_hook") for each in hf.modules()):
            made = thin(hf)
            found = widened(_proved(made.hf, _config(made.hf), proof.weights_sum(made.hf)), made, hf)
        else:
            found = _proved(hf, config, sums)
        if name is not None:
            kept.keep(name, found)
        return found


def _proved(hf: nn.Module, config: Any, sums: Mapping[str, float]) -> ModelMap:
    """The map of a model whose weights are at hand."""
    ids = proof.tokens(hf, _vocabulary(hf), min(_LENGTH, _longest(hf)), _device(hf))
    twin = _twin(hf)
    own = record(hf, ids)
    proof.check_unchanged(sums, proof.weights_sum(hf))
    if not bool(torch.isfinite(own.logits).all()):
        raise ModelError("The model gives logits that are no finite numbers for random tokens. Expected numbers; check its weights.")
    probed = own if twin is None else record(twin, ids.cpu())
    later = max(proof.is_causal(own.logits), proof.is_causal(probed.logits))
    causal = later <= tolerance(own.logits.dtype)
    names, checks = proof.again(own, forward_names(hf), causal)
    found = replace(_found(hf, probed, config), causal=causal, forward=names)
    proof.check_alike(found)
    if found.caches and twin is not None:
        checks.append(proof.holds_keys(twin, ids.cpu(), probed.logits))
        found = replace(found, caches=checks[-1].error <= 10 * tolerance(probed.logits.dtype))
    if not found.direct:
        checks.append(proof.nothing_passes_by(own, found))
    return replace(found, evidence=(*proof.evidence(found, own), *checks, Evidence("later tokens do not matter", "", later)))


@contextmanager
def _evaluating(hf: nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode, so that dropout is off; then each module as before."""
    training = [module for module in hf.modules() if module.training]
    hf.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _found(hf: nn.Module, probed: Record, config: Any) -> ModelMap:
    found = blocks.layers(probed, getattr(config, "num_hidden_layers", None))
    ends = _ends(probed, found[-1])
    n_heads = None if probed.attentions else getattr(config, "num_attention_heads", None)  # else the attention function tells
    described = [_block(probed, layer, n_heads if isinstance(n_heads, int) else None) for layer in found]
    parts = tuple(block for block, _ in described)
    names = forward_names(hf)
    return ModelMap(
        family=getattr(config, "model_type", None) or type(hf).__name__,
        blocks=parts,
        embed=_embed(probed),
        final_norm=ends.final_norm,
        unembed=ends.unembed,
        forward=names,
        logits=_gives_logits(hf, probed),
        caches="past_key_values" in names and all(block.attention is None or block.heads is not None for block in parts),
        interface=bool(probed.attentions),
        additive=all(is_sum for _, is_sum in described),
        direct=ends.direct,
        in_place=probed.in_place,
    )


def _block(probed: Record, layer: blocks.Layer, n_heads: int | None) -> tuple[Block, bool]:
    """A layer of the map: its attention or mixer, and its MLP. And whether the stream behind it is the sum of them and nothing else.

    Raises:
        ModelError: It has two of one kind.
    """
    added, is_sum = blocks.added(probed, layer)
    mixers, mlps = [one for one in added if one.is_mixer], [one for one in added if not one.is_mixer]
    if len(mixers) > 1 or len(mlps) > 1:
        raise ModelError(
            f"{layer.call.path} adds {len(mixers)} parts that look at other positions and {len(mlps)} that do not "
            f"({', '.join(one.call.path for one in added)}). Expected at most one of each; give the map of the model by hand."
        )
    mixer, mlp = (mixers[0] if mixers else None), (mlps[0] if mlps else None)
    found = Block(
        module=layer.call.path,
        attention=None if mixer is None else mixer.addend,
        heads=None if mixer is None else _heads(probed, layer, mixer, n_heads),
        mlp=None if mlp is None else mlp.addend,
        neurons=None if mlp is None else heads.neurons(probed, mlp),
        parallel=len(added) == 2 and all(one.reads == 0 for one in added),
        item=layer.item,
        n_items=layer.call.n_items,
    )
    return found, is_sum


def _heads(probed: Record, layer: blocks.Layer, mixer: blocks.Added, n_heads: int | None) -> Heads | None:
    if any(inside(attention.path, mixer.owner.path) for attention in probed.attentions):
        return heads.heads(probed, mixer)
    return heads_by_dependence(probed, layer, mixer, n_heads)


@dataclass(frozen=True)
class _Ends:
    """What is behind the last layer. Final.

    Attributes:
        unembed: The unembedding.
        final_norm: The norm of the residual stream.
        direct: Whether there is nothing else in between.
    """

    unembed: str
    final_norm: str | None
    direct: bool


def _ends(probed: Record, last: blocks.Layer) -> _Ends:
    """The unembedding, and the norm before it.

    Raises:
        ModelError: There is no linear map to the logits.
    """
    behind = [call for call in probed.calls if call.started > last.call.ended]
    width = probed.logits.shape[-1]
    ends = [call for call in behind if call.outputs and call.outputs[0][1].shape[-1] == width and is_affine(call)]
    if not ends:
        raise ModelError(
            f"Expected a linear map behind {last.call.path} that gives the logits of the {width} tokens, found none. Give the map by hand."
        )
    read = ends[-1].inputs[0][1]
    if same(read, last.left):
        return _Ends(ends[-1].path, None, direct=True)
    readers = [call for call in behind if any(same(tensor, last.left) for _, tensor in call.inputs) and call.outputs]
    for call in readers:
        if is_norm(call) and alike(call.outputs[0][1], read):
            return _Ends(ends[-1].path, call.path, direct=True)
    return _Ends(ends[-1].path, next((call.path for call in readers if is_norm(call)), None), direct=False)


def _embed(probed: Record) -> str:
    """The module that reads the token ids; the first of the innermost ones."""
    readers = [call for call in probed.calls if call.path and any(same(tensor, probed.ids) for _, tensor in call.inputs)]
    leaves = [call for call in readers if call.outputs and not probed.within(call.path)]
    if not leaves:
        raise ModelError("Expected a module that reads the token ids and gives the embeddings, found none. Give the map by hand.")
    return leaves[0].path


def _gives_logits(hf: nn.Module, probed: Record) -> bool:
    root: Call = probed.once("")
    return not root.outputs or root.n_items is not None


def _config(hf: nn.Module) -> Any:
    config: Any = getattr(hf, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _vocabulary(hf: nn.Module) -> int:
    """How many token ids are surely known."""
    size = getattr(_config(hf), "vocab_size", None)
    return size if isinstance(size, int) else min(_tables(hf), default=5)


def _longest(hf: nn.Module) -> int:
    """How many positions are surely known."""
    return min(_tables(hf), default=_LENGTH)


def _tables(hf: nn.Module) -> list[int]:
    """Of how many tokens or positions the embeddings are; tables of a few kinds of tokens are left out."""
    return [module.num_embeddings for module in hf.modules() if isinstance(module, nn.Embedding) and module.num_embeddings > 4]


def _device(hf: nn.Module) -> torch.device:
    first: Tensor | None = next((tensor for tensor in hf.parameters() if tensor.device.type != "meta"), None)
    return torch.device("cpu") if first is None else first.device


def _twin(hf: nn.Module) -> nn.Module | None:
    """A copy with random weights in float32 on the processor; None where the model is large, or was placed or packed."""
    tensors = list(hf.parameters())
    if sum(tensor.numel() for tensor in tensors) > _TWIN or any(hasattr(module, "_hf_hook") for module in hf.modules()):
        return None
    if any("forward" in vars(module) for module in hf.modules()):  # a copy would run the original's
        return None
    if any(not tensor.is_floating_point() or tensor.device.type == "meta" for tensor in tensors):
        return None
    twin = copy.deepcopy(hf).float().cpu()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in twin.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            else:
                tensor.mul_(1 + 0.1 * noise).add_(0.1 * noise.flip(0))
    return twin
