"""The files of a model folder, looked at before transformers opens them: it waits for ever on a named pipe, and a list in place of
settings ends in an error of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path, PurePath
from typing import Any

from circuitkit.core import plain
from circuitkit.core.errors import ModelError
from circuitkit.storage.reading import open_file, read_text

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_MAPPINGS = (
    CONFIG, _INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
)  # fmt: skip
_OTHERS = (".json", ".txt", ".model", ".jinja")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MOST_LAYERS = 1000  # transformers makes an object for each, before it sees that there are no weights for them


def settings_of(folder: Path, source: str) -> dict[str, Any]:
    """The content of ``config.json``, once every file beside it is one that can be opened.

    Args:
        folder: Of the model.
        source: What to call the model in an error.

    Raises:
        ModelError: There is no ``config.json``, or a file is not what a model folder holds.
    """
    if not os.path.lexists(folder / CONFIG):
        raise ModelError(
            f"{source} holds no config.json, so it is not a transformers model. Expected a folder that save_pretrained wrote, "
            "with config.json, model.safetensors and a tokenizer."
        )
    found = {name: _mapping(folder / name) for name in _MAPPINGS if os.path.lexists(folder / name)}
    for path in folder.iterdir():
        if path.name not in _MAPPINGS and not path.is_dir() and path.suffix in (*_OTHERS, ".safetensors"):
            open_file(path, "model", ModelError, times=math.inf if path.suffix == ".safetensors" else 1).close()
    _check_index(found.get(_INDEX, {}).get("weight_map", {}), folder / _INDEX)
    layers = [found[CONFIG].get(key, 0) for key in _LAYERS]
    if any(type(count) is not int or count > _MOST_LAYERS for count in layers):
        raise ModelError(
            f"config.json of {source} says {str(max(layers, key=_size))[:50]!r} layers, expected a whole number of at most {_MOST_LAYERS}. "
            "Correct it, or download the model again."
        )
    if not isinstance(found[CONFIG].get("model_type", ""), str):
        raise ModelError(f"The model_type in config.json of {source} is no text. Correct it, or download the model again.")
    return found[CONFIG]


def _mapping(path: Path) -> dict[str, Any]:
    try:  # numbers and texts as they are: integers beyond 64 bits are usual in settings of tokenizers, and infinity in those of models
        found = json.loads(read_text(path, "model", ModelError))
        plain.check(found, texts=False)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download or save the model again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, expected a mapping of settings. Download or save the model again.")
    return found


def _check_index(weights: Any, path: Path) -> None:
    """Refuses an index of weights that names files outside of the folder."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) and PurePath(name).name == name for name in weights.values()):
        raise ModelError(f"{path} must say for each weight in which file beside it it is. Download or save the model again.")


def _size(count: Any) -> float:
    return count if type(count) is int else math.inf
