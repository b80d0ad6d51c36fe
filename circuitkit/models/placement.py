"""Where modules compute, for models that Accelerate has placed on several devices."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module computes.

    Args:
        module: With weights of its own, perhaps offloaded: then the hook that Accelerate has put on it says where they are brought.
        otherwise: What it is where nobody says.
    """
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    device = next(module.parameters()).device
    return otherwise if device.type == "meta" and hook is not None else device
