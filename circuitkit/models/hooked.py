"""HookedModel: a transformers model whose components can be read, replaced and skipped while it runs.

Everything goes through nnsight; within ``bare.unwrapped`` the model runs without it. In one pass the sites of a layer must be touched in
the order in which the model computes them: ``resid``, attention (``projections_in``, ``skip_projections``, ``z``, ``skip_out_proj``,
``attention_out``; or ``skip_attention``), ``attention_added``,
MLP (``mlp_norm_in``, ``mlp_in``, ``mlp_act``, ``mlp_out``; or ``skip_mlp``), ``mlp_added``, ``out``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from circuitkit.core.errors import ModelError
from circuitkit.core.universe import Universe
from circuitkit.models import blocks
from circuitkit.models.architectures import Architecture, architecture_of
from circuitkit.models.bare import is_unwrapped, wrapped
from circuitkit.models.sharded import is_sharded, whole

Resid = Float[Tensor, "row pos d_model"]
Heads = Float[Tensor, "row pos head d_head"]
KeyValueHeads = Float[Tensor, "row pos kv_head d_head"]
Projections = tuple[Heads, KeyValueHeads, KeyValueHeads]
"""Queries, keys and values of a layer as the projections give them; keys and values have one slice a key/value head."""


class Layer:
    """One layer of a model in the middle of a pass. Final.

    Attributes:
        index: Which layer, from 0.
    """

    def __init__(self, index: int, block: Any, architecture: Architecture, n_heads: int) -> None:
        self.index = index
        self._block = block
        self._attention = _descend(block, architecture.attention)
        self._out_proj = _descend(block, architecture.out_proj)
        self._mlp_reader = _descend(block, architecture.mlp_norm or architecture.mlp)
        self._mlp = _descend(block, architecture.mlp)
        self._mlp_out_proj = _descend(block, architecture.mlp_out_proj)
        self._attention_post_norm = _descend(block, architecture.attention_post_norm) if architecture.attention_post_norm else None
        self._mlp_post_norm = _descend(block, architecture.mlp_post_norm) if architecture.mlp_post_norm else None
        behind = (architecture.query_norm, architecture.key_norm, "")
        paths = [[path, norm] for path, norm in zip(architecture.query_key_value, behind, strict=False)]
        self._projections = [[_descend(block, path) for path in pair if path] for pair in paths]
        self._architecture = architecture
        self._n_heads = n_heads

    @property
    def resid(self) -> Resid:
        """What enters the layer."""
        return self._block.input

    @resid.setter
    def resid(self, value: Resid) -> None:
        self._block.input = value

    @property
    def z(self) -> Heads:
        """Output of every head, before the output projection."""
        return self._out_proj.input.unflatten(-1, (self._n_heads, -1))

    @z.setter
    def z(self, value: Heads) -> None:
        self._out_proj.input = value.flatten(-2)

    @property
    def projections_in(self) -> Resid:
        """What the projections to queries, keys and values read."""
        return self._projections[0][0].input

    @property
    def attention_out(self) -> Resid:
        """What the attention gives: what it adds to the residual stream, or what the norm reads that lies behind it."""
        return self._attention.output[0]

    @attention_out.setter
    def attention_out(self, value: Resid) -> None:
        self._attention.output = (value, *self._attention.output[1:])

    @property
    def attention_added(self) -> Resid:
        """What the attention adds to the residual stream, behind a norm that lies there."""
        return self.attention_out if self._attention_post_norm is None else self._attention_post_norm.output

    @attention_added.setter
    def attention_added(self, value: Resid) -> None:
        if self._attention_post_norm is None:
            self.attention_out = value
        else:
            self._attention_post_norm.output = value

    @property
    def pattern(self) -> Float[Tensor, "row head query key"]:
        """What each head looks at. Only eager attention has it; ``models.attention.attention_patterns`` sees to that."""
        return self._attention.output[1]

    @property
    def mlp_norm_in(self) -> Resid:
        """What the norm before the MLP reads, or the MLP itself where there is none: the residual stream at this point."""
        return self._mlp_reader.input

    @mlp_norm_in.setter
    def mlp_norm_in(self, value: Resid) -> None:
        self._mlp_reader.input = value

    @property
    def mlp_in(self) -> Resid:
        """What the MLP reads, after its norm."""
        return self._mlp.input

    @mlp_in.setter
    def mlp_in(self, value: Resid) -> None:
        self._mlp.input = value

    @property
    def mlp_act(self) -> Float[Tensor, "row pos d_mlp"]:
        """The neurons' activations: what the MLP's output projection reads."""
        return self._mlp_out_proj.input

    @mlp_act.setter
    def mlp_act(self, value: Float[Tensor, "row pos d_mlp"]) -> None:
        self._mlp_out_proj.input = value

    @property
    def mlp_out(self) -> Resid:
        """What the MLP gives: what it adds to the residual stream, or what the norm reads that lies behind it."""
        return self._mlp.output

    @mlp_out.setter
    def mlp_out(self, value: Resid) -> None:
        self._mlp.output = value

    @property
    def mlp_added(self) -> Resid:
        """What the MLP adds to the residual stream, behind a norm that lies there."""
        return self.mlp_out if self._mlp_post_norm is None else self._mlp_post_norm.output

    @mlp_added.setter
    def mlp_added(self, value: Resid) -> None:
        if self._mlp_post_norm is None:
            self.mlp_out = value
        else:
            self._mlp_post_norm.output = value

    @property
    def out(self) -> Resid:
        """What leaves the layer: the residual stream behind it."""
        return self._block.output

    @out.setter
    def out(self, value: Resid) -> None:
        self._block.output = value

    def skip(self, resid: Resid) -> None:
        """Does not compute the layer; ``resid`` leaves it."""
        self._block.skip(resid)

    def skip_projections(self, projections: Projections) -> None:
        """Does not compute queries, keys and values; these are used instead, behind norms of all heads together where there are some."""
        fused = len(self._projections) == 1
        values = [_fuse(projections, self._architecture.fused_by_head)] if fused else projections
        for envoys, value in zip(self._projections, values, strict=True):
            for envoy in envoys:
                envoy.skip(value.flatten(2))

    def skip_out_proj(self, out: Resid) -> None:
        """Does not compute the output projection; ``out`` is what it would give."""
        self._out_proj.skip(out)

    def skip_attention(self, out: Resid) -> None:
        """Does not compute the attention; ``out`` is what it would give. ``attention_added`` can be seen then only behind a norm."""
        self._attention.skip((out, None))

    def skip_mlp(self, out: Resid) -> None:
        """Does not compute the MLP; ``out`` is what it would give."""
        self._mlp.skip(out)


Visit = Callable[[Layer], None]


class HookedModel:
    """A model, its tokenizer, and the means to intervene in it. Final.

    Attributes:
        name: For people and files.
        hf: The transformers model, its weights untouched. Its modules have nnsight's forwards, which hand on what they are given outside
            of a pass; within ``bare.unwrapped(hf)`` they have their own.
        tokenizer: Its tokenizer; None if it is not needed.
        architecture: Where things are.
        revision: Of the weights, where known.
        folder: Where the weights came from, where known.
        origin: What else made it, for provenance: code of its own, an adapter, a quantisation.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: Its shape.
        universe: Its heads and MLPs.
    """

    def __init__(
        self,
        name: str,
        hf: PreTrainedModel,
        tokenizer: Any = None,
        *,
        revision: str | None = None,
        folder: Path | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        config: Any = hf.config.get_text_config()
        self.name = name
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.revision = revision
        self.folder = folder
        self.origin = dict(origin or {})
        self.architecture = architecture_of(config)
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_mlp: int = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.d_model
        self.d_vocab: int = config.vocab_size
        self.is_parallel = bool(self.architecture.parallel and getattr(config, self.architecture.parallel, False))
        self.universe = Universe.of_nodes(self.n_layers, self.n_heads)
        self._envoy = wrapped(hf)
        envoys = _descend(self._envoy, self.architecture.blocks)
        unembed = hf.get_output_embeddings()
        self._unembed = _descend(self._envoy, next(path for path, module in hf.named_modules() if module is unembed))
        self._layers = tuple(Layer(index, envoys[index], self.architecture, self.n_heads) for index in range(self.n_layers))

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        return self.hf.get_input_embeddings().weight.device if not self._is_offloaded else torch.device(self._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.hf.dtype

    @property
    def attention(self) -> str:
        """Which implementation of attention is used, such as ``sdpa``."""
        return self.hf.config._attn_implementation or "eager"

    @cached_property
    def _execution_device(self) -> Any:
        hook = getattr(self.hf.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return "cpu" if device is None else device

    @cached_property
    def _is_offloaded(self) -> bool:
        embedding = self.hf.get_input_embeddings()
        return embedding.weight.device.type == "meta" and hasattr(embedding, "_hf_hook")

    @cached_property
    def is_shared(self) -> bool:
        """Whether the processes of a launch hold the model together (``sharded.py``), so that all must make the same passes."""
        return is_sharded(self.hf)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer computes, for a model that Accelerate has placed on several devices."""
        block = self.hf.get_submodule(f"{self.architecture.blocks}.{layer}")
        hook = getattr(block, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
        device = next(block.parameters()).device
        return self.device if device.type == "meta" else device

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
        inputs = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        if visit is None and start == 0 and stop is None and not gather and tokens is None:
            with torch.no_grad():
                return self.hf(ids.to(self.device), logits_to_keep=keep, **{"use_cache": False, **inputs}).logits
        if self.device.type == "meta":
            # Without a cache transformers looks into the position ids for packed sequences, and here they have no content.
            inputs.setdefault("past_key_values", DynamicCache(config=self.hf.config))
            inputs.pop("attention_mask", None)  # likewise
        if is_unwrapped(self.hf):
            raise ModelError(
                f"{self.name} was to be traced while its own forwards are in place of nnsight's: the naive path is running, in this thread "
                "or another. Expected one after the other; give each thread a model of its own."
            )
        end = self.n_layers if stop is None else stop + 1
        logits = None
        with torch.no_grad(), self._envoy.trace(ids.to(self.device), logits_to_keep=keep, **{"use_cache": False, **inputs}) as tracer:
            _walk(self._layers, visit, start, end, resid)
            if stop is None:
                if tokens is not None:
                    self._unembed.skip(self._unembedded(self._unembed.input, tokens))
                elif gather:
                    self._unembed.input = self._unembed.input.contiguous()
                logits = nnsight.save(self._envoy.output.logits)
            else:
                tracer.stop()
        return logits

    def project(self, layer: int, z: Float[Tensor, "*row head d_head"]) -> Float[Tensor, "*row d_model"]:
        """The output projection, outside of a pass: what heads' outputs give together, bias included."""
        path = f"{self.architecture.blocks}.{layer}.{self.architecture.out_proj}"
        with torch.no_grad():
            return self.hf.get_submodule(path)(z.flatten(-2).contiguous())

    def queries_keys_values(self, layer: int, resid: Resid) -> Projections:
        """What the heads of a layer make of a residual stream that enters it, norms included: outside of a pass."""
        with torch.no_grad():
            read = blocks.read(self, layer, "attention", resid)
            outs = [projection(read) for projection in blocks.projections(self, layer)]
            outs = [out if norm is None else norm(out) for norm, out in zip(blocks.joint_norms(self, layer), outs, strict=True)]
        if len(outs) == 1 and self.architecture.fused_by_head:
            return tuple(outs[0].unflatten(-1, (self.n_heads, 3, -1)).unbind(-2))
        queries, keys, values = outs[0].chunk(3, -1) if len(outs) == 1 else outs
        return queries.unflatten(-1, (self.n_heads, -1)), *(part.unflatten(-1, (self.n_kv_heads, -1)) for part in (keys, values))

    def mlp_from(self, layer: int, resid: Resid) -> Resid:
        """What the MLP of a layer makes of the residual stream, the norm before it included: outside of a pass."""
        with torch.no_grad():
            return self.module(layer, "mlp")(blocks.read(self, layer, "mlp", resid))

    def embed(self, ids: Int[Tensor, "row pos"], **inputs: Any) -> Resid:
        """What enters the first layer. Further arguments as for ``run``."""
        entered: list[Resid] = []
        self.run(ids, lambda layer: entered.append(layer.resid), stop=0, **inputs)
        return entered[0]

    @property
    def unembeds_some(self) -> bool:
        """Whether single tokens can be unembedded: the unembedding is a plain matrix that lies where it computes."""
        module = self.hf.get_output_embeddings()
        return type(module) is nn.Linear and not hasattr(module, "_hf_hook")

    def _unembedded(self, read: Float[Tensor, "row kept d_model"], tokens: Int[Tensor, " some"]) -> Float[Tensor, "row kept some"]:
        module = self.hf.get_output_embeddings()
        chosen = tokens.to(module.weight.device)
        bias = None if module.bias is None else module.bias.index_select(0, chosen)
        return nn.functional.linear(read.contiguous(), module.weight.index_select(0, chosen), bias)

    def unembed(self, resid: Float[Tensor, "row kept d_model"]) -> Float[Tensor, "row kept d_vocab"]:
        """Logits of a residual stream behind the last layer, in the model's dtype: the final norm once, then the unembedding."""
        ids = torch.zeros(resid.shape[:2], dtype=torch.long, device=self.device)
        logits = self.run(ids, start=self.n_layers, resid=resid.contiguous(), keep=0, attention_mask=torch.ones_like(ids))
        assert logits is not None
        return logits

    def module(self, layer: int, part: str) -> nn.Module:
        """The plain torch module of one part of a layer, named as in ``Architecture``: ``attention``, ``out_proj``, ``mlp``, ..."""
        return self.hf.get_submodule(f"{self.architecture.blocks}.{layer}.{getattr(self.architecture, part)}")

    def optional(self, layer: int, part: str) -> nn.Module | None:
        """The same for a part that not every family has, such as ``attention_post_norm``: None where there is none."""
        return self.module(layer, part) if getattr(self.architecture, part) else None

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        tensors = sorted(self.hf.state_dict().items())
        for name, stored in tensors:
            tensor = whole(stored)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.device.type != "meta":
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if any(tensor.device.type == "meta" for _, tensor in tensors):
            for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
                with file.open("rb") as opened:
                    while chunk := opened.read(1 << 24):
                        digest.update(chunk)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of all weights, computed once; of the files they came from too, where Accelerate has left some on disk."""
        return self._fingerprint

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers x {self.n_heads} heads, d_model {self.d_model}"
        return f"HookedModel({self.name!r}, {self.architecture.family}, {shape}, {self.dtype})"


def _walk(layers: tuple[Layer, ...], visit: Visit | None, start: int, end: int, resid: Resid | None) -> None:
    """Runs inside a trace: passes the layers in order. An ordinary function sees real tensors there."""
    for layer in layers[:start]:
        assert resid is not None
        layer.skip(resid)
    if visit is not None:
        for layer in layers[start:end]:
            visit(layer)


def _fuse(projections: Projections, by_head: bool) -> Float[Tensor, "row pos some width"]:
    return torch.stack(projections, -2).flatten(-2) if by_head else torch.cat([part.flatten(2) for part in projections], -1).unsqueeze(2)


def _descend(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root
