"""Maps that were found and proved before, kept in the user's cache folder: the second start runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from circuitkit.core.errors import UserError
from circuitkit.models.model_map import Addend, Block, Evidence, Heads, ModelMap, Projection
from circuitkit.storage.reading import read_json

FOLDER = "CIRCUITKIT_CACHE"
"""The environment variable that names the cache folder; ``off`` turns it off."""


def folder() -> Path | None:
    """Where maps are kept; None if they are not."""
    given = os.environ.get(FOLDER, "")
    if given == "off":
        return None
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "circuitkit"
    return base / "maps"


def key(hf: nn.Module) -> str | None:
    """What a map depends on: the class, its configuration, its modules with the shapes of their weights, and all code that runs.

    Returns:
        A hash; None for a class that is not of transformers, whose code may change between two starts.
    """
    config: Any = getattr(hf, "config", None)
    if not type(hf).__module__.startswith("transformers.") or not hasattr(config, "to_dict"):
        return None
    if any(not type(module).__module__.startswith(("transformers.", "torch.")) for module in hf.modules()):
        return None
    settings = {name: value for name, value in config.to_dict().items() if name not in _NOT_STRUCTURE}
    parts = [f"{type(hf).__module__}.{type(hf).__qualname__}", transformers.__version__, torch.__version__, _code()]
    parts.append(json.dumps(settings, sort_keys=True, default=str))
    parts += [f"{path} {type(module).__qualname__}" for path, module in hf.named_modules()]
    parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in hf.named_parameters()]
    parts.append("meta" if any(tensor.device.type == "meta" for tensor in hf.parameters()) else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_NOT_STRUCTURE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


@cache
def _code() -> str:
    """A hash of the code that finds maps."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update((Path(__file__).parents[1] / "model_map.py").read_bytes())
    return digest.hexdigest()


def kept(name: str, hf: nn.Module) -> ModelMap | None:
    """The map of this key, if there is one that can be read and whose paths the model has."""
    where = folder()
    if where is None or not (where / f"{name}.json").exists():
        return None
    try:
        value = read_json(where / f"{name}.json", "map")
        content = value["map"]
        if value["sha256"] != _digest(content):
            return None
        found = _map(content)
        return found if _fits(found, hf) else None
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None  # broken, or of another time: it is found anew


def keep(name: str, found: ModelMap) -> None:
    """Keeps a map, if the folder can be written to."""
    where = folder()
    if where is None:
        return
    content = json.loads(json.dumps({**asdict(found), "forward": sorted(found.forward)}))
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump({"sha256": _digest(content), "map": content}, file)
        os.replace(file.name, where / f"{name}.json")
    except OSError:
        return  # a home that cannot be written to: it is found anew the next time


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(value: Mapping[str, Any]) -> ModelMap:
    return ModelMap(
        **{
            **value,
            "blocks": tuple(_block(block) for block in value["blocks"]),
            "forward": frozenset(value["forward"]),
            "evidence": tuple(Evidence(**check) for check in value["evidence"]),
        }
    )


def _block(value: Mapping[str, Any]) -> Block:
    addends = {name: None if value[name] is None else Addend(**value[name]) for name in ("attention", "mlp")}
    return Block(**{**value, **addends, "heads": None if value["heads"] is None else _heads(value["heads"])})


def _heads(value: Mapping[str, Any]) -> Heads:
    ports = {name: None if value[name] is None else Projection(**{**value[name], "starts": tuple(value[name]["starts"])})
             for name in ("queries", "keys", "values")}  # fmt: skip
    return Heads(**{**value, **ports})


def _fits(found: ModelMap, hf: nn.Module) -> bool:
    """Whether every path is a module of the model."""
    return bool(found.blocks) and set(found.paths) <= {path for path, _ in hf.named_modules()}
