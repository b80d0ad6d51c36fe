"""A small trainer for causal language models: AdamW, cosine schedule, weighted next-token loss.

`Activity` is a penalty that, added to the loss, leaves each kind of document to few heads and MLPs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Prices:
    """What activity costs, in units of the loss per unit of activity before the factor of the whole price.

    Attributes:
        heads: By place of a document (``PLACES``), per layer and head.
        mlps: Per layer; counted over all tokens. 0 is free.
        relative: Whether activity is a share of the residual stream that it is added to. If not, a layer whose stream is small,
            such as the first, can write little and mean much, since what reads it is normalised.
    """

    heads: Mapping[str, Sequence[Sequence[float]]]
    mlps: Sequence[float]
    relative: bool


def _before_member(member: Tensor) -> Tensor:
    """Whether the next token is a member, `[rows, tokens]`."""
    return F.pad(member[:, 1:], (0, 1))


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "any": torch.ones_like,
    "member": lambda member: member,
    "before": lambda member: _before_member(member) & ~member,
    "other": lambda member: ~_before_member(member) & ~member,
}
"""Places of a document, from which of its tokens are members `[rows, tokens]`: a member; a token before one, where it is to be said."""


class Activity:
    """The cost of attention heads and MLPs that are at work in some families of documents. Final.

    A component's activity in a family is the root mean square of its output's distance from its mean
    over the family's tokens: 0 if it writes the same vector everywhere, which is when putting its
    mean in its place changes nothing (mean ablation). Activities are summed over components and not squared, so that
    (as in the group lasso, Yuan and Lin 2006) one which is of little use falls silent in a family
    instead of all becoming a little weaker. Prices by place say where in a document a layer's heads may work: those that
    compare members at the members, those that say the next one before it.

    Args:
        model: A GPT-2 or Llama model; hooks stay on it until `close` is called.
        families: Per family the token ids of its members.
        prices: What activity costs.
        members: A row belongs to a family if it holds at least so many of its members.
    """

    PROJECTIONS = (".attn.c_proj", ".self_attn.o_proj")
    NORMS = (".ln_2", ".post_attention_layernorm")

    def __init__(self, model: PreTrainedModel, families: Sequence[Sequence[int]], prices: Prices, members: int = 5) -> None:
        self._families = [torch.tensor(list(family)) for family in families]
        self._members = members
        self._n_heads = model.config.num_attention_heads
        named = dict(model.named_modules())
        self._projections = [module for name, module in named.items() if name.endswith(self.PROJECTIONS)]
        self._mlps = [module for name, module in named.items() if name.endswith(".mlp")]
        self._norms = [module for name, module in named.items() if name.endswith(self.NORMS)]
        self._prices = {place: [torch.tensor(row, dtype=torch.float32) for row in table] for place, table in prices.heads.items()}
        self._mlp_prices, self._relative = prices.mlps, prices.relative
        self._seen: dict[nn.Module, Tensor] = {}
        self._hooks = [module.register_forward_pre_hook(self._remember_input) for module in (*self._projections, *self._norms)]
        self._hooks += [module.register_forward_hook(self._remember_output) for module in self._mlps]

    def _remember_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._seen[module] = args[0]

    def _remember_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen[module] = output

    def _written(self, module: Any) -> Tensor:
        """Return the Gram matrix `[heads, size, size]` of each head's block of a projection."""
        # GPT-2's Conv1D holds [in, out], torch's Linear [out, in].
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
        blocks: Tensor = weight.unflatten(0, (self._n_heads, -1))
        return blocks @ blocks.mT

    def cost(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the activities of the model's last forward pass, priced and summed over components.

        Args:
            ids: The token ids of that pass.
            weights: Their loss weights; tokens of weight 0 (padding, <bos>) do not count.

        Returns:
            A scalar: the sum over families, each counted with its share of the rows.
        """
        total = ids.new_zeros((), dtype=torch.float32)
        for family in self._families:
            member = torch.isin(ids, family.to(ids.device))
            rows = member.sum(1) >= self._members
            if rows.sum() < 2:
                continue
            n_rows, member, counted = int(rows.sum()), member[rows], weights[rows] > 0
            places = {place: PLACES[place](member) & counted for place in self._prices}
            scales = [self._scale(self._seen[norm][rows][counted]) for norm in self._norms]
            for layer, module in enumerate(self._projections):
                z, written = self._seen[module][rows], self._written(module)
                for place, tables in self._prices.items():
                    if places[place].sum() >= 2:
                        activity = self._activity(z[places[place]], written)
                        total = total + n_rows * (tables[layer].to(activity) * activity).sum() / scales[layer]
            for price, module, scale in zip(self._mlp_prices, self._mlps, scales, strict=True):
                if price:
                    output = self._seen[module][rows][counted]
                    energy = ((output - output.mean(0)) ** 2).sum(1).mean()
                    total = total + n_rows * price * (energy + 1e-6).sqrt() / scale
        return total / len(ids)

    def _activity(self, z: Tensor, written: Tensor) -> Tensor:
        """Return the activity of each head `[heads]` from what its projection reads at some tokens `[tokens, heads * size]`."""
        tokens = z.unflatten(1, (self._n_heads, -1))
        tokens = (tokens - tokens.mean(0)).transpose(0, 1)
        spread = tokens.mT @ tokens / tokens.shape[1]
        return ((spread * written).sum((1, 2)).clamp(min=0) + 1e-6).sqrt()

    def _scale(self, stream: Tensor) -> Tensor:
        """Return what activity is measured against: the root mean square norm of the stream `[tokens, d_model]`, as a constant, or 1."""
        return stream.detach().pow(2).sum(-1).mean().sqrt() if self._relative else stream.new_ones(())

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()


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
