"""Zero ablation."""

from __future__ import annotations

import torch

from circuitkit.core.node import Node
from circuitkit.core.shapes import Acts
from circuitkit.patchers.base import Needs, Patcher


class Zero(Patcher):
    """Replaces a component's output by zeros. Final."""

    needs = Needs()
    reads_activation = False

    def patch(self, act: Acts, source: Acts | None, site: Node) -> Acts:
        return torch.zeros_like(act)
