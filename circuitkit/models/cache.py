"""Keys and values of attention, kept from one pass and given to another that only computes later positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from circuitkit.models.hooked import HookedModel

KeysValues = tuple[Float[Tensor, "prompt kv_head pos d_head"], Float[Tensor, "prompt kv_head pos d_head"]]


def new_cache(model: HookedModel) -> DynamicCache:
    """An empty cache, to be passed as ``past_key_values``."""
    config: Any = model.hf.config
    return DynamicCache(config=config)


def keys_values(cache: DynamicCache) -> dict[int, KeysValues]:
    """What a pass left in a cache, by layer; layers whose attention was not computed are missing."""
    held = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and keys.numel():
            held[index] = (keys, values)
    return held


def prefix_cache(model: HookedModel, held: Mapping[int, KeysValues], rows: slice, copies: int, n_pos: int) -> DynamicCache:
    """A cache filled with the first positions of some prompts, each prompt as often as there are masks.

    Args:
        model: The model.
        held: Keys and values of every layer, for all prompts.
        rows: Which prompts.
        copies: How many masks; rows are masks x prompts.
        n_pos: How many positions.
    """
    cache = new_cache(model)
    for layer in range(model.n_layers):
        keys, values = (part[rows, :, :n_pos].repeat(copies, 1, 1, 1) for part in held[layer])
        cache.update(keys, values, layer)
    return cache


def sliding_window(model: HookedModel) -> int | None:
    """The smallest attention window of any layer; None where all positions are seen."""
    config = model.hf.config if isinstance(model.hf, PreTrainedModel) else None
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else None
