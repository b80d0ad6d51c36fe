"""Where some families of transformers keep what we read and write, written down by hand: what the resolver has to find by value.

The output of a head before the output projection (z) is the input of ``out_proj``, its last axis split by head. The same holds for
grouped key/value heads, because z has one slice a query head. Embedding and unembedding are asked of the model itself, which names them
differently in different versions of transformers. Paths below ``blocks`` are relative to one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend, Block, Heads, ModelMap, Projection


@dataclass(frozen=True)
class Architecture:
    """Module paths of one family.

    Attributes:
        family: As in the model's ``config.model_type``.
        blocks: The list of layers.
        attention: The attention module in a block; returns a pair whose first part goes to the residual stream, or to the norm before it.
        out_proj: The output projection in a block; its input is z.
        mlp: The MLP in a block; returns what goes to the residual stream, likewise.
        mlp_out_proj: The output projection of the MLP in a block; its input is the neurons' activations.
        attention_norm: The norm before attention, in a block; empty where attention reads the residual stream as it is.
        mlp_norm: The norm before the MLP, likewise.
        attention_post_norm: The norm between what the attention returns and the residual stream; empty where it is added as it is.
        mlp_post_norm: The norm behind the MLP, likewise.
        query_key_value: The projections of the attention input, relative to the block; one path if they are fused.
        query_norm: The norm of the queries of all heads together, behind their projection; empty where each head's are normed alone, as in
            Qwen 3, or not at all.
        key_norm: The norm of the keys, likewise.
        fused_by_head: Where they are fused, whether each head's queries, keys and values lie side by side; else all queries come first.
        final_norm: The norm before the unembedding.
        parallel: Name of the config flag that says that MLP and attention both read the block's input; empty where it never is so.
    """

    family: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    out_proj: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_out_proj: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = ""
    key_norm: str = ""
    fused_by_head: bool = False
    final_norm: str = "model.norm"
    parallel: str = ""


_post_normed = partial(Architecture, attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    architecture.family: architecture
    for architecture in (
        Architecture(
            "gpt2",
            blocks="transformer.h",
            attention="attn",
            out_proj="attn.c_proj",
            mlp_out_proj="mlp.c_proj",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            query_key_value=("attn.c_attn",),
            final_norm="transformer.ln_f",
        ),
        Architecture(
            "gpt_neox",
            blocks="gpt_neox.layers",
            attention="attention",
            out_proj="attention.dense",
            mlp_out_proj="mlp.dense_4h_to_h",
            query_key_value=("attention.query_key_value",),
            fused_by_head=True,
            final_norm="gpt_neox.final_layer_norm",
            parallel="use_parallel_residual",
        ),
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        *(_post_normed(family, mlp_norm="pre_feedforward_layernorm") for family in ("gemma2", "gemma3_text")),
        *(
            _post_normed(family, attention_norm="", mlp_norm="", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
            for family in ("olmo2", "olmo3")
        ),
        _post_normed("exaone4", attention_norm="", mlp_norm=""),
        Architecture("glm4", attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"),
    )
}


def architecture_of(config: Any) -> Architecture:
    """The table entry for a transformers config.

    Raises:
        ModelError: The family is not in the table.
    """
    family = getattr(config, "model_type", None)
    if family not in ARCHITECTURES:
        raise ModelError(
            f"Models of type {family!r} are not in the architecture table. Known: {', '.join(sorted(ARCHITECTURES))}. To add one, add its "
            "module paths to circuitkit.models.architectures.ARCHITECTURES and run `circuitkit job=doctor` on it."
        )
    return ARCHITECTURES[family]


def map_of(hf: PreTrainedModel) -> ModelMap:
    """The map of a model of a known family.

    Raises:
        ModelError: The family is not in the table.
    """
    config: Any = hf.config.get_text_config()
    table = architecture_of(config)
    parallel = bool(table.parallel and getattr(config, table.parallel, False))
    return ModelMap(
        family=table.family,
        blocks=tuple(_block(table, config, f"{table.blocks}.{layer}", parallel) for layer in range(config.num_hidden_layers)),
        embed=_path(hf, hf.get_input_embeddings()),
        final_norm=table.final_norm,
        unembed=_path(hf, hf.get_output_embeddings()),
    )


def _block(table: Architecture, config: Any, path: str, parallel: bool) -> Block:
    n_heads: int = config.num_attention_heads
    n_kv_heads: int = getattr(config, "num_key_value_heads", None) or n_heads
    d_head: int = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    modules = [f"{path}.{part}" for part in table.query_key_value]
    if table.fused_by_head:
        firsts = [range(port * d_head, 3 * n_heads * d_head, 3 * d_head) for port in range(3)]
    elif len(modules) == 1:
        firsts = [range(port * n_heads * d_head, (port + 1) * n_heads * d_head, d_head) for port in range(3)]
    else:
        firsts = [range(0, n * d_head, d_head) for n in (n_heads, n_kv_heads, n_kv_heads)]
    modules = modules * 3 if len(modules) == 1 else modules

    def at(part: str) -> str | None:
        return f"{path}.{part}" if part else None

    norms = (at(table.query_norm), at(table.key_norm), None)
    each = zip(modules, firsts, norms, strict=True)
    queries, keys, values = (Projection(module, tuple(starts), d_head, norm) for module, starts, norm in each)
    return Block(
        module=path,
        attention=Addend(f"{path}.{table.attention}", 0, 2, norm=at(table.attention_norm), post_norm=at(table.attention_post_norm)),
        heads=Heads(f"{path}.{table.out_proj}", n_heads, n_kv_heads, d_head, d_head, queries, keys, values),
        mlp=Addend(f"{path}.{table.mlp}", norm=at(table.mlp_norm), post_norm=at(table.mlp_post_norm)),
        neurons=f"{path}.{table.mlp_out_proj}",
        parallel=parallel,
    )


def _path(hf: nn.Module, module: nn.Module) -> str:
    return next(path for path, each in hf.named_modules() if each is module)
