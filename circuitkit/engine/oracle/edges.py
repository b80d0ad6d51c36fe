"""The naive oracle for edges: whole forward passes with plain torch hooks, several a receiver. Slow, and written from the definition.

It shares no code with the fast path but the look-up of modules, and it runs the model as transformers made it, like the naive oracle
for nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuitkit.core.circuit import Circuit
from circuitkit.core.node import INPUT, LOGITS, PORTS, Edge, Kind, Node
from circuitkit.core.shapes import CleanLogits, Masks, Values
from circuitkit.engine.base import WHOLE, Share
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.models.bare import unwrapped
from circuitkit.models.blocks import Part, joint_norms, norm_before, norm_behind, read, reader
from circuitkit.models.columns import by_module, columns_of
from circuitkit.models.model_map import Addend

PARTS: tuple[Part, Part] = ("attention", "mlp")
_READERS: dict[Part, str] = {"attention": "heads", "mlp": "mlp"}


@dataclass
class Seen:
    """What a forward pass showed.

    Attributes:
        embedding: What entered the first layer.
        z: Outputs of a layer's heads as they went on, a layer each.
        outs: Outputs of MLPs and mixers likewise, before any norm behind them.
        read: What the norm before a receiver was given, or where there is none the receiver itself: under ``("heads", layer)``,
            ``("mlp", layer)``, ``("logits", 0)``.
        is_behind: Whether the last layer has run; a model may use the final norm before the first one, too.
        logits: At the last position, float32.
    """

    embedding: Tensor | None = None
    z: dict[int, Tensor] = field(default_factory=dict)
    outs: dict[Node, Tensor] = field(default_factory=dict)
    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    is_behind: bool = False
    logits: CleanLogits | None = None


@dataclass
class Given:
    """What a forward pass is given in the place of what it would compute itself.

    Attributes:
        z: Outputs of single heads.
        outs: Outputs of MLPs and mixers.
        embedding: What enters the first layer.
        read: What the norm before a receiver is given; the residual stream goes on as it was.
        ports: For a layer, what the norm before its queries, keys or values is given.
    """

    z: dict[Node, Tensor] = field(default_factory=dict)
    outs: dict[Node, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    ports: tuple[int, dict[str, Tensor]] | None = None


class ReferenceEdges(EdgeEngine):
    """Scores edges by the definition. Final.

    Args:
        engine: The naive engine for nodes.
        circuit: The node circuit.
        options: As for every edge engine.
    """

    def __init__(self, engine: ReferenceEngine, circuit: Circuit | None = None, **options: Any) -> None:
        super().__init__(engine, circuit, **options)
        self._nodes = engine
        self._removed = [node for node, kept in zip(engine.universe.nodes, self.mask.tolist(), strict=True) if not kept]

    @property
    def oracle(self) -> EdgeEngine:
        return self

    def alone(self, units: Sequence[Edge | str], share: Share = WHOLE) -> Float[Tensor, "edge prompt"]:  # type: ignore[override]
        values = torch.full((len(units), len(self.prompts)), torch.nan)
        mine = [place for place in range(len(units)) if share.takes(place)]
        if mine:
            values[mine] = self._values(self._patched, [self.universe.unit(self.universe.index(units[place])) for place in mine])
        return values

    def score(self, masks: Masks, base: Bool[Tensor, " edge"] | None = None) -> Values:
        return self._values(self._pruned, list(self.checked(masks, base)))

    def _values(self, run: Callable[[Any], Seen], wanted: Sequence[Any]) -> Values:
        values = torch.empty(len(wanted), len(self.engine.prompts))
        with unwrapped(self.engine.model.hf):  # modules are also called by themselves, outside of a pass
            for rows in self._nodes.slices():
                self._rows = rows
                self._clean = self._run(Given())
                self._source = self._sources(rows)
                for place, each in enumerate(wanted):
                    logits = run(each).logits
                    assert logits is not None
                    values[place, rows] = self.engine.measure(logits[None], rows)[0]
        return values

    def _patched(self, edge: Edge) -> Seen:
        """One edge: a pass with the sender corrupt and others frozen tells what the receiver reads; then a pass in which it reads that."""
        frozen = Given(z={node: z for layer in self._clean.z for node, z in self._heads(self._clean, layer).items()})
        frozen.outs = {node: out for node, out in self._clean.outs.items() if node.kind is not Kind.MLP or self.mlps == "freeze"}
        value = self._sent(edge.src, self._clean)
        if edge.src == INPUT:
            frozen.embedding = value
        elif edge.src.kind is Kind.HEAD:
            frozen.z[edge.src] = value
        else:
            frozen.outs[edge.src] = value
        read = self._run(frozen).read[_place(edge.dst)]
        if edge.dst.kind is not Kind.HEAD:
            return self._run(Given(read={_place(edge.dst): read}))
        ports = dict.fromkeys(PORTS if edge.dst.port is None else (edge.dst.port,), read)
        return self._run(Given(z=self._head_reading(edge.dst.component_of_port, ports, Given())))

    def _pruned(self, mask: Bool[Tensor, " edge"]) -> Seen:
        """A mask: receivers in causal order, each given what it reads when removed senders are as in the corrupt run."""
        removed = [edge for edge, kept in zip(self.universe.edges, mask.tolist(), strict=True) if not kept]
        given = Given()
        for node in dict.fromkeys(edge.dst.component_of_port for edge in removed):
            now = self._run(given)
            ports: dict[str, Tensor] = {}
            for dst in dict.fromkeys(edge.dst for edge in removed if edge.dst.component_of_port == node):
                read = self._reads(dst, [edge.src for edge in removed if edge.dst == dst], now)
                ports |= dict.fromkeys(PORTS if dst.port is None else (dst.port,), read)
            if node.kind is Kind.HEAD:
                given.z |= self._head_reading(node, ports, given)
            else:
                given.read[_place(node)] = ports["q"]  # a receiver without ports has the same for all three
        return self._run(given)

    def _reads(self, dst: Node, senders: list[Node], now: Seen) -> Tensor:
        """What a receiver reads when some senders give what the patcher says, and all else is as in a run.

        A norm behind an attention or an MLP is given what comes of its senders' outputs when just these are replaced; the stream takes up
        what it makes of that in the place of what it made of them as they were.
        """
        read = now.read[_place(dst)]
        behind: dict[nn.Module, list[Node]] = {}
        for node in senders:
            norm = None if node == INPUT else norm_behind(self.engine.model, node.layer, _part(node))
            if norm is None:
                read = read + self._adds(node, self._sent(node, now)) - self._adds(node, _gives(node, now))
            else:
                behind.setdefault(norm, []).append(node)
        with torch.no_grad():
            for norm, nodes in behind.items():
                scale = self._scale(nodes[0])
                if nodes[0].kind is not Kind.HEAD:
                    read = read + scale * (norm(self._sent(nodes[0], now)) - norm(_gives(nodes[0], now)))
                    continue
                project, before = self.engine.model.module(nodes[0].layer, "out_proj"), now.z[nodes[0].layer]
                after = before.clone()
                for node in nodes:
                    after[..., node.head, :] = self._sent(node, now)
                read = read + scale * (norm(project(after.flatten(-2))) - norm(project(before.flatten(-2))))
        return read

    def _scale(self, node: Node) -> float:
        """By what the model multiplies what a part gives before it adds it to the residual stream."""
        addend = self.engine.model.map.blocks[node.layer].part(_part(node))
        return 1.0 if addend is None else addend.scale

    def _adds(self, node: Node, gives: Tensor) -> Tensor:
        """What a sender that gives this adds to the residual stream as it is; for a head up to a constant."""
        if node == INPUT:
            return gives
        if node.kind is not Kind.HEAD:
            return self._scale(node) * gives
        alone = gives.new_zeros(*gives.shape[:-1], self.engine.model.n_heads, gives.shape[-1])
        alone[..., node.head, :] = gives
        with torch.no_grad():
            projected: Tensor = self.engine.model.module(node.layer, "out_proj")(alone.flatten(-2))
        return self._scale(node) * projected

    def _head_reading(self, node: Node, ports: dict[str, Tensor], given: Given) -> dict[Node, Tensor]:
        """What a head gives when its ports read something else. All heads of its layer then read that, and only this one is taken."""
        heads = self.engine.model.map.blocks[node.layer].heads
        if heads is not None and not heads.has_ports:  # the whole attention reads it, by all ports
            seen = self._run(replace(given, read={**given.read, ("heads", node.layer): ports["q"]}))
        else:
            seen = self._run(replace(given, ports=(node.layer, ports)))
        return {node: self._heads(seen, node.layer)[node]}

    def _sent(self, node: Node, seen: Seen) -> Tensor:
        """What the patcher takes a sender to give, in a run."""
        return self.patcher.value(_gives(node, seen), None if self._source is None else _gives(node, self._source), node)

    def _sources(self, rows: slice) -> Seen | None:
        """What the patcher is given for some prompts: the circuit's run on their corrupt twins, or the mean of that over all prompts."""
        if self.patcher.needs.source == "none":
            return None
        if self.patcher.needs.source == "run":
            return self._run(Given(), self.prompts.corrupt)
        runs = []
        for part in self._nodes.slices():
            self._rows = part
            runs.append(self._run(Given(), self.prompts.corrupt))
        self._rows = rows
        groups = self.prompts.groups if self.patcher.needs.pool == "group" else torch.zeros_like(self.prompts.groups)

        def mean(parts: list[Tensor]) -> Tensor:
            whole = torch.cat([self._nodes.padded(part) for part in parts])
            means = torch.stack([whole[groups == group].double().mean(0).to(whole.dtype) for group in groups[rows]])
            return means[:, int(self.prompts.pads[rows.start]) :]

        embeddings = [run.embedding for run in runs if run.embedding is not None]
        return Seen(
            embedding=mean(embeddings),
            z={layer: mean([run.z[layer] for run in runs]) for layer in runs[0].z},
            outs={node: mean([run.outs[node] for run in runs]) for node in runs[0].outs},
        )

    def _heads(self, seen: Seen, layer: int) -> dict[Node, Tensor]:
        return {Node.of_head(layer, head): z for head, z in enumerate(seen.z[layer].unbind(-2))}

    # --- A forward pass with plain hooks ----------------------------------------------------------------------------------------------

    def _run(self, given: Given, prompts: Tensor | None = None) -> Seen:
        """One whole pass of the circuit, on the clean prompts if no others are given."""
        seen, model = Seen(), self.engine.model
        ids = self._nodes.unpadded(self.engine.prompts.clean if prompts is None else prompts, self._rows)
        with ExitStack() as stack:
            # What is given comes after what the circuit replaces, and is recorded last.
            stack.enter_context(self._nodes.replaced(self._removed, self._rows, ids))
            for layer in range(model.n_layers):
                stack.enter_context(self._layer(layer, given, seen))
            final = model.final_norm or model.unembedding
            last = self._reading(("logits", 0), given, seen)
            stack.enter_context(_before(final, lambda value: last(value) if seen.is_behind else value))
            stack.callback(model.module(model.n_layers - 1, "block").register_forward_hook(partial(_passed, seen)).remove)
            seen.logits = self._nodes.forward(ids, self._rows)
        return seen

    @contextmanager
    def _layer(self, layer: int, given: Given, seen: Seen) -> Iterator[None]:
        model = self.engine.model
        block = model.map.blocks[layer]

        def enter(value: Tensor) -> Tensor:
            seen.embedding = value if given.embedding is None else given.embedding
            return seen.embedding

        def heads(value: Tensor) -> Tensor:
            z: Tensor = value.unflatten(-1, (model.n_heads, -1)).clone()
            for node, new in given.z.items():
                if node.layer == layer:
                    z[..., node.head, :] = new
            seen.z[layer] = z
            return z.flatten(-2)

        def output(node: Node, addend: Addend, module: nn.Module, args: Any, out: Any) -> Any:
            seen.outs[node] = given.outs.get(node, addend.of(out)).clone()
            return addend.within(out, seen.outs[node].clone())  # which some models change in place

        handles = []
        with ExitStack() as stack:
            if layer == 0:
                stack.enter_context(_before(model.module(layer, "block"), enter))
            for part in PARTS:
                if block.part(part) is not None:
                    stack.enter_context(self._stream(layer, part, given, seen))
            if block.heads is not None:
                stack.enter_context(_before(model.module(layer, "out_proj"), heads))
            elif block.attention is not None:
                hook = partial(output, Node.of_attention(layer), block.attention)
                handles.append(model.module(layer, "attention").register_forward_hook(hook))
            if block.mlp is not None:
                hook = partial(output, Node.of_mlp(layer), block.mlp)
                handles.append(model.module(layer, "mlp").register_forward_hook(hook))
            if given.ports is not None and given.ports[0] == layer:
                for path, places in by_module(model.map.ports(layer)).items():
                    norm = joint_norms(model, layer)[places[0]]
                    for module in (model.hf.get_submodule(path), norm):
                        if module is not None:
                            handles.append(module.register_forward_hook(self._port_hook(layer, path, norm, given.ports[1])))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _stream(self, layer: int, part: Part, given: Given, seen: Seen) -> Iterator[None]:
        """What a part reads of the residual stream is recorded, and is what was given for it."""
        model, place = self.engine.model, (_READERS[part], layer)
        norm = norm_before(model, layer, part)
        if norm is None or not model.map.blocks[layer].shares_norm:
            with _before(reader(model, layer, part), self._reading(place, given, seen)):
                yield
            return

        def record(value: Tensor) -> Tensor:
            seen.read.setdefault(place, value)
            return value

        def read(value: Tensor) -> Tensor:  # attention and MLP read the same norm, so each is given its own behind it
            if place not in given.read:
                return value
            with torch.no_grad():
                normed: Tensor = norm.forward(given.read[place])
            return normed

        with _before(norm, record), _before(model.module(layer, part), read):
            yield

    def _reading(self, place: tuple[str, int], given: Given, seen: Seen) -> Callable[[Tensor], Tensor]:
        def read(value: Tensor) -> Tensor:
            seen.read.setdefault(place, value)  # a norm that a hook calls by hand comes later
            return given.read.get(place, value)

        return read

    def _port_hook(self, layer: int, path: str, norm: nn.Module | None, ports: dict[str, Tensor]) -> Any:
        """A hook on a projection, or on the norm of all heads behind it, that gives what it makes of other streams."""
        model = self.engine.model
        found = model.map.ports(layer)

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for port, stream in ports.items():
                projection = found[PORTS.index(port)]
                if projection.module == path:
                    new = model.hf.get_submodule(path).forward(read(model, layer, "attention", stream))
                    columns = columns_of(projection)
                    out[..., columns] = (norm.forward(new) if module is norm else new)[..., columns]
            return out

        return hook


def _gives(node: Node, seen: Seen) -> Tensor:
    """What a sender gave in a run: a head's output, an MLP's, or the embedding."""
    if node == INPUT:
        assert seen.embedding is not None
        return seen.embedding
    return seen.z[node.layer][..., node.head, :] if node.kind is Kind.HEAD else seen.outs[node]


def _passed(seen: Seen, *_: Any) -> None:
    seen.is_behind = True


def _part(node: Node) -> Part:
    return "mlp" if node.kind is Kind.MLP else "attention"


def _place(node: Node) -> tuple[str, int]:
    return ("logits", 0) if node == LOGITS else (_READERS[_part(node)], node.layer)


@contextmanager
def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context a module is given a changed input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: change(kwargs[first])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
