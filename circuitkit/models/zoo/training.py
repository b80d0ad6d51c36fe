"""A small trainer for causal language models: AdamW, cosine schedule, weighted next-token loss.

`HeadActivity` is a penalty that, added to the loss, leaves each kind of document to few heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

Chunk = tuple[Tensor, Tensor]
"""Token ids `[rows, tokens]` and one loss weight per token, 0 for padding, same shape."""


def learning_rate_factor(step: int, *, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then cosine to 5 %.

    Args:
        step: The step, counted from 0.
        steps: Number of steps in the whole run.
        warmup: Number of warm-up steps.

    Returns:
        A factor in (0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


class HeadActivity:
    """The cost of attention heads that are at work in some families of documents.

    A head's activity in a family is the root mean square of its output's distance from its mean
    over the family's tokens: 0 if the head writes the same vector everywhere, which is when
    putting its mean in its place changes nothing. Activities are summed over heads and not
    squared, so that (as in the group lasso) a head which is of little use falls silent in a family
    instead of all heads becoming a little weaker.

    Args:
        model: A GPT-2 or Llama model; hooks stay on it until `close` is called.
        families: Per family the token ids of its members.
        prices: Per layer and head what its activity costs; 1 for all by default.
        members: A row belongs to a family if it holds at least so many of its members.
    """

    PROJECTIONS = (".attn.c_proj", ".self_attn.o_proj")

    def __init__(
        self,
        model: PreTrainedModel,
        families: Sequence[Sequence[int]],
        *,
        prices: Sequence[Sequence[float]] | None = None,
        members: int = 5,
    ) -> None:
        self._families = [torch.tensor(list(family)) for family in families]
        self._members = members
        self._heads = model.config.num_attention_heads
        self._projections = [module for name, module in model.named_modules() if name.endswith(self.PROJECTIONS)]
        if prices is None:
            prices = [[1.0] * self._heads for _ in self._projections]
        self._prices = [torch.tensor(row) for row in prices]
        self._inputs: dict[nn.Module, Tensor] = {}
        self._hooks = [module.register_forward_pre_hook(self._remember) for module in self._projections]

    def _remember(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs[module] = args[0]

    def _written(self, module: Any) -> Tensor:
        """Return the Gram matrix `[heads, size, size]` of each head's block of a projection."""
        # GPT-2's Conv1D holds [in, out], torch's Linear [out, in].
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
        blocks = weight.unflatten(0, (self._heads, -1))
        return blocks @ blocks.mT

    def cost(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the activities of the model's last forward pass, priced and summed over heads.

        Args:
            ids: The token ids of that pass.
            weights: Their loss weights; tokens of weight 0 (padding, <bos>) do not count.

        Returns:
            A scalar: the sum over families, each counted with its share of the rows.
        """
        total = ids.new_zeros((), dtype=torch.float32)
        for family in self._families:
            rows = torch.isin(ids, family.to(ids.device)).sum(1) >= self._members
            if rows.sum() < 2:
                continue
            counted = weights[rows] > 0
            for module, prices in zip(self._projections, self._prices, strict=True):
                tokens = self._inputs[module][rows][counted].unflatten(1, (self._heads, -1))
                tokens = (tokens - tokens.mean(0)).transpose(0, 1)
                spread = tokens.mT @ tokens / tokens.shape[1]
                energy = (spread * self._written(module)).sum((1, 2))
                activity = (energy.clamp(min=0) + 1e-6).sqrt()
                total = total + rows.sum() * (prices.to(activity) * activity).sum()
        return total / len(ids)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._inputs.clear()


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the summed next-token cross entropy, each token counted with its weight.

    Rows are padded on the right, where causal attention cannot see the padding, so no attention
    mask is needed.

    Args:
        model: A causal language model that returns an object with `logits`.
        ids: Token ids `[rows, tokens]`.
        weights: Weight of predicting each of these tokens; the first token is never predicted.

    Returns:
        A scalar: the weighted sum (not yet divided by the sum of weights).
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def train(
    model: nn.Module,
    batches: Iterable[Sequence[Chunk]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    seed: int = 0,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_log: Callable[[int, float], None] | None = None,
) -> float:
    """Train a causal language model in place.

    Args:
        model: The model; trained on the device that it is on.
        batches: One item per step. An item is a list of chunks whose gradients are summed; rows
            of like length share a chunk, so that short documents cost little padding.
        steps: Number of optimizer steps; ends earlier if `batches` does.
        learning_rate: Peak learning rate.
        warmup: Number of warm-up steps.
        seed: Seed of torch's random state (dropout).
        penalty: Called after a chunk's forward pass with its ids and weights; returns what to add
            to the loss, counted with the chunk's share of the rows. Not part of reported losses.
        on_log: Called after every step with the step (from 1) and its loss.

    Returns:
        The mean weighted loss over the last (up to) 50 steps.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps=steps, warmup=warmup))
    history: list[float] = []
    model.train()
    for step, chunks in zip(range(1, steps + 1), batches, strict=False):
        total = sum(float(weights[:, 1:].sum()) for _, weights in chunks)
        n_rows = sum(len(ids) for ids, _ in chunks)
        loss = 0.0
        for ids, weights in chunks:
            ids, weights = ids.to(device), weights.to(device)
            part = weighted_loss(model, ids, weights) / total
            loss += part.item()
            if penalty is not None:
                part = part + penalty(ids, weights) * (len(ids) / n_rows)
            part.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss)
        if on_log is not None:
            on_log(step, loss)
    model.eval()
    recent = history[-50:]
    return sum(recent) / max(1, len(recent))
