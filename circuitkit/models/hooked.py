"""HookedModel: a model whose components can be read, replaced and skipped while it runs.

Everything goes through nnsight; within ``bare.unwrapped`` the model runs without it. In one pass the sites of a layer must be touched in
the order in which the model computes them: ``resid``, attention (``projections_in``, ``skip_projections``, ``z``, ``skip_out_proj``,
``attention_out``; or ``skip_attention``),
MLP (``mlp_norm_in``, ``mlp_in``, ``mlp_act``, ``mlp_out``; or ``skip_mlp``), ``out``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from circuitkit.core.errors import ModelError, unknown_choice
from circuitkit.core.universe import NodeUniverse, Universe
from circuitkit.models import blocks
from circuitkit.models.bare import is_unwrapped, wrapped
from circuitkit.models.columns import by_module, heads_in
from circuitkit.models.fingerprint import fingerprint_of
from circuitkit.models.layer import Heads, Layer, Projections, Resid, Traced
from circuitkit.models.model_map import Block, ModelMap
from circuitkit.models.placement import device_of
from circuitkit.models.resolve import resolve
from circuitkit.models.shape import Shape
from circuitkit.models.sharded import is_sharded

__all__ = ["Heads", "HookedModel", "Layer", "Projections", "Resid", "Visit"]

Visit = Callable[[Layer], None]


class HookedModel:
    """A model, its tokenizer, and the means to intervene in it. Final.

    Args:
        hf: A model of transformers, or any module of your own that maps token ids to logits. It is put into eval mode, and its weights
            stay as they are.
        tokenizer: Its tokenizer, where one is needed.
        map: Where its parts are; None to find them.
        name: For people and files; None for the name of the module's class.
        revision: Of the weights, where known.
        folder: Where the weights came from, where known.
        origin: What else made it, for provenance: code of its own, an adapter, a quantisation.

    Attributes:
        name, tokenizer, revision, folder, origin: As given.
        hf: The module. Its modules have nnsight's forwards, which hand on what they are given outside of a pass; within
            ``bare.unwrapped(hf)`` they have their own.
        map: Where its parts are.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: Its shape.
        d_heads: Width of the outputs of all heads of a layer together.
        n_tokens: How many token ids it reads.
        n_ctx: How many positions it reads at most; None where nothing says so.
        universe: Its heads, mixers and MLPs.

    Raises:
        ModelError: Its parts cannot be found, or it is no model that maps token ids to logits by a stack of layers.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        map: ModelMap | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        folder: Path | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = type(hf).__name__ if name is None else name
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.revision = revision
        self.folder = folder
        self.origin = dict(origin or {})
        self._envoy = wrapped(hf)
        self.map = resolve(hf) if map is None else _checked(map, hf, self.name)
        self.n_layers = self.map.n_layers
        heads = self.map.heads
        self.n_heads, self.n_kv_heads, self.d_head = (0, 0, 0) if heads is None else (heads.n_heads, heads.n_kv_heads, heads.d_head)
        self.d_heads = 0 if heads is None else heads.n_heads * heads.d_value
        shape = Shape.of(hf, self.map)
        self.d_model, self.d_mlp, self.d_vocab = shape.d_model, shape.d_mlp, shape.d_vocab
        self.n_tokens, self.n_ctx = shape.n_tokens, shape.n_ctx
        self.universe = _universe(self.map)
        self._parts = tuple(_parts(block) for block in self.map.blocks)
        self._fingerprint: str | None = None

    @cached_property
    def _traced(self) -> Traced:
        return Traced.of(self._envoy, self.hf, self.map)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        return device_of(self.hf.get_submodule(self.map.embed), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(parameter.dtype for parameter in self.hf.parameters() if parameter.is_floating_point())

    @property
    def attention(self) -> str:
        """Which implementation of attention is used, such as ``sdpa``; ``own`` for a module of one's own."""
        return (self.hf.config._attn_implementation or "eager") if isinstance(self.hf, PreTrainedModel) else "own"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the model's configuration says; nothing for a module of one's own."""
        return self.hf.config.to_dict() if isinstance(self.hf, PreTrainedModel) else {}

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding; None where there is none."""
        return None if self.map.final_norm is None else self.hf.get_submodule(self.map.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        """The module that makes logits of what the final norm gives."""
        return self.hf.get_submodule(self.map.unembed)

    @cached_property
    def is_shared(self) -> bool:
        """Whether the processes of a launch hold the model together (``sharded.py``), so that all must make the same passes."""
        return is_sharded(self.hf)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer computes, for a model that Accelerate has placed on several devices."""
        return device_of(self.module(layer, "block"), self.device)

    def run(
        self,
        ids: Int[Tensor, "row pos"],
        visit: Visit | None = None,
        *,
        start: int = 0,
        resid: Resid | None = None,
        stop: int | None = None,
        keep: int = 1,
        gather: bool = False,
        tokens: Int[Tensor, " some"] | None = None,
        **inputs: Any,
    ) -> Float[Tensor, "row kept d_vocab"] | None:
        """One forward pass without gradients.

        Args:
            ids: Token ids.
            visit: Called for every computed layer in order; reads and writes its sites in the order of computation.
            start: First layer that is computed; layers below are skipped.
            resid: What enters layer ``start``; not needed at 0.
            stop: Layer after whose ``visit`` the pass ends. None runs to the logits.
            keep: How many last positions are unembedded; 0 for all.
            gather: Copy these positions together first. A slice is not contiguous, and torch would read the unembedding once for every row;
                another kernel computes the same product, so last bits may differ from the plain forward.
            tokens: Unembed these alone; logits then have a column for each. None for all. Last bits may differ, likewise.
            inputs: Further arguments of the model's forward, such as ``attention_mask``, on any device.

        Returns:
            Logits of the last ``keep`` positions in the model's dtype, or None if the pass was stopped.

        Raises:
            ModelError: The model's own forwards are in place, so that nothing can be read or replaced.
        """
        if visit is None and start == 0 and stop is None and not gather and tokens is None:
            with torch.no_grad():
                return self.forward(ids, keep=keep, **inputs)
        if self.device.type == "meta":
            if "past_key_values" in self.map.forward:
                # Without a cache transformers looks into the position ids for packed sequences, and here they have no content.
                config: Any = self.hf.config
                inputs.setdefault("past_key_values", DynamicCache(config=config))
            inputs.pop("attention_mask", None)  # likewise
        if is_unwrapped(self.hf):
            raise ModelError(
                f"{self.name} was to be traced while its own forwards are in place of nnsight's: the naive path is running, in this thread "
                "or another. Expected one after the other; give each thread a model of its own."
            )
        end = self.n_layers if stop is None else stop + 1
        logits, traced, given = None, self._traced, self._arguments(keep, inputs)
        narrow = 0 if "logits_to_keep" in self.map.forward else keep
        with torch.no_grad(), self._envoy.trace(ids.to(self.device), **given) as tracer:
            _walk(traced.layers, visit, start, end, resid)
            if stop is None:
                _read_out(traced.unembed, self.unembedding, narrow, gather, tokens)
                logits = nnsight.save(_logits(self._envoy.output, self.map))
            else:
                tracer.stop()
        return logits

    def forward(self, ids: Int[Tensor, "row pos"], *, keep: int = 0, **inputs: Any) -> Float[Tensor, "row kept d_vocab"]:
        """The model's own forward as it is now, hooks included; autograd may follow it.

        Args:
            ids: Token ids, on any device.
            keep: How many last positions have logits; 0 for all.
            inputs: Further arguments of the model's forward, such as ``attention_mask``, on any device.

        Raises:
            ModelError: There is padding, and the model cannot be told of it.
        """
        logits = _logits(self.hf(ids.to(self.device), **self._arguments(keep, inputs)), self.map)
        return logits if "logits_to_keep" in self.map.forward or not keep else logits[:, -keep:]

    def _arguments(self, keep: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's forward is given besides token ids: what it understands of these."""
        known, mask = self.map.forward, inputs.get("attention_mask")
        if "attention_mask" not in known and mask is not None and not bool(mask.all()):
            raise ModelError(
                f"The forward of {self.name} ({self.map.family}) takes no attention_mask, so it cannot be told which tokens are padding, "
                "and these prompts are of different lengths. Take prompts of equal length."
            )
        given = {"use_cache": False, "logits_to_keep": keep, **inputs}
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in given.items() if name in known}

    def project(self, layer: int, z: Float[Tensor, "*row head d_head"]) -> Float[Tensor, "*row d_model"]:
        """The output projection, outside of a pass: what heads' outputs give together, bias included."""
        with torch.no_grad():
            return self.module(layer, "out_proj")(z.flatten(-2).contiguous())

    def queries_keys_values(self, layer: int, resid: Resid) -> Projections:
        """What the heads of a layer make of a residual stream that enters it, norms included: outside of a pass.

        Raises:
            ModelError: Its queries, keys and values are no plain projections of what the attention reads.
        """
        with torch.no_grad():
            read, norms = blocks.read(self, layer, "attention", resid), blocks.joint_norms(self, layer)
            ports, outs = self.map.ports(layer), dict[int, Tensor]()
            for path, places in by_module(ports).items():
                made, norm = self.hf.get_submodule(path)(read), norms[places[0]]
                outs |= dict.fromkeys(places, made if norm is None else norm(made))
        queries, keys, values = (heads_in(outs[place], port) for place, port in enumerate(ports))
        return queries, keys, values

    def mlp_from(self, layer: int, resid: Resid) -> Resid:
        """What the MLP of a layer makes of the residual stream at its norm, norm included: outside of a pass."""
        addend = self.map.blocks[layer].mlp
        if addend is None or not addend.whole:
            why = "has none" if addend is None else f"has only its last projection as a module of its own ({addend.module})"
            raise ModelError(
                f"The MLP of layer {layer} of {self.name} ({self.map.family}) cannot run by itself: the layer {why}. Take nodes as units."
            )
        with torch.no_grad():
            return addend.of(self.module(layer, "mlp")(blocks.read(self, layer, "mlp", resid)))

    def embed(self, ids: Int[Tensor, "row pos"], **inputs: Any) -> Resid:
        """What enters the first layer. Further arguments as for ``run``."""
        entered: list[Resid] = []
        self.run(ids, lambda layer: entered.append(layer.resid), stop=0, **inputs)
        return entered[0]

    @property
    def unembeds_some(self) -> bool:
        """Whether single tokens can be unembedded: the unembedding is a plain matrix that lies where it computes."""
        return type(self.unembedding) is nn.Linear and not hasattr(self.unembedding, "_hf_hook")

    def unembed(self, resid: Float[Tensor, "row kept d_model"]) -> Float[Tensor, "row kept d_vocab"]:
        """Logits of a residual stream behind the last layer, in the model's dtype: the final norm once, then the unembedding."""
        ids = torch.zeros(resid.shape[:2], dtype=torch.long, device=self.device)
        logits = self.run(ids, start=self.n_layers, resid=resid.contiguous(), keep=0, attention_mask=torch.ones_like(ids))
        assert logits is not None
        return logits

    def module(self, layer: int, part: str) -> nn.Module:
        """The plain torch module of one part of a layer.

        Args:
            layer: Which.
            part: ``block``, ``attention``, ``attention_norm``, ``attention_post_norm``, ``out_proj``, ``mlp``, ``mlp_norm``,
                ``mlp_post_norm`` or ``mlp_out_proj``.

        Raises:
            ModelError: The layer has no such part.
        """
        path = self._parts[layer].get(part)
        if path is None:
            there = ", ".join(name for name, path in self._parts[layer].items() if path is not None)
            raise ModelError(f"Layer {layer} of {self.name} ({self.map.family}) has no {part}. It has: {there}.")
        return self.hf.get_submodule(path)

    def fingerprint(self) -> str:
        """SHA-256 of all weights, computed once; of the files they came from too, where Accelerate has left some on disk."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.hf, self.folder)
        return self._fingerprint

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers x {self.n_heads} heads, d_model {self.d_model}"
        return f"HookedModel({self.name!r}, {self.map.family}, {shape}, {self.dtype})"


def _walk(layers: tuple[Layer, ...], visit: Visit | None, start: int, end: int, resid: Resid | None) -> None:
    """Runs inside a trace: passes the layers in order. An ordinary function sees real tensors there."""
    for layer in layers[:start]:
        assert resid is not None
        layer.skip(resid)
    if visit is not None:
        for layer in layers[start:end]:
            visit(layer)


def _read_out(unembed: Any, module: Any, keep: int, gather: bool, tokens: Int[Tensor, " some"] | None) -> None:
    """Runs inside a trace: the unembedding reads some last positions alone, or gathered, or gives the logits of some tokens."""
    if not keep and not gather and tokens is None:
        return
    read = unembed.input[:, -keep:] if keep else unembed.input
    if tokens is None:
        unembed.input = read.contiguous() if gather else read
        return
    chosen = tokens.to(module.weight.device)
    bias = None if module.bias is None else module.bias.index_select(0, chosen)
    unembed.skip(nn.functional.linear(read.contiguous(), module.weight.index_select(0, chosen), bias))


def _logits(output: Any, model_map: ModelMap) -> Tensor:
    return output.logits if model_map.logits else output


def _checked(model_map: ModelMap, hf: nn.Module, name: str) -> ModelMap:
    """A map that was given by hand, if it can be this model's."""
    if not model_map.blocks:
        raise ModelError(f"The map of {name} has no layers (blocks). Expected one entry for each layer of the model.")
    known = dict(hf.named_modules(remove_duplicate=False))
    for path in model_map.paths:
        if path not in known:
            raise ModelError(f"The map of {name}: {unknown_choice('module', path, sorted(known))}")
    if len({id(known[block.module]) for block in model_map.blocks}) < model_map.n_layers:
        raise ModelError(f"The map of {name} names a module for two layers, and what is read and replaced in one would be so in both.")
    return model_map


def _parts(block: Block) -> dict[str, str | None]:
    """The path of each part of a block, None for what it has not."""
    found: dict[str, str | None] = {"block": block.module}
    for name, addend in (("attention", block.attention), ("mlp", block.mlp)):
        paths = (None, None, None) if addend is None else (addend.module, addend.norm, addend.post_norm)
        found |= dict(zip((name, f"{name}_norm", f"{name}_post_norm"), paths, strict=True))
    return found | {"out_proj": None if block.heads is None else block.heads.out_proj, "mlp_out_proj": block.neurons}


def _universe(model_map: ModelMap) -> NodeUniverse:
    every = set(range(model_map.n_layers))
    return Universe.of_nodes(
        model_map.n_layers,
        0 if model_map.heads is None else model_map.heads.n_heads,
        mixers=[layer for layer, block in enumerate(model_map.blocks) if block.is_mixer],
        without_attention=every - set(model_map.layers_with_attention),
        without_mlp=every - set(model_map.layers_with_mlps),
    )
