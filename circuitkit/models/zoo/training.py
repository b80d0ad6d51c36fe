"""A small trainer for causal language models: AdamW, cosine schedule, weighted next-token loss."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        on_log: Called after every step with the step (from 1) and its loss.

    Returns:
        The mean weighted loss over the last (up to) 50 steps.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps=steps, warmup=warmup)
    )
    history: list[float] = []
    model.train()
    for step, chunks in zip(range(1, steps + 1), batches, strict=False):
        total = sum(float(weights[:, 1:].sum()) for _, weights in chunks)
        loss = 0.0
        for ids, weights in chunks:
            part = weighted_loss(model, ids.to(device), weights.to(device)) / total
            part.backward()
            loss += part.item()
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
