"""A hash of a model's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from circuitkit.models.sharded import whole


def fingerprint_of(hf: nn.Module, folder: Path | None) -> str:
    """SHA-256 of all weights; of the files in a folder too, where Accelerate has left some weights on disk."""
    digest = hashlib.sha256()
    tensors = sorted(hf.state_dict().items())
    for name, stored in tensors:
        tensor = whole(stored)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if any(tensor.device.type == "meta" for _, tensor in tensors):
        for file in sorted(folder.glob("*.safetensors")) if folder else ():
            with file.open("rb") as opened:
                while chunk := opened.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()
