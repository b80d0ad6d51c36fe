"""Adapters on top of a model: LoRA weights as PEFT saves them, merged into a copy in memory, so that every part stays a plain matrix."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from circuitkit.core.errors import ModelError
from circuitkit.models.hub import brief, is_hub_id, snapshot
from circuitkit.storage.reading import open_file, read_text

_log = logging.getLogger(__name__)

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# By how much of their spread logits may move when weights are merged: the sum is rounded once to the dtype of the weights.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


def adapted(
    hf: PreTrainedModel, adapter: str | Path, base: str, *, local_files_only: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with an adapter merged into its weights, and where that came from.

    The merged weights are proved: on a short text the logits must be those of PEFT's own model, which computes the adapter beside them.

    Args:
        hf: The model; its weights are changed in memory.
        adapter: A folder that PEFT's ``save_pretrained`` wrote, or a hub id.
        base: What the model is called, its hub id where it has one.
        local_files_only: Do not ask the hub.

    Returns:
        The model, and the name, commit and SHA-256 of the files of the adapter.

    Raises:
        ModelError: The adapter cannot be found, is of another kind, is not one of this model, or cannot be merged exactly.
    """
    folder, commit = _folder(adapter, local_files_only)
    settings = _settings(folder, str(adapter), base)
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Adapters need PEFT, which is not installed. Install it with: pip install 'circuitkit-nnsight[adapters]'.")
    if any(weight.is_meta or not weight.is_floating_point() for weight in hf.parameters()):
        raise ModelError("An adapter is merged into the weights, and some of them are offloaded or quantised. Load the model whole.")
    digests = {name: _digest(folder / name) for name in (SETTINGS, WEIGHTS)}
    merged = _merged(hf, folder, str(adapter), base)
    rank = settings.get("r")
    _log.info("The adapter %s (LoRA of rank %s) is merged into the weights of %s in memory; no file changes.", adapter, rank, base)
    return merged, {"adapter": {"name": folder.name if commit is None else str(adapter), "revision": commit, "files": digests}}


def _folder(adapter: str | Path, local_files_only: bool) -> tuple[Path, str | None]:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder, None
    if not is_hub_id(str(adapter)):
        raise ModelError(f"There is no folder {adapter}, and it is not a hub id, which looks like 'lab/adapter'. Check model.adapter.")
    return snapshot(str(adapter), None, local_files_only, (SETTINGS, WEIGHTS))


def _settings(folder: Path, adapter: str, base: str) -> dict[str, Any]:
    """What adapter_config.json says, after all checks that need no weights."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).exists():
            raise ModelError(
                f"The adapter {adapter} holds no {name}. Expected what PEFT's save_pretrained writes, weights as safetensors: other "
                "formats can run code when they are opened, so they are not read."
            )
    open_file(folder / WEIGHTS, "adapter", ModelError, times=float("inf")).close()
    try:
        settings = json.loads(read_text(folder / SETTINGS, "adapter", ModelError))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{SETTINGS} of {adapter} is not valid JSON ({error}). Save or download it again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ModelError(f"The adapter {adapter} is of type {kind!r}. Expected LORA, which becomes part of the weights.")
    if settings.get("megatron_config"):  # PEFT would import whatever module the file names
        raise ModelError(f"The adapter {adapter} is for Megatron (megatron_config), which is not supported. Expected one of transformers.")
    made_for = str(settings.get("base_model_name_or_path") or "")
    if is_hub_id(made_for) and is_hub_id(base) and made_for.lower() != base.lower():
        raise ModelError(
            f"The adapter {adapter} was made for {made_for}, and the model is {base}. Take model=local model.path={made_for}; if both have "
            "the same weights, or you want just this, give the model as a folder: model=local model.path=<folder>."
        )
    return settings


def _merged(hf: PreTrainedModel, folder: Path, adapter: str, base: str) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    own = {f"base_model.model.{name}" for name in hf.state_dict()}
    ids = torch.arange(8, device=next(hf.parameters()).device)[None] % hf.config.get_text_config().vocab_size
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            given = set(file.keys())
        with warnings.catch_warnings():  # it warns of what is refused below
            warnings.simplefilter("ignore", UserWarning)
            beside = PeftModel.from_pretrained(hf, str(folder), config=LoraConfig.from_pretrained(str(folder)))
        wanted = set(get_peft_model_state_dict(beside, save_embedding_layers=False))
    except SafetensorError as error:
        raise ModelError(f"The weights of the adapter {adapter} are damaged ({brief(error)}). Save or download it again.") from error
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"The adapter {adapter} does not fit {base}: {_reason(error)} Expected an adapter of this very model.") from error
    # PEFT only warns of what is missing, and says nothing of what has no place.
    unfit = sorted((wanted - given) | (given - wanted - own))
    if unfit:
        raise ModelError(
            f"The adapter {adapter} does not fit {base}: {len(unfit)} of its weights are missing or have no place there, such as "
            f"{unfit[0]}. Expected an adapter of this very model."
        )
    with torch.no_grad():
        before = beside.eval()(ids, use_cache=False).logits.double()
        try:
            merged: PreTrainedModel = beside.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise ModelError(f"The adapter {adapter} cannot be merged into the weights: {brief(error)}") from error
        moved = (merged.eval()(ids, use_cache=False).logits.double() - before).abs().max() / before.std()
    if not moved <= _ROUNDING.get(hf.dtype, 0.1):
        raise ModelError(
            f"Merging the adapter {adapter} moved logits by {moved:.2g} of their spread, so it is not part of the weights. Take a LoRA "
            "that acts on every token, or model.dtype=float32 if the weights are of half precision."
        )
    return merged.requires_grad_(False)


def _reason(error: Exception) -> str:
    """What torch says of the first weight that has another size, or else what PEFT says."""
    sizes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return f"{sizes[0][:300].rstrip('.')}." if sizes else brief(error)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
