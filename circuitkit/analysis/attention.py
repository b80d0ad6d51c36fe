"""What each head looks at, on average over the prompts of a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.models.attention import attention_patterns, eager_attention
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class MeanPattern:
    """Attention of every head, averaged over the prompts of one template group.

    Attributes:
        group: Name of the group.
        tokens: The tokens of its first prompt as text.
        labels: Label to position, such as ``{"S1": 4, "last": 16}``.
        repeats: Where the token of a query is that of an earlier key in every prompt of the group.
        mean: Mean attention probability; rows sum to 1.
        n: Number of prompts.
    """

    group: str
    tokens: tuple[str, ...]
    labels: Mapping[str, int]
    repeats: Bool[Tensor, "query key"]
    mean: Float[Tensor, "layer head query key"]
    n: int

    @property
    def n_pos(self) -> int:
        """Number of tokens per prompt."""
        return self.mean.shape[-1]


def mean_patterns(model: HookedModel, prompts: PromptSet) -> tuple[MeanPattern, ...]:
    """The mean pattern of each template group, on the clean prompts. Memory holds the patterns of one slice of prompts at a time.

    Args:
        model: The model, with any implementation of attention.
        prompts: The prompts; of one length within a group, with labels at the same positions.

    Raises:
        PromptError: Prompts of a group differ in length, or in the position of a label.
    """
    found = []
    with eager_attention(model):
        for group, name in enumerate(prompts.group_names):
            of_group = prompts.groups == group
            if not of_group.any():
                continue
            members = prompts.take(of_group)
            members.require_equal_lengths(f"The mean pattern of group {name!r}", "Give prompts of other lengths groups of their own.")
            ids = members.clean
            total = torch.zeros(model.n_layers, model.n_heads, members.n_pos, members.n_pos)
            for part in ids.split(RowBudget(model, prompts.n_pos).rows):
                total += attention_patterns(model, part).sum(1).cpu()
            labels = {label: prompts.position(label, group) for label in (*prompts.spans, "last")}
            found.append(MeanPattern(name, tuple(token_texts(model, ids[0])), labels, _repeats(ids), total / len(ids), len(ids)))
    return tuple(found)


def token_texts(model: HookedModel, ids: Int[Tensor, " pos"]) -> Iterator[str]:
    """Tokens as text; as numbers for a model without a tokenizer."""
    for token in ids.tolist():
        yield str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def _repeats(ids: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "query key"]:
    return (ids[:, :, None] == ids[:, None, :]).all(0).tril(-1)
