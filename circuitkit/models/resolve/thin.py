"""The map of a model whose weights are not at hand (``meta`` tensors): found in a thin model of the same class.

The thin model has the same layers, heads and switches, a narrow residual stream and few tokens. Paths and the order of columns do not
depend on these widths; where heads have to be narrower too, columns are scaled back.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Block, ModelMap, Projection

_WIDTHS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "shared_intermediate_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size",
)  # fmt: skip
_D_HEAD = 8


def thin(hf: Any) -> tuple[nn.Module, int, int]:
    """A model like another one with a narrow residual stream, in float32 on the processor; the width of its heads, and that of the other.

    Raises:
        ModelError: There is no such model.
    """
    config = copy.deepcopy(hf.config)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ModelError(f"{type(hf).__name__} does not say how many heads it has, so its parts are not known without its weights.")
    is_explicit = isinstance(getattr(text, "head_dim", None), int) or getattr(text, "kv_lora_rank", None) is not None
    wide = text.hidden_size // heads
    narrow = wide if is_explicit else min(wide, max(_D_HEAD, getattr(text, "rotary_dim", None) or 0))
    text.hidden_size = max(16, 2 * heads) if is_explicit else heads * narrow
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 24)
    text.vocab_size, text.pad_token_id = 64, None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = type(hf)._from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as problem:
        raise ModelError(
            f"The parts of {type(hf).__name__} are not known without its weights: a narrow model of its kind cannot be made "
            f"({type(problem).__name__}: {problem}). Load it with its weights once; its map is kept."
        ) from problem
    return made.eval().requires_grad_(False), narrow, wide


def widened(found: ModelMap, narrow: int, wide: int, hf: nn.Module) -> ModelMap:
    """The map of the real model from that of the thin one.

    Raises:
        ModelError: They are not made of the same modules.
    """
    modules = {path for path, _ in hf.named_modules()}
    missing = [block.module for block in found.blocks if block.module not in modules]
    if missing or found.unembed not in modules:
        name = (missing or [found.unembed])[0]
        raise ModelError(f"A narrow {type(hf).__name__} has {name}, and the model has not. Give its map by hand.")
    return found if narrow == wide else replace(found, blocks=tuple(_block(block, narrow, wide) for block in found.blocks))


def _block(block: Block, narrow: int, wide: int) -> Block:
    if block.heads is None:
        return block

    heads = block.heads

    def scaled(port: Projection | None) -> Projection | None:
        starts = () if port is None else tuple(start // narrow * wide for start in port.starts)
        return port and replace(port, starts=starts, width=port.width // narrow * wide)

    return replace(
        block,
        heads=replace(
            heads,
            d_head=heads.d_head // narrow * wide,
            d_value=heads.d_value // narrow * wide,
            queries=scaled(heads.queries),
            keys=scaled(heads.keys),
            values=scaled(heads.values),
        ),
    )
