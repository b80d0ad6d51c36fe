"""The other ways to do it, with plain torch hooks on the same model without nnsight: one forward per candidate, and the published loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from circuitkit.core.node import Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel

Means = dict[tuple[Kind, int], Tensor]
"""Kind and layer of a component to its mean, pos x d_model; of heads, before the output projection."""


class PlainHooks:
    """Mean ablation by hooks, as it is commonly written: one full forward pass a candidate, logits of all positions.

    Args:
        model: Whose torch modules are hooked; nothing else of it is used.
        prompts: All run at once.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet) -> None:
        self._model = model
        self._clean = prompts.clean.to(model.device)
        self._corrupt = prompts.corrupt.to(model.device)
        self._answers = prompts.answers.tokens.to(model.device)
        self._wrongs = prompts.wrongs.tokens.to(model.device)
        self._n_pos = prompts.n_pos
        self._at: int | slice = slice(None)
        self.means: Means = {}

    def prepare(self) -> None:
        """The means, in one pass over the corrupt prompts."""
        self.means = self._means(Kind.HEAD, Kind.MLP, removed=())

    @torch.no_grad()
    def score(self, removed: Sequence[Node]) -> Tensor:
        """Logit difference of each prompt with some nodes replaced by their means."""
        with unwrapped(self._model.hf), self._ablated(removed):
            logits = self._model.hf(self._clean, use_cache=False).logits[:, -1].float()
        return (logits.gather(-1, self._answers[:, None]) - logits.gather(-1, self._wrongs[:, None])).squeeze(-1).cpu()

    def score_at(self, node: Node) -> Tensor:
        """The same for a node that names one position."""
        self._at = int(node.span or 0)
        try:
            return self.score([node])
        finally:
            self._at = slice(None)

    @torch.no_grad()
    def _means(self, *kinds: Kind, removed: Sequence[Node]) -> Means:
        """Means over the corrupt prompts, without the unembedding."""
        seen: Means = {}
        with unwrapped(self._model.hf), self._ablated(removed), ExitStack() as stack:
            for layer in range(self._model.n_layers):
                for kind in kinds:
                    stack.enter_context(self._seen(kind, layer, seen))
            self._model.hf.base_model(self._corrupt, use_cache=False)
        return seen

    @contextmanager
    def _seen(self, kind: Kind, layer: int, seen: Means) -> Iterator[None]:
        def see_z(module: Any, args: tuple[Tensor, ...]) -> None:
            seen[kind, layer] = args[0].mean(0)

        def see_mlp(module: Any, args: Any, out: Tensor) -> None:
            seen[kind, layer] = out.mean(0)

        with self._hooked(layer, see_z if kind is Kind.HEAD else None, see_mlp if kind is Kind.MLP else None):
            yield

    @contextmanager
    def _ablated(self, removed: Sequence[Node]) -> Iterator[None]:
        heads: dict[int, list[int]] = defaultdict(list)
        mlps = [node.layer for node in removed if node.kind is Kind.MLP]
        for node in removed:
            if node.kind is Kind.HEAD:
                heads[node.layer].append(node.head)
        with ExitStack() as stack:
            for layer, indices in heads.items():
                stack.enter_context(self._hooked(layer, self._replace_heads(layer, indices), None))
            for layer in mlps:
                stack.enter_context(self._hooked(layer, None, self._replace_mlp(layer)))
            yield

    def _replace_heads(self, layer: int, indices: list[int]) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (self._model.n_heads, -1)).clone()
            mean = self.means[Kind.HEAD, layer].unflatten(-1, (self._model.n_heads, -1))
            z[:, self._at, indices] = mean[self._at, indices]
            return (z.flatten(-2), *args[1:])

        return hook

    def _replace_mlp(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, self._at] = self.means[Kind.MLP, layer][self._at]
            return out

        return hook

    @contextmanager
    def _hooked(self, layer: int, on_z: Callable[..., Any] | None, on_mlp: Callable[..., Any] | None) -> Iterator[None]:
        handles = []
        if on_z is not None:
            handles.append(self._model.module(layer, "out_proj").register_forward_pre_hook(on_z))
        if on_mlp is not None:
            handles.append(self._model.module(layer, "mlp").register_forward_hook(on_mlp))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PublishedLoop(PlainHooks):
    """The published search's evaluation: for every candidate both means anew and all logits, three passes (facts.md 3.1 and 6).

    The first pass takes head means on the corrupt prompts, the second MLP means on the corrupt prompts with the removed heads
    replaced, both over all positions and without the unembedding; the third runs the clean prompts.

    Args:
        conditional: As published. False takes the MLP means of the untouched model, as the paper's text has it, in as many passes.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet, *, conditional: bool) -> None:
        super().__init__(model, prompts)
        self._conditional = conditional

    def evaluate(self, removed: Sequence[Node]) -> Tensor:
        """Logit difference of each prompt."""
        self.means = self._means(Kind.HEAD, removed=())
        heads = [node for node in removed if node.kind is Kind.HEAD] if self._conditional else []
        self.means |= self._means(Kind.MLP, removed=heads)
        return self.score(removed)
