"""Tiny random models of any type that transformers has, made from its configuration's class alone: what circuitkit is tried on.

No weights, no hub and no tokenizer are needed. A model keeps from its type's default configuration the first layer of each kind, and has
the sizes of ``sizes.py``; its weights are drawn by ``weights.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from circuitkit.core.errors import ModelError
from circuitkit.models.tiny.sizes import ADDITIONS, D_VOCAB, LAYERS, N_HEADS, NOT_ALONE, SIZES, WINDOWS
from circuitkit.models.tiny.weights import draw

N_LAYERS = 2
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Tokens that must be in the vocabulary: 0, 1 and 2 if they are not."""
MOST_KINDS = 4
"""A list a layer with more different values than this does not name kinds of layers."""


def causal_types() -> tuple[str, ...]:
    """Every type of the installed transformers that has a causal language model, in alphabetical order."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(model_type: str, *, window: int = 5, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny causal language model.

    Args:
        model_type: As transformers names it, such as ``llama``.
        window: How far sliding attention reaches, in tokens, where the type has it.
        changes: Fields of the configuration that are to have other values.

    Raises:
        ModelError: transformers has no such type, it needs a package that is not installed, or it is a part of another model.
    """
    return _config_of(_class_of(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal"), model_type, window, {"is_decoder": True}, changes)


def tiny_model(
    model_type: str, seed: int = 0, *, attention: str | None = None, window: int = 5, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A tiny causal language model with random weights, in float32 on the CPU, ready for use.

    Args:
        model_type: As transformers names it, such as ``llama``.
        seed: Of the weights.
        attention: Which implementation of attention; None leaves it to transformers.
        window: How far sliding attention reaches, in tokens, where the type has it.
        config: A configuration instead of ``tiny_config``'s.

    Raises:
        ModelError: As ``tiny_config`` does.
    """
    made = _class_of(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal")
    return _model(made, model_type, config or tiny_config(model_type, window=window), seed, attention)


def tiny_masked_model(model_type: str, seed: int = 0, *, attention: str | None = None, window: int = 5) -> PreTrainedModel:
    """The same of a masked language model, such as ``bert`` or ``modernbert``."""
    made = _class_of(model_type, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked")
    return _model(made, model_type, _config_of(made, model_type, window, {}, {}), seed, attention)


def _class_of(model_type: str, registry: Mapping[str, Any], kind: str) -> Any:
    if model_type not in registry:
        raise ModelError(
            f"transformers {transformers.__version__} has no {kind} language model of type {model_type!r}. Expected one of: "
            f"{', '.join(sorted(registry))}."
        )
    return getattr(transformers, registry[model_type])


def _config_of(made: Any, model_type: str, window: int, flags: Mapping[str, Any], changes: Mapping[str, Any]) -> PreTrainedConfig:
    if model_type in NOT_ALONE:
        raise ModelError(f"No tiny model of type {model_type} can be made: {NOT_ALONE[model_type]}.")
    with _packages(model_type):
        return _config(made.config_class, window, flags, changes)


def _model(made: Any, model_type: str, config: PreTrainedConfig, seed: int, attention: str | None) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), _packages(model_type):
        torch.manual_seed(seed)
        model: PreTrainedModel = made._from_config(config, dtype=torch.float32, attn_implementation=attention)
    draw(model, seed)
    return model.eval()


@contextmanager
def _packages(model_type: str) -> Iterator[None]:
    """Says in a sentence which package a type needs that is not installed."""
    try:
        yield
    except ImportError as error:
        missing = str(error).strip().split(". ", 1)[0]
        raise ModelError(f"No tiny model of type {model_type} can be made: {missing}. Install what is missing, or leave it out.") from error


def _config(kind: type[PreTrainedConfig], window: int, flags: Mapping[str, Any], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of a class with everything small, nested configurations too."""
    whole = kind()
    stored = whole.to_dict()
    default = {field.name: stored.get(kind.attribute_map.get(field.name, field.name)) for field in fields(kind)}
    nested = {name: type(getattr(whole, name)) for name in kind.sub_configs if default.get(name) is not None}
    sizes = {**SIZES, **dict.fromkeys(WINDOWS, window)}
    if default.get("kv_lora_rank") is not None:  # latent attention: every head has keys and values of its own; widths come in parts
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"} | {"num_key_value_heads": N_HEADS}
    values: dict[str, Any] = {name: sizes[name] for name, value in default.items() if name in sizes and isinstance(value, (int, float))}
    values |= _kept_layers(default, stored.get("per_layer_config") or {}, sizes)
    values |= {name: place for place, name in enumerate(SPECIAL) if _beyond(default.get(name))}
    values |= {name: value for name, value in flags.items() if name in default}
    values |= {name: _config(each, window, {}, {}) for name, each in nested.items()}
    return kind(**{**values, **ADDITIONS.get(kind.model_type, {}), **changes})


def _kept_layers(default: Mapping[str, Any], special: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What says how many layers there are, and of which kind each is: the first of each kind of the default model, at least two."""
    counts = [name for name in LAYERS if default.get(name)]
    total = max((default[name] for name in counts), default=0)
    lists = {name: value for name, value in default.items() if isinstance(value, (list, tuple)) and len(value) == total > 0}
    lists = {name: value for name, value in lists.items() if len(set(map(str, value))) <= MOST_KINDS}
    kept = {[str(each) for each in value].index(kind) for value in lists.values() for kind in {str(each) for each in value}}
    for index in range(total):
        if len(kept) < N_LAYERS:
            kept.add(index)
    order = sorted(kept)
    values: dict[str, Any] = dict.fromkeys(counts, len(order))
    values |= {name: [sizes.get(name, value[index]) for index in order] for name, value in lists.items()}
    others = {int(index): changes for index, changes in special.items() if int(index) in order}
    if others:
        scaled = {i: {name: _scaled(name, value, default, sizes) for name, value in each.items()} for i, each in others.items()}
        values["per_layer_config"] = {order.index(index): each for index, each in scaled.items()}
    return values


def _scaled(name: str, value: Any, default: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """What one layer has instead of the common size, in the same proportion to it."""
    return int(sizes[name] * value / default[name]) if name in sizes and default.get(name) else value


def _beyond(token: int | list[int] | None) -> bool:
    """Whether a special token is outside of the small vocabulary."""
    return max(token if isinstance(token, list) else [-1 if token is None else token]) >= D_VOCAB
