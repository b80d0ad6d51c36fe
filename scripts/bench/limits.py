"""The fewest FLOPs that a job can be done with by the exact shortcuts of the ledger, computed from shapes alone.

Only products with weights count (2 FLOP a multiply-add); attention scores, which are below 1 % on short prompts, are left out on both
sides, as is the one product a run that turns mean head outputs into what they add to the residual stream. What a limit assumes:

* a state that was ever computed is kept: the residual stream entering a layer, the heads' outputs there, and what leaves its MLP;
* only heads that are kept are computed, and a change of one head costs that head's slice of the output projection;
* a removed MLP costs nothing; the last layer computes keys and values of all positions, and everything else at the last one;
* the unembedding is taken at the last position, of the clean run for all tokens and else for those that the metric reads; corrupt prompts
  are run once (plain means).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitkit.core.universe import NodeUniverse
from circuitkit.models.hooked import HookedModel


@dataclass(frozen=True)
class Costs:
    """FLOPs of the parts of a model.

    Attributes:
        query: One head's query, a token.
        key_value: One head's key and value, a token.
        out: One head's slice of the output projection, a token.
        mlp: An MLP, a token.
        unembed: The unembedding, a token of the prompt, of all tokens of the vocabulary or of those that the metric reads.
        rest: That of the other tokens.
    """

    n_layers: int
    n_heads: int
    query: int
    key_value: int
    out: int
    mlp: int
    unembed: int
    rest: int = 0

    @classmethod
    def of(cls, model: HookedModel, n_tokens: int | None = None) -> Costs:
        """Those of a model; with ``n_tokens``, of a metric that reads the logits of so many tokens."""
        asked = model.d_vocab if n_tokens is None else n_tokens
        head = 2 * model.d_model * model.d_head
        weights = sum(parameter.numel() for parameter in model.module(0, "mlp").parameters() if parameter.ndim == 2)
        key_value = 2 * head * model.n_kv_heads // model.n_heads
        unembed, rest = 2 * model.d_model * asked, 2 * model.d_model * (model.d_vocab - asked)
        return cls(model.n_layers, model.n_heads, head, key_value, head, 2 * weights, unembed, rest)

    @property
    def attention(self) -> int:
        """All heads of a layer with their output projection, a token."""
        return self.n_heads * (self.query + self.key_value + self.out)

    def forward(self, n_pos: int, *, unembedded: int | None = None) -> int:
        """One whole forward pass of a prompt; all positions are unembedded unless told otherwise."""
        kept = n_pos if unembedded is None else unembedded
        return n_pos * self.n_layers * (self.attention + self.mlp) + kept * self.unembed


class Ledger:
    """Books runs over one table of prompts and charges only what no earlier run has computed.

    Args:
        costs: Of the model.
        n_pos: Tokens per prompt.
        narrow: Whether logits at the last position are all that is asked for; else the states of all positions are.
    """

    def __init__(self, costs: Costs, n_pos: int, *, narrow: bool = True) -> None:
        self._costs = costs
        self._n_pos = n_pos
        self._narrow = narrow
        self._z: dict[bytes, Tensor] = {}
        self._outs: dict[bytes, list[Tensor]] = {}
        self._mlps: set[bytes] = set()

    def run(self, heads: Tensor, mlps: Tensor, stop: int | None = None) -> int:
        """FLOPs a prompt of a run under a mask, as far as layer ``stop``.

        Args:
            heads: layer x head, True where kept.
            mlps: layer, True where kept.
            stop: Last layer; None for the logits, -1 for nothing.
        """
        layers = range(self._costs.n_layers if stop is None else stop + 1)
        total = sum(self._layer(layer, heads, mlps) for layer in layers)
        return total + (self._costs.unembed if stop is None and self._narrow else 0)

    def _layer(self, layer: int, heads: Tensor, mlps: Tensor) -> int:
        costs, kept = self._costs, heads[layer]
        last = 1 if self._narrow and layer == costs.n_layers - 1 else self._n_pos
        before = bytes([layer]) + heads[:layer].numpy().tobytes() + mlps[:layer].numpy().tobytes()
        known = self._z.get(before, torch.zeros_like(kept))
        total = int((kept & ~known).sum()) * (last * costs.query + self._n_pos * costs.key_value)
        self._z[before] = known | kept
        outs = self._outs.setdefault(before, [])
        total += min([int(kept.sum()), *(int((kept != other).sum()) for other in outs)]) * last * costs.out
        outs.append(kept)
        entering_mlp = before + kept.numpy().tobytes()
        if mlps[layer] and entering_mlp not in self._mlps:
            self._mlps.add(entering_mlp)
            total += last * costs.mlp
        return total


def scoring(
    model: HookedModel, n_pos: int, masks: Iterable[Tensor], *, conditional: bool = False, n_tokens: int | None = None
) -> int:
    """FLOPs per prompt to score masks one after the other: the clean run, the corrupt run, the fully patched run, and then theirs.

    Args:
        model: The model.
        n_pos: Tokens per prompt.
        masks: Node masks in the order in which they are asked for.
        conditional: Whether MLP means are taken with the removed heads replaced, which asks for corrupt runs on the way.
        n_tokens: How many tokens the metric reads; None for all.
    """
    costs, graph = Costs.of(model, n_tokens), model.universe
    clean, corrupt = Ledger(costs, n_pos), Ledger(costs, n_pos, narrow=False)
    full_heads, full_mlps = split(graph, graph.full())
    total = clean.run(full_heads, full_mlps) + costs.rest + corrupt.run(full_heads, full_mlps)
    for mask in (graph.empty(), *masks):
        heads, mlps = split(graph, mask)
        total += clean.run(heads, mlps)
        if conditional and not mlps.all():
            total += corrupt.run(heads, full_mlps, int((~mlps).nonzero().max()))
    return total


def split(graph: NodeUniverse, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A node mask as layer x head, and layer for the MLPs."""
    units = mask.view(graph.n_layers, graph.n_heads + 1)
    return units[:, :-1].contiguous(), units[:, -1].contiguous()


def every_position(model: HookedModel, n_pos: int, n_tokens: int | None = None) -> int:
    """FLOPs a prompt of knocking out every (node, position) alone, with the causal cone.

    A patch at position p changes one position of its own layer's MLP and the positions from p on in the layers above. The clean run,
    the corrupt run and the fully patched run are counted too.
    """
    costs = Costs.of(model, n_tokens)
    cone = n_pos * (n_pos + 1) // 2
    whole_layer = cone * (costs.attention + costs.mlp)
    last_layer = cone * costs.n_heads * costs.key_value + n_pos * (costs.n_heads * (costs.query + costs.out) + costs.mlp)
    total = scoring(model, n_pos, (), n_tokens=n_tokens)
    for layer in range(costs.n_layers):
        top = layer == costs.n_layers - 1
        above = 0 if top else (costs.n_layers - 2 - layer) * whole_layer + last_layer
        own = (costs.out + costs.mlp) * (1 if top else n_pos)
        unembed = costs.unembed * (1 if top else n_pos)
        total += costs.n_heads * (above + own + unembed) + above + unembed
    return total
