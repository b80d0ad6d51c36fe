"""The map of a model whose weights are not at hand (``meta`` tensors): found in a thin model of the same class.

The thin model has the same layers, heads and switches, a narrow residual stream and few tokens. Paths and the order of columns do not
depend on these widths; where heads have to be narrower too, columns are scaled back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Block, ModelMap, Projection
from circuitkit.models.resolve.probe import logits_of

_WIDTHS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "shared_intermediate_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size",
)  # fmt: skip
_D_HEAD = 8
_WIDEST = 1024
"""A model whose widths have to fit each other keeps them, if its stream is no wider than this."""


@dataclass(frozen=True, eq=False)
class Thin:
    """A model like another one with a narrow residual stream, in float32 on the processor. Final.

    Attributes:
        hf: The model.
        narrow, wide: The width of its heads, and that of the other's.
    """

    hf: nn.Module
    narrow: int
    wide: int


def thin(hf: Any) -> Thin:
    """Makes it.

    Raises:
        ModelError: There is no such model.
    """
    problem: Exception | None = None
    for is_narrow in (True, False):
        try:
            with torch.device("cpu"):  # also where models are made without weights
                made = _made(hf, is_narrow)
                logits_of(made.hf, torch.zeros(1, 2, dtype=torch.long))
            return made
        except Exception as found:  # whatever a configuration says to sizes that do not fit each other
            problem = problem or found
    raise ModelError(
        f"The parts of {type(hf).__name__} are not known without its weights: a narrow model of its kind cannot be made "
        f"({type(problem).__name__}: {problem}). Load it with its weights."
    ) from problem


def _made(hf: Any, is_narrow: bool) -> Thin:
    config = copy.deepcopy(hf.config)
    text = config.get_text_config()
    stored = text.to_dict()
    heads, wide = getattr(text, "num_attention_heads", None), 1
    narrow = wide
    if is_narrow:
        if not isinstance(heads, int):
            raise ModelError("it does not say how many heads it has")
        is_explicit = isinstance(stored.get("head_dim"), int) or stored.get("kv_lora_rank") is not None
        wide = text.hidden_size // heads
        narrow = wide if is_explicit else min(wide, max(_D_HEAD, stored.get("rotary_dim") or 0))
        text.hidden_size = max(16, 2 * heads) if is_explicit else heads * narrow
    elif text.hidden_size > _WIDEST:
        raise ModelError(f"a stream of {text.hidden_size} is too wide")
    for name in _WIDTHS:
        if isinstance(stored.get(name), int):
            setattr(text, name, 24)
    text.vocab_size, text.pad_token_id = 64, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(hf)._from_config(config, dtype=torch.float32, attn_implementation="eager")
    return Thin(made.eval().requires_grad_(False), narrow, wide)


def widened(found: ModelMap, made: Thin, hf: nn.Module) -> ModelMap:
    """The map of the real model from that of the thin one.

    Raises:
        ModelError: They are not made of the same modules, or the heads are not as wide as the projections of the model have them.
    """
    blocks = tuple(_block(block, made.narrow, made.wide) for block in found.blocks)
    modules = dict(hf.named_modules())
    missing = [path for path in found.paths if path not in modules]
    if missing:
        raise ModelError(f"A narrow {type(hf).__name__} has {missing[0]}, and the model has not. Give its map by hand.")
    for heads in (block.heads for block in blocks if block.heads is not None):
        ends = [(heads.out_proj, heads.n_heads * heads.d_value)]
        ends += [(port.module, port.starts[-1] + port.width) for port in (heads.queries, heads.keys, heads.values) if port is not None]
        for place, (path, end) in enumerate(ends):
            sizes = {size for weight in modules[path].parameters() for size in weight.shape}
            if sizes and (end not in sizes if place == 0 else end > max(sizes)):
                raise ModelError(
                    f"The heads of a narrow {type(hf).__name__} are not those of the model: {path} should have {end} columns, found "
                    f"{sorted(sizes)}. Load it with its weights."
                )
    return replace(found, blocks=blocks)


def _block(block: Block, narrow: int, wide: int) -> Block:
    if block.heads is None or narrow == wide:
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
