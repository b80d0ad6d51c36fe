"""ModelShelf: the model of the last job of this process, for the next one."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuitkit.models.checks import hooks_of
from circuitkit.models.hooked import HookedModel

_log = logging.getLogger(__name__)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelShelf:
    """Keeps one model, and hands it out again if nothing of the last job is left in it; else it is loaded again."""

    def __init__(self) -> None:
        self._key = ""
        self._model: HookedModel | None = None
        self._state: dict[str, Any] = {}

    def take(self, key: str, load: Callable[[], HookedModel]) -> HookedModel:
        """The model that is kept under the key, or a newly loaded one.

        Args:
            key: Everything that the loaded model depends on.
            load: Loads it.
        """
        if self._model is not None and self._key == key:
            leaks = differences(self._state, state_of(self._model))
            if not leaks:
                _log.info("The model of the last job is used again: nothing was left behind in it.")
                return self._model
            _log.warning("The last job left something behind in the model (%s), so it is loaded again.", leaks)
        self.clear()
        model = load()
        self._key, self._model, self._state = key, model, state_of(model)
        return model

    def clear(self) -> None:
        """Lets go of the model, before another needs its memory."""
        self._model, self._state = None, {}
        gc.collect()  # nnsight's wrappers refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def state_of(model: HookedModel) -> dict[str, Any]:
    """What a job could leave behind: hooks, training mode, gradients, weights and buffers. One pass over the memory of the weights."""
    tensors = (*model.hf.named_parameters(), *model.hf.named_buffers())
    return {
        **{f"hooks of {name or 'the model'}": counts for name, counts in hooks_of(model).items()},
        **{f"training flag of {name or 'the model'}": module.training for name, module in model.hf.named_modules()},
        **{f"gradients of {name}": (tensor.requires_grad, tensor.grad is None) for name, tensor in tensors},
        **{f"values of {name}": _digest(tensor) for name, tensor in tensors},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first few keys whose values differ, in words; empty if none do."""
    found = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for equal content. A sum over the bits: not as strong as a hash, and as fast as memory, on any device."""
    kind = (tuple(tensor.shape), str(tensor.dtype), str(tensor.device))
    if tensor.device.type == "meta":  # offloaded
        return kind
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS.get(tensor.element_size(), torch.uint8))
    return (*kind, int(bits.sum(dtype=torch.int64)))


SHELF = ModelShelf()
"""That of this process, for jobs of a sweep."""
