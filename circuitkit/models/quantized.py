"""Weights in 4 or 8 bits, made from the model's own while they are loaded: bitsandbytes, on a card or on the CPU."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from circuitkit.core.errors import ModelError, unknown_choice

_log = logging.getLogger(__name__)

QUANTIZATIONS = ("bnb_4bit", "bnb_8bit")


def quantization_of(kind: str, config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """The arguments with which transformers quantises a model while it loads it.

    In 4 bits (NF4) only weights are rounded: a matrix is still a matrix, so what heads add to the residual stream still sums up. In 8 bits
    activations are rounded too, each row by itself: columns with outliers, which bitsandbytes would find over all rows of a batch, are
    not split off, because a prompt's logits must not depend on the prompts beside it.

    Args:
        kind: One of ``QUANTIZATIONS``.
        config: Of the model.
        dtype: In which to compute; ``auto`` for what the weights are stored in.

    Raises:
        ModelError: It is unknown, bitsandbytes is missing, or the weights are quantised already.
    """
    if kind not in QUANTIZATIONS:
        raise ModelError(unknown_choice("quantization", kind, QUANTIZATIONS))
    already = getattr(config, "quantization_config", None)
    if already:
        raise ModelError("This model is quantised already (quantization_config in config.json). Leave model.quantization out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={kind} needs bitsandbytes, which is not installed. Install it with: "
            "pip install 'circuitkit-nnsight[quantized]'."
        )
    compute = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    _log.info("Weights of linear maps are rounded to %s bits: what is found is true of the rounded model.", kind[4])
    if kind == "bnb_8bit":
        _log.warning("In 8 bits activations are rounded too, so what heads add does not sum up exactly. bnb_4bit rounds weights alone.")
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)}


def settle_quantized(hf: PreTrainedModel) -> None:
    """Has 4-bit weights stay as they are: on some CPUs bitsandbytes would pack them anew in the first pass and compute in bfloat16.

    It also says in every product of 8-bit weights that it computes in float16: once, here, is enough.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in hf.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
