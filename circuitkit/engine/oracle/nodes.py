"""The naive oracle: one mask per forward pass, the whole pass, plain torch hooks. Slow, short, and easy to believe.

It shares no code with the fast engine but the table of module paths, and it runs the model as transformers made it: nnsight's forwards,
which stay in a model that it has wrapped, are put aside for each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Masks, StepLogits, TokenIds
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.featurizing import Featurizers, Place
from circuitkit.engine.nodes import NodeEngine
from circuitkit.engine.oracle import coordinates
from circuitkit.metrics.base import Metric
from circuitkit.models.bare import unwrapped
from circuitkit.models.hooked import HookedModel
from circuitkit.models.model_map import Addend
from circuitkit.patchers.base import Patcher

if TYPE_CHECKING:
    from circuitkit.engine.edges.base import EdgeEngine


class ReferenceEngine(NodeEngine):
    """Scores one mask at a time by the definition. Final.

    Args:
        model, prompts, patcher, metric, universe, featurizers: As for every engine over nodes.
        max_rows: Bound on the prompts of a pass; None for all at once.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: PromptSet,
        patcher: Patcher,
        metric: Metric,
        universe: NodeUniverse | None = None,
        featurizers: Featurizers | None = None,
        *,
        max_rows: int | None = None,
    ) -> None:
        super().__init__(model, prompts, patcher, metric, universe, featurizers)
        self._max_rows = max_rows or len(self.prompts)
        self._encoded: dict[Place, coordinates.Encoded] = {}
        self._plain = self._sources(removed_heads=()) if self.patcher.needs.source != "none" else {}

    def passes(self, masks: Masks, base: Bool[Tensor, " node"] | None = None) -> Iterator[tuple[Int[Tensor, " some"], slice, StepLogits]]:
        for index, mask in enumerate(masks):
            removed = [node for node, kept in zip(self.universe.nodes, mask.tolist(), strict=True) if not kept]
            sources = self._sources_for(removed)
            for rows in self.slices():
                with self._replaced(removed, sources, rows, self.prompts.clean):
                    logits = self.forward(self.unpadded(self.prompts.clean, rows), rows)
                yield torch.tensor([index]), rows, logits[None]  # with no hook left: the caller may run the model

    def on(self, prompts: PromptSet) -> ReferenceEngine:
        return type(self)(self.model, prompts, self.patcher, self.metric, self.universe, **self.placed)

    def edges(self, circuit: Circuit | None = None, **options: Any) -> EdgeEngine:
        from circuitkit.engine.oracle.edges import ReferenceEdges  # stands on this engine

        return ReferenceEdges(self, circuit, **options)

    def clean_logits(self) -> CleanLogits:
        return torch.cat([self.forward(self.unpadded(self.prompts.clean, rows), rows) for rows in self.slices()])

    def forward(self, ids: Tensor, rows: slice) -> CleanLogits:
        """Logits of the model with the hooks that it has now, at the scored position, float32; nnsight has no part in it.

        Args:
            ids: Token ids of some prompts, without padding.
            rows: Which prompts.
        """
        with torch.no_grad(), unwrapped(self.model.hf):
            return self.prompts.scored(self.model.forward(ids), rows)

    def slices(self) -> Iterator[slice]:
        """The prompts, in passes of neighbours of equal length: here nothing is ever padded."""
        lengths, first = self.prompts.lengths.tolist(), 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or end - first == self._max_rows or lengths[end] != lengths[first]:
                yield slice(first, end)
                first = end

    def unpadded(self, ids: TokenIds, rows: slice) -> Int[Tensor, "row own_pos"]:
        """Token ids of some prompts of equal length, without their padding."""
        return ids[rows, int(self.prompts.pads[rows.start]) :]

    def _sources_for(self, removed: list[Node]) -> dict[Node, Tensor]:
        """What the patcher needs; with conditional means, MLP means are taken anew with the removed heads replaced."""
        if not self.patcher.needs.conditional:
            return self._plain
        heads = tuple(node for node in removed if node.kind in (Kind.HEAD, Kind.ATTENTION))
        conditional = self._sources(removed_heads=heads)
        return {node: (conditional if node.kind is Kind.MLP else self._plain)[node] for node in self._plain}

    def _sources(self, removed_heads: tuple[Node, ...]) -> dict[Node, Tensor]:
        """Every component's activation on the corrupt prompts, a row per prompt, averaged where the patcher wants means."""
        seen: dict[Node, list[Tensor]] = {}
        encoded: dict[Place, list[coordinates.Encoded]] = {}
        for rows in self.slices():
            with ExitStack() as stack:
                if removed_heads:
                    stack.enter_context(self._replaced(list(removed_heads), self._plain, rows, self.prompts.corrupt))
                for layer in range(self.model.n_layers):
                    stack.enter_context(self._recorded(layer, seen))
                for place in self.featurizers:
                    stack.enter_context(coordinates.changed(self.model, place, coordinates.record(self.featurizers, place, encoded)))
                self.forward(self.unpadded(self.prompts.corrupt, rows), rows)
        for place, parts in encoded.items():
            features, errors = zip(*((self.padded(one), self.padded(other)) for one, other in parts), strict=True)
            self._encoded[place] = self._pooled(torch.cat(features)), self._pooled(torch.cat(errors))
        return {node: self._pooled(torch.cat([self.padded(part) for part in parts])) for node, parts in seen.items()}

    def _pooled(self, act: Tensor) -> Tensor:
        """The activation of each prompt, or its mean over the prompts that the patcher pools."""
        if self.patcher.needs.source == "run":
            return act
        groups = self.prompts.groups if self.patcher.needs.pool == "group" else torch.zeros_like(self.prompts.groups)
        mean = torch.empty_like(act)
        for group in groups.unique():
            mean[groups == group] = act[groups == group].double().mean(0).to(act.dtype)
        return mean

    def padded(self, act: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row all_pos *rest"]:
        """Activations of some prompts, in the columns of the longest one. What stands at the left of a shorter one is never read."""
        return nn.functional.pad(act, (*[0] * (2 * act.ndim - 4), self.prompts.n_pos - act.shape[1], 0))

    @contextmanager
    def _recorded(self, layer: int, seen: dict[Node, list[Tensor]]) -> Iterator[None]:
        n_heads = self.model.n_heads

        def z_hook(module: Any, args: tuple[Tensor, ...]) -> None:
            for head, act in enumerate(args[0].unflatten(-1, (n_heads, -1)).unbind(-2)):
                seen.setdefault(Node.of_head(layer, head), []).append(act)

        def output_hook(node: Node, addend: Addend) -> Any:
            def hook(module: Any, args: Any, out: Any) -> None:
                seen.setdefault(node, []).append(addend.of(out).clone())  # some models change it in place afterwards

            return hook

        block, handles = self.model.map.blocks[layer], []
        if block.heads is not None:
            handles.append(self.model.module(layer, "out_proj").register_forward_pre_hook(z_hook))
        elif block.attention is not None:
            hook = output_hook(Node.of_attention(layer), block.attention)
            handles.append(self.model.module(layer, "attention").register_forward_hook(hook))
        if block.mlp is not None:
            handles.append(self.model.module(layer, "mlp").register_forward_hook(output_hook(Node.of_mlp(layer), block.mlp)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def replaced(self, removed: list[Node], rows: slice, ids: Tensor) -> AbstractContextManager[None]:
        """Within this context these nodes' outputs are replaced on some prompts."""
        return self._replaced(removed, self._sources_for(removed), rows, ids)

    @contextmanager
    def _replaced(self, removed: list[Node], sources: dict[Node, Tensor], rows: slice, ids: Tensor) -> Iterator[None]:
        """Within this context the removed nodes' outputs are replaced on some prompts."""
        handles = []
        removed = [part for node in removed for part in self._parts(node)]
        try:
            for layer in {node.layer for node in removed}:
                heads = [node for node in removed if node.layer == layer and node.kind is Kind.HEAD]
                block = self.model.map.blocks[layer]
                wholes = (("attention", Kind.ATTENTION, block.attention), ("mlp", Kind.MLP, block.mlp))
                if heads:
                    hook = self._z_hook(heads, sources, rows)
                    handles.append(self.model.module(layer, "out_proj").register_forward_pre_hook(hook))
                for part, kind, addend in wholes:
                    nodes = [node for node in removed if node.layer == layer and node.kind is kind]
                    if nodes and addend is not None:
                        hook = self._output_hook(nodes, addend, sources, rows)
                        handles.append(self.model.module(layer, part).register_forward_hook(hook))
            with ExitStack() as stack:
                for place in self.featurizers:
                    nodes = [node for node in removed if node.kind in coordinates.KINDS and (node.site, node.layer) == place]
                    if nodes:
                        stack.enter_context(coordinates.changed(self.model, place, self._change(place, nodes, rows)))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _parts(self, node: Node) -> list[Node]:
        """The heads of a whole attention; any other node alone, a mixer among them."""
        if node.kind is not Kind.ATTENTION or self.model.map.blocks[node.layer].is_mixer:
            return [node]
        heads = [Node.of_head(node.layer, head) for head in range(self.model.n_heads)]
        return heads if node.span is None else [head.at(node.span) for head in heads]

    def _change(self, place: Place, nodes: list[Node], rows: slice) -> coordinates.Change:
        source = self._encoded.get(place)
        first = int(self.prompts.pads[rows.start])
        of_rows = None if source is None else (source[0][rows, first:], source[1][rows, first:])

        def lay(node: Node, value: Tensor, current: Tensor) -> Tensor:
            return self._laid(node, value, current, rows)

        return coordinates.replaced(self.featurizers, self.patcher, place, nodes, of_rows, lay)

    def _z_hook(self, heads: list[Node], sources: dict[Node, Tensor], rows: slice) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            old = args[0].unflatten(-1, (self.model.n_heads, -1))
            z = old.clone()
            for node in heads:
                z[..., node.head, :] = self._value(node, old[..., node.head, :], z[..., node.head, :], sources, rows)
            return (z.flatten(-2), *args[1:])

        return hook

    def _output_hook(self, nodes: list[Node], addend: Addend, sources: dict[Node, Tensor], rows: slice) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            old = out = addend.of(output)
            for node in nodes:
                out = self._value(node, old, out, sources, rows)
            return addend.within(output, out.clone())

        return hook

    def _value(self, node: Node, act: Tensor, current: Tensor, sources: dict[Node, Tensor], rows: slice) -> Tensor:
        """The activation after replacing a node, at all positions or only at those that it names."""
        source = sources.get(node.component)
        source = None if source is None else source[rows, -act.shape[1] :].to(act.device)
        value = self.patcher.value(act, source, node.component)
        return self._laid(node, value, current, rows)

    def _laid(self, node: Node, value: Tensor, current: Tensor, rows: slice) -> Tensor:
        """A value over what is there, at all positions or only at those that the node names."""
        if node.span is None:
            return value
        current = current.clone()
        for row, position in enumerate(self.prompts.places(node.span)[rows].tolist()):
            current[row, position] = value[row, position]
        return current
