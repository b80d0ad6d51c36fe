"""Mean ablation over corrupt prompts, the paper's intervention."""

from __future__ import annotations

from typing import Literal

from circuitkit.core.errors import ConfigError, unknown_choice
from circuitkit.core.node import Node
from circuitkit.core.shapes import Acts
from circuitkit.patchers.base import Needs, Patcher


class Mean(Patcher):
    """Replaces a component's output by its mean over the corrupt prompts, position by position. Final.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), iterative pruning; and its published code.

    Args:
        means: ``plain`` takes all means in the untouched model, as the paper's text says. ``conditional`` takes the means of MLPs on
            the corrupt prompts with the heads that are currently out already replaced, as the published code does.
        pool: ``all`` averages over every corrupt prompt, as published; ``group`` within each template.
    """

    reads_activation = False
    gives_source = True

    def __init__(self, means: Literal["plain", "conditional"] = "plain", pool: Literal["group", "all"] = "all") -> None:
        if means not in ("plain", "conditional"):
            raise ConfigError(unknown_choice("kind of means (patcher.means)", means, ("plain", "conditional")))
        if pool not in ("all", "group"):
            raise ConfigError(unknown_choice("pool of means (patcher.pool)", pool, ("all", "group")))
        self.means = means
        self.pool = pool
        self.needs = Needs("mean", pool, conditional=means == "conditional")

    def patch(self, act: Acts, source: Acts | None, site: Node) -> Acts:
        assert source is not None
        return source
