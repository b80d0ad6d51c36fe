"""The single-node map of a GPT-2 written out by hand: the work that the engine does, with no engine around it.

What the engine takes longer than this is its overhead: tracing, planning, and laying values over rows. GPT-2 only, means only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from circuitkit.core.prompts import PromptSet
from circuitkit.models.bare import unwrapped


class ByHand:
    """Knocks out every head and MLP of a ``GPT2LMHeadModel`` alone, in the passes that the engine plans. Final.

    Args:
        hf: The model.
        prompts: The prompts.
        max_rows: Rows of a pass; at least the number of prompts.
    """

    def __init__(self, hf: torch.nn.Module, prompts: PromptSet, max_rows: int) -> None:
        self._hf = hf
        self._blocks = hf.transformer.h
        self._top = len(self._blocks) - 1
        self._n_heads = hf.config.n_head
        self._prompts = prompts
        self._masks_a_pass = max(1, max_rows // len(prompts))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logit differences, node x prompt, in the order of a graph."""
        with unwrapped(self._hf):
            return self._map()

    def _map(self) -> Tensor:
        z_means, mlp_means = self._means()
        resids, zs = self._clean_states()
        self._all_replaced(z_means, mlp_means)
        rows: list[Tensor] = []
        for layer in reversed(range(len(self._blocks))):
            heads = list(self._without_heads(layer, resids[layer], zs[layer], z_means[layer]))
            rows = [*heads, self._without_mlp(layer, resids[layer], zs[layer], mlp_means[layer]), *rows]
        return torch.cat(rows)

    def _clean_states(self) -> tuple[list[Tensor], list[Tensor]]:
        """What enters each layer of the untouched model, and its heads' outputs; runs to the logits."""
        resids, zs = [], []
        hidden = self._embed(self._prompts.clean)
        for layer, block in enumerate(self._blocks):
            resids.append(hidden)
            zs.append(self._z(block, hidden))
            hidden = self._rest(layer, hidden, zs[-1])
        self._hf.lm_head(self._hf.transformer.ln_f(hidden[:, -1]))
        return resids, zs

    def _all_replaced(self, z_means: list[Tensor], mlp_means: list[Tensor]) -> Tensor:
        """The score with nothing left, which an engine takes for its baseline."""
        hidden = self._embed(self._prompts.clean)
        for layer, block in enumerate(self._blocks):
            hidden = hidden + block.attn.c_proj(z_means[layer]) + mlp_means[layer]
        return self._measure(hidden)

    def _without_heads(self, layer: int, resid: Tensor, z: Tensor, mean: Tensor) -> Iterator[Tensor]:
        d_head = z.shape[-1] // self._n_heads
        for heads in torch.arange(self._n_heads).split(self._masks_a_pass):
            rows = z.repeat(len(heads), 1, 1).unflatten(0, (len(heads), -1))
            for place, head in enumerate(heads.tolist()):
                part = slice(head * d_head, (head + 1) * d_head)
                rows[place, :, :, part] = mean[:, part]
            yield self._from(layer, self._rest(layer, resid.repeat(len(heads), 1, 1), rows.flatten(0, 1))).unflatten(0, (len(heads), -1))

    def _without_mlp(self, layer: int, resid: Tensor, z: Tensor, mean: Tensor) -> Tensor:
        kept = self._kept(layer)
        hidden = resid[:, kept] + self._blocks[layer].attn.c_proj(z[:, kept]) + mean[kept]
        return self._from(layer, hidden)[None]

    def _from(self, layer: int, hidden: Tensor) -> Tensor:
        """Runs the layers above."""
        for above in range(layer + 1, self._top + 1):
            hidden = self._rest(above, hidden, self._z(self._blocks[above], hidden))
        return self._measure(hidden)

    def _embed(self, ids: Tensor) -> Tensor:
        embedding = self._hf.transformer
        return embedding.wte(ids) + embedding.wpe(torch.arange(ids.shape[1]))

    def _z(self, block: torch.nn.Module, hidden: Tensor) -> Tensor:
        joint = block.attn.c_attn(block.ln_1(hidden))
        query, key, value = (part.unflatten(-1, (self._n_heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)

    def _kept(self, layer: int) -> slice:
        return slice(-1, None) if layer == self._top else slice(None)

    def _rest(self, layer: int, resid: Tensor, z: Tensor) -> Tensor:
        """A layer behind its heads; the last one for the last position only."""
        block, kept = self._blocks[layer], self._kept(layer)
        middle = resid[:, kept] + block.attn.c_proj(z[:, kept])
        return middle + block.mlp(block.ln_2(middle))

    def _means(self) -> tuple[list[Tensor], list[Tensor]]:
        z_means, mlp_means = [], []
        hidden = self._embed(self._prompts.corrupt)
        for block in self._blocks:
            z = self._z(block, hidden)
            middle = hidden + block.attn.c_proj(z)
            out = block.mlp(block.ln_2(middle))
            hidden = middle + out
            z_means.append(z.mean(0))
            mlp_means.append(out.mean(0))
        return z_means, mlp_means

    def _measure(self, hidden: Tensor) -> Tensor:
        """Of the tokens alone that are answers or wrong answers."""
        asked = self._prompts.asked
        logits = self._hf.transformer.ln_f(hidden[:, -1]) @ self._hf.lm_head.weight[asked].T
        rows, prompts = logits.unflatten(0, (-1, len(self._prompts))), self._prompts.renumbered(asked)
        answers, wrongs = (ids.expand(len(rows), -1)[..., None] for ids in (prompts.answers.tokens, prompts.wrongs.tokens))
        return (rows.gather(-1, answers) - rows.gather(-1, wrongs)).flatten()
