"""How wide a model is: from its configuration, or for a module of one's own by running one token through it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from circuitkit.models.model_map import ModelMap


@dataclass(frozen=True)
class Shape:
    """Widths of a model. Final.

    Attributes:
        d_model: Of the residual stream.
        d_mlp: Of the neurons of an MLP.
        d_vocab: Of the logits.
        n_tokens: How many token ids it reads.
        n_ctx: How many positions it reads at most; None where nothing says so.
    """

    d_model: int
    d_mlp: int
    d_vocab: int
    n_tokens: int
    n_ctx: int | None

    @classmethod
    def of(cls, hf: nn.Module, model_map: ModelMap) -> Shape:
        """The widths of a model."""
        return _configured(hf, model_map) if isinstance(hf, PreTrainedModel) else _seen(hf, model_map)


def _configured(hf: PreTrainedModel, model_map: ModelMap) -> Shape:
    config: Any = hf.config.get_text_config()
    d_model: int = config.hidden_size
    d_mlp = _neurons(hf, model_map) or getattr(config, "intermediate_size", None) or 4 * d_model
    return Shape(d_model, d_mlp, config.vocab_size, config.vocab_size, getattr(config, "max_position_embeddings", None))


def _neurons(hf: nn.Module, model_map: ModelMap) -> int | None:
    """How much the first output projection of an MLP reads, where it says so."""
    path = next((block.neurons for block in model_map.blocks if block.neurons is not None), None)
    module = None if path is None else hf.get_submodule(path)
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.weight.shape[0] if isinstance(module, Conv1D) else None


def _seen(hf: nn.Module, model_map: ModelMap) -> Shape:
    widths: dict[str, int] = {}

    def entering(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            widths.setdefault(name, (*args, *kwargs.values())[0].shape[-1])

        return hook

    embed = hf.get_submodule(model_map.embed)
    tables = [parameter for parameter in embed.parameters() if parameter.ndim == 2]
    device = next(iter((*tables, *hf.parameters()))).device
    neurons = next((block.neurons for block in model_map.blocks if block.neurons is not None), None)
    with ExitStack() as hooks, torch.no_grad():
        for name, path in (("resid", model_map.blocks[0].module), *((("neurons", neurons),) if neurons is not None else ())):
            hooks.callback(hf.get_submodule(path).register_forward_pre_hook(entering(name), with_kwargs=True).remove)
        out: Any = hf(torch.zeros(1, 1, dtype=torch.long, device=device))
    logits: Tensor = out.logits if model_map.logits else out
    d_model = widths["resid"]
    n_tokens = len(tables[0]) if tables else logits.shape[-1]
    return Shape(d_model, widths.get("neurons", 4 * d_model), logits.shape[-1], n_tokens, None)
