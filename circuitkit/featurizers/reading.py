"""Dictionaries from safetensors files, in the layouts in which they are published.

Known are folders of SAELens (``cfg.json`` beside ``sae_weights.safetensors``), and files with ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec``
and perhaps a threshold, as Gemma Scope (``params``, ``config.json`` beside) and per-layer transcoders (``layer_3.safetensors``) have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.node import Site
from circuitkit.featurizers.activations import JumpReLU, TopK
from circuitkit.featurizers.dictionary import Dictionary
from circuitkit.storage.reading import open_file, read_json

_CONFIGS = ("cfg.json", "config.json")
# Names of tensors in files, in lower case, and what they are.
_TENSORS = {"w_enc": "encoder", "w_dec": "decoder", "b_enc": "encoder_bias", "b_dec": "decoder_bias", "threshold": "threshold",
            "activation_function.threshold": "threshold", "w_skip": "skip", "affine_skip_connection": "skip"}  # fmt: skip
_NEEDED = ("encoder", "decoder", "encoder_bias", "decoder_bias")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_ACTIVATIONS = {"standard": "relu", "relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk", "top_k": "topk",
                "transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu",
                "jumprelu_skip_transcoder": "jumprelu"}  # fmt: skip
_HOOKS = {"hook_resid_post": (Site.RESID_POST, 0), "hook_resid_pre": (Site.RESID_POST, -1), "hook_mlp_out": (Site.MLP_OUT, 0),
          "hook_attn_out": (Site.ATTN_OUT, 0)}  # fmt: skip
_TIMES = 1024  # how often the usual bound on files a dictionary may have: 64 GiB


@dataclass(frozen=True)
class Placed:
    """A dictionary, and where its files say that it lies.

    Attributes:
        dictionary: The dictionary.
        site: Of the model; None where the files do not say it.
        layer: Likewise.
    """

    dictionary: Dictionary
    site: Site | None
    layer: int | None

    @property
    def place(self) -> tuple[Site, int]:
        """Site and layer, as engines want it.

        Raises:
            ConfigError: The files do not say it.
        """
        if self.site is None or self.layer is None:
            raise ConfigError(
                "The files of this dictionary do not say at which site and layer of a model it lies. Name them: a site "
                f"({Site.ATTN_OUT}, {Site.MLP_OUT} or {Site.RESID_POST}) and a layer, from 0."
            )
        return self.site, self.layer


def load_dictionary(path: str | Path, dtype: torch.dtype = torch.float32) -> Placed:
    """Reads a sparse autoencoder or a transcoder of one layer.

    Args:
        path: A safetensors file, or a folder that has one.
        dtype: In which it computes, whatever the model's.

    Raises:
        ConfigError: No such file, more than one, of no known layout, or of an architecture that cannot be decoded exactly.
    """
    file = _weights_file(Path(path))
    config = _config(file)
    tensors = _tensors(file, dtype)
    encoder, decoder = tensors["encoder"], tensors["decoder"]
    n_features, width = len(tensors["encoder_bias"]), len(tensors["decoder_bias"])
    # Per-layer transcoders keep a row per feature in the encoder too; which it is shows in the shape, where that is not square.
    by_row = "layer_rows" in tensors if n_features == width else tuple(encoder.shape) == (n_features, width)
    site, layer = _place(config, file)
    architecture = str(config.get("architecture", "")).lower()
    reads_input = (
        architecture in _TRANSCODERS
        or str(config.get("type", "")) == "transcoder"
        or (not config and re.fullmatch(r"layer_\d+", file.stem) is not None)
    )
    dictionary = Dictionary(
        encoder.T.contiguous() if by_row else encoder,
        decoder,
        tensors["encoder_bias"],
        tensors["decoder_bias"],
        _activation(config, tensors, file),
        centred=bool(config.get("apply_b_dec_to_input", False)),
        reads_input=reads_input,
    )
    for key, found in (("d_in", dictionary.width), ("d_sae", dictionary.n_features), ("width", dictionary.n_features)):
        if key in config and config[key] != found:
            raise ConfigError(
                f"{file} has a dictionary with {key} {found}, but its config says {config[key]}. One of the two "
                "is damaged: fetch both again."
            )
    return Placed(dictionary, site, layer)


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = [file for file in files if file.stem in ("sae_weights", "params")]
    if len(named) == 1 or len(files) == 1:
        return (named or files)[0]
    found = f"{len(files)} of them" if files else "a folder without one" if path.is_dir() else "no such file or folder"
    raise ConfigError(f"Expected a safetensors file with a dictionary at {path}, or a folder with one; found {found}. Name the file.")


def _config(file: Path) -> Mapping[str, Any]:
    for name in _CONFIGS:
        beside = file.with_name(name)
        if beside.is_file():
            config = read_json(beside, "config of a dictionary", ConfigError)
            if not isinstance(config, dict):
                raise ConfigError(f"The config {beside} of a dictionary holds no settings. Fetch it again.")
            metadata = config.get("metadata")
            return {**(metadata if isinstance(metadata, dict) else {}), **config}
    return {}


def _tensors(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file by what they are; ``layer_rows`` marks the layout of per-layer transcoders."""
    found: dict[str, Tensor] = {}
    try:
        open_file(file, "dictionary", ConfigError, times=_TIMES).close()  # a regular file, and not too large
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                known = _TENSORS.get(name.lower())
                if known is not None:
                    found[known] = opened.get_tensor(name).to(dtype).contiguous()
                if name == "activation_function.threshold" or name == "W_skip":
                    found["layer_rows"] = torch.ones(())
            names = list(opened.keys())
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"The dictionary {file} cannot be read: {error}. Fetch it again.") from error
    missing = [name for name, what in _TENSORS.items() if what in _NEEDED and what not in found]
    bad = [what for what in _NEEDED if what in found and found[what].ndim != (1 if what.endswith("bias") else 2)]
    if missing or bad:
        raise ConfigError(
            f"{file} is no dictionary of one layer: expected the tables W_enc and W_dec and the vectors b_enc and b_dec, found "
            f"{', '.join(names[:12]) or 'nothing'}. Gated autoencoders and transcoders across layers cannot be read."
        )
    return found


def _activation(config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> nn.Module:
    architecture = str(config.get("architecture") or ("jumprelu" if "threshold" in tensors else "standard")).lower()
    if architecture not in _ACTIVATIONS:
        raise ConfigError(f"{file}: {unknown_choice('architecture of dictionaries', architecture, _ACTIVATIONS)}")
    normalised = config.get("normalize_activations", "none")
    # What was scaled by one number on average has the number in its weights when it is published.
    if normalised not in ("none", None, False, "expected_average_only_in"):
        raise ConfigError(
            f"{file} normalises what it encodes ({normalised}), so it does not decode a position by itself. Take a dictionary with "
            "normalize_activations none."
        )
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["decoder"].norm(dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
            raise ConfigError(
                f"{file} ranks features by the length of their directions (rescale_acts_by_decoder_norm), which is not read. Fold the "
                "lengths into the encoder first."
            )
    kind = _ACTIVATIONS[architecture]
    function = str(config.get("activation_fn_str") or config.get("activation_fn") or "").lower()
    if function.startswith("topk") or (kind == "topk"):
        arguments = config.get("activation_fn_kwargs") or {}
        k = config.get("k", arguments.get("k") if isinstance(arguments, dict) else None)
        if type(k) is not int:
            raise ConfigError(f"{file} keeps the k largest features, but its config says no k. Fetch the config again.")
        return TopK(k)
    if kind == "jumprelu" or "threshold" in tensors:
        if "threshold" not in tensors:
            raise ConfigError(f"{file} is a JumpReLU dictionary, but it has no tensor named threshold. Fetch it again.")
        return JumpReLU(tensors["threshold"].flatten())
    if function not in ("", "relu"):
        raise ConfigError(f"{file}: {unknown_choice('activation function of dictionaries', function, ('relu', 'topk'))}")
    return nn.ReLU()


def _place(config: Mapping[str, Any], file: Path) -> tuple[Site | None, int | None]:
    """Where the files say that the dictionary lies: what it gives back, for a transcoder."""
    hook = str(config.get("hook_name_out") or config.get("hook_name") or "")
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook)
    if match is not None and match[2] in _HOOKS:
        site, shift = _HOOKS[match[2]]
        # What enters a block is what leaves the one before it; the embedding has no such site.
        layer = int(match[1]) + shift
        return (site, layer) if layer >= 0 else (None, None)
    name = re.fullmatch(r"layer_(\d+)", file.stem)
    return (Site.MLP_OUT, int(name[1])) if name is not None and not hook else (None, None)
