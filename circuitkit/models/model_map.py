"""ModelMap: where the parts of a model are, as ``models.resolve`` finds them by value or as a user gives them by hand.

Paths are dotted names of modules from the model's root, as in ``named_modules``. A map holds no tensor and no module, so that it can be
kept in a file and read by eye; ``job=doctor`` prints it as a tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from circuitkit.core.errors import ModelError

Part = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Projection:
    """A linear map whose output holds the queries, keys or values of every head, each in columns that lie side by side. Final.

    Attributes:
        module: Its path. Queries, keys and values share one where the projections are fused.
        starts: For each head (of keys and values: each key/value head) its first column in the module's output.
        width: How many columns a head has.
        norm: The norm of all heads together behind it (OLMo 2), through which what each head takes depends on all; None where there is
            none, or one of each head alone. What it gives lies in the same columns.
    """

    module: str
    starts: tuple[int, ...]
    width: int
    norm: str | None = None

    @property
    def n_heads(self) -> int:
        """How many heads it serves."""
        return len(self.starts)

    @property
    def is_whole(self) -> bool:
        """Whether the heads lie one behind the other from column 0 on; then the output is split by ``unflatten``, else by columns."""
        return self.starts == tuple(range(0, len(self.starts) * self.width, self.width))


@dataclass(frozen=True)
class Addend:
    """What one part of a block adds to the residual stream. Final.

    Attributes:
        module: The part as a whole (attention, mixer, MLP, routed experts): left out in passes that replace its output.
        item: Which of the outputs that the module returns it is; None where the module returns a tensor.
        n_items: How many outputs the module returns; None where it is a tensor.
        norm: The norm between the residual stream and what the part reads; None where it reads the raw stream.
        post_norm: The norm behind the part, whose output is what is added; None where the part's own output is.
        scale: By what the addend is multiplied on its way (residual multiplier).
        whole: Whether the module gives the addend for what the part reads, so that an MLP can run by itself. Else it is only the last
            projection of the part: because the part adds the residual stream by itself (BLOOM, BERT), or has more inputs.
        listed: Whether the module returns its outputs as a list and not as a tuple.
    """

    module: str
    item: int | None = None
    n_items: int | None = None
    norm: str | None = None
    post_norm: str | None = None
    scale: float = 1.0
    whole: bool = True
    listed: bool = False

    def of(self, output: Any) -> Any:
        """Of what the module returns what is added."""
        return taken(output, self.item)

    def within(self, output: Any, value: Any) -> Any:
        """What the module returns, with another addend."""
        return put(output, self.item, value)

    def alone(self, value: Any) -> Any:
        """What stands in for the module's output where it was not computed: the addend, and None for all else that it returns."""
        outputs = alone(value, self.item, self.n_items)
        return list(outputs) if self.listed else outputs


@dataclass(frozen=True)
class Heads:
    """How the heads of an attention lie. Final.

    Attributes:
        out_proj: The output projection; its input is z, the heads' outputs side by side (behind their gate, where a model has one).
        n_heads: Number of query heads.
        n_kv_heads: Number of key/value heads.
        d_head: Width of a head's queries and keys.
        d_value: Width of a head's values, and of its part of z.
        queries, keys, values: Where they are made, before rotary embedding; None where they are no plain projection of what the attention
            reads (multi-head latent attention), so that units and edges at single ports are refused.
        pattern: Whether the attention function gives the pattern (softmax attention through transformers' attention interface).
        gated: Whether each head's output is multiplied by a gate that reads what the attention reads: besides queries, keys and values a
            fourth input, which no port stands for.
    """

    out_proj: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    queries: Projection | None = None
    keys: Projection | None = None
    values: Projection | None = None
    pattern: bool = True
    gated: bool = False

    @property
    def has_ports(self) -> bool:
        """Whether all that a head reads goes through queries, keys and values that are known one by one."""
        return self.ports is not None and not self.gated

    @property
    def ports(self) -> tuple[Projection, Projection, Projection] | None:
        """Queries, keys and values, where all three are known."""
        found = (self.queries, self.keys, self.values)
        return None if any(port is None for port in found) else found  # type: ignore[return-value]


@dataclass(frozen=True)
class Block:
    """One layer. Final.

    Attributes:
        module: Its path.
        attention: What its attention adds, or its mixer where it has no attention (state space, convolution); None where it has neither.
        heads: The heads of the attention; None for a mixer, which is one node.
        mlp: What its MLP or routed experts add; None where it has none.
        neurons: The MLP's output projection, whose input is the neurons' activations; None for routed experts.
        parallel: Whether attention and MLP both read what enters the block.
        item: Which of the outputs of the block is the residual stream; None where it returns a tensor.
        n_items: How many outputs the block returns; None where it is a tensor.
    """

    module: str
    attention: Addend | None
    heads: Heads | None
    mlp: Addend | None
    neurons: str | None = None
    parallel: bool = False
    item: int | None = None
    n_items: int | None = None

    @property
    def shares_norm(self) -> bool:
        """Whether attention and MLP read what the same norm gives."""
        return self.attention is not None and self.mlp is not None and self.mlp.norm is not None and self.attention.norm == self.mlp.norm

    @property
    def is_mixer(self) -> bool:
        """Whether it mixes positions without attention heads: what it adds is one node."""
        return self.attention is not None and self.heads is None

    def alone(self, resid: Any) -> Any:
        """What stands in for the block's output where it was not computed: the residual stream, and None for all else."""
        return alone(resid, self.item, self.n_items)

    def part(self, name: Part) -> Addend | None:
        """Its attention or mixer, or its MLP."""
        return self.attention if name == "attention" else self.mlp

    @property
    def addends(self) -> Iterator[Addend]:
        """What the block adds, in the order of computation."""
        return (addend for addend in (self.attention, self.mlp) if addend is not None)


@dataclass(frozen=True)
class Evidence:
    """One check of a map. Final.

    Attributes:
        name: What was compared.
        where: The block or part.
        error: The largest difference, relative to the spread of what was expected; 0 is bitwise equal.
    """

    name: str
    where: str
    error: float


@dataclass(frozen=True)
class ModelMap:
    """Where the parts of a model are. Final.

    Attributes:
        family: The type of the model (``model_type`` of its configuration), or the class of a user's own module.
        blocks: The layers.
        embed: The token embedding.
        final_norm: The norm before the unembedding; None where there is none.
        unembed: The unembedding; its input is what the final norm gives.
        causal: Whether no position reads later ones. Else the causal cone and narrowing to the last position are off.
        forward: Names of arguments of the model's forward that it understands, among ``attention_mask``, ``position_ids``, ``use_cache``,
            ``past_key_values``, ``logits_to_keep``.
        logits: Whether the forward returns an object with ``logits``; else the tensor itself.
        caches: Whether keys and values can be held and handed back (``past_key_values``), with the same numbers.
        interface: Whether attention goes through transformers' attention interface.
        additive: Whether the residual stream is the sum of what the parts add. Else each sum goes through a norm (BERT), so that edges and
            direct logit attribution are not defined.
        direct: Whether the unembedding reads the residual stream or what the final norm makes of it. Else something else is in between (the
            head of a masked language model, another factor), so that the logit lens and direct logit attribution are not defined.
        in_place: Whether the model changes in place what its modules return (Falcon), so that whoever keeps an output keeps a copy.
        override: The entry of the overrides that was needed; empty where everything was found by value.
        evidence: The checks of this map.
    """

    family: str
    blocks: tuple[Block, ...]
    embed: str
    final_norm: str | None
    unembed: str
    causal: bool = True
    forward: frozenset[str] = frozenset({"attention_mask", "position_ids", "use_cache", "past_key_values", "logits_to_keep"})
    logits: bool = True
    caches: bool = True
    interface: bool = True
    additive: bool = True
    direct: bool = True
    in_place: bool = False
    override: str = ""
    evidence: tuple[Evidence, ...] = field(default=(), compare=False)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def paths(self) -> Iterator[str]:
        """Every module that the map names, some of them several times."""
        yield from (path for path in (self.embed, self.final_norm, self.unembed) if path is not None)
        for block in self.blocks:
            yield from (path for path in (block.module, block.neurons) if path is not None)
            for addend in block.addends:
                yield from (path for path in (addend.module, addend.norm, addend.post_norm) if path is not None)
            if block.heads is not None:
                yield block.heads.out_proj
                for port in (block.heads.queries, block.heads.keys, block.heads.values):
                    yield from () if port is None else (path for path in (port.module, port.norm) if path is not None)

    @property
    def layers_with_heads(self) -> tuple[int, ...]:
        """The layers that have attention heads."""
        return tuple(layer for layer, block in enumerate(self.blocks) if block.heads is not None)

    @property
    def layers_with_attention(self) -> tuple[int, ...]:
        """The layers that have attention heads or a mixer."""
        return tuple(layer for layer, block in enumerate(self.blocks) if block.attention is not None)

    @property
    def layers_with_mlps(self) -> tuple[int, ...]:
        """The layers that have an MLP."""
        return tuple(layer for layer, block in enumerate(self.blocks) if block.mlp is not None)

    @property
    def is_parallel(self) -> bool:
        """Whether the MLP of every layer reads what its attention reads."""
        return all(block.parallel for block in self.blocks)

    def ports(self, layer: int) -> tuple[Projection, Projection, Projection]:
        """Where the queries, keys and values of a layer are made.

        Raises:
            ModelError: They are no plain projections of what the attention reads, or the layer has no heads.
        """
        heads = self.blocks[layer].heads
        if heads is None or heads.ports is None:
            why = "it has no attention heads" if heads is None else "they are no plain projections of what the attention reads"
            raise ModelError(
                f"The queries, keys and values of layer {layer} ({self.family}) cannot be told apart: {why}. Expected a layer whose heads "
                "have inputs of their own; take heads and MLPs as units, not what leads into them."
            )
        return heads.ports

    @property
    def heads(self) -> Heads | None:
        """The heads of the first layer that has some: their number is that of every layer with heads."""
        return next((block.heads for block in self.blocks if block.heads is not None), None)


def taken(output: Any, item: int | None) -> Any:
    """One of the outputs of a module, or its only one for None."""
    return output if item is None else output[item]


def put(output: Any, item: int | None, value: Any) -> Any:
    """The outputs of a module with another value in one place, or for None that value alone."""
    if item is None:
        return value
    outputs = (*output[:item], value, *output[item + 1 :])
    return list(outputs) if isinstance(output, list) else outputs


def alone(value: Any, item: int | None, n_items: int | None) -> Any:
    """The outputs of a module of which only one is known: None stands for the others."""
    return value if item is None else tuple(value if place == item else None for place in range(n_items or item + 1))
