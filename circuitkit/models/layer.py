"""Layer: one layer of a model in the middle of a pass, whose sites can be read, replaced and skipped."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.models.columns import by_module, together
from circuitkit.models.model_map import Addend, Block, ModelMap, Projection, put, taken

Resid = Float[Tensor, "row pos d_model"]
Heads = Float[Tensor, "row pos head d_head"]
KeyValueHeads = Float[Tensor, "row pos kv_head d_head"]
Projections = tuple[Heads, KeyValueHeads, KeyValueHeads]
"""Queries, keys and values of a layer as the projections give them; keys and values have one slice a key/value head."""

Find = Callable[[str], Any]
"""Gives what stands for a module in a pass, by the module's path."""


class Sites(ABC):  # noqa: B024  what the two seams of Layer share
    """Sites whose values are handed out as they are, or as copies where the model changes them in place afterwards."""

    copies: bool = False

    def _kept(self, value: Resid) -> Resid:
        return value.clone() if self.copies else value


class AttentionSites(Sites):
    """The sites of a layer's attention, or of the mixer in its place. Where a block has none they are not to be touched."""

    def __init__(self, block: Block, find: Find) -> None:
        addend, heads = block.attention, block.heads
        self._attention_addend = addend
        self._attention: Any = None if addend is None else find(addend.module)
        self._attention_post_norm: Any = None if addend is None or addend.post_norm is None else find(addend.post_norm)
        self._out_proj: Any = None if heads is None else find(heads.out_proj)
        self._n_heads = 0 if heads is None else heads.n_heads
        ports = () if heads is None or heads.ports is None else heads.ports
        # What makes them, one behind the other, and which of the three.
        self._projections: list[tuple[list[Any], tuple[Projection, ...], tuple[int, ...]]] = []
        for path, places in by_module(ports).items():
            served = tuple(ports[place] for place in places)
            norm = served[0].norm
            self._projections.append(([find(path)] if norm is None else [find(path), find(norm)], served, places))

    @property
    def z(self) -> Heads:
        """Output of every head, before the output projection."""
        return self._out_proj.input.unflatten(-1, (self._n_heads, -1))

    @z.setter
    def z(self, value: Heads) -> None:
        self._out_proj.input = value.flatten(-2)

    @property
    def projections_in(self) -> Resid:
        """What the projections to queries, keys and values read."""
        return self._projections[0][0][0].input

    @property
    def attention_out(self) -> Resid:
        """What the attention or mixer gives: what it adds to the residual stream, or what the norm reads that lies behind it."""
        return self._kept(_addend(self._attention_addend).of(self._attention.output))

    @attention_out.setter
    def attention_out(self, value: Resid) -> None:
        addend = _addend(self._attention_addend)
        self._attention.output = value if addend.item is None else addend.within(self._attention.output, value)

    @property
    def attention_added(self) -> Resid:
        """What the attention adds to the residual stream, behind a norm that lies there."""
        return self.attention_out if self._attention_post_norm is None else self._attention_post_norm.output

    @attention_added.setter
    def attention_added(self, value: Resid) -> None:
        if self._attention_post_norm is None:
            self.attention_out = value
        else:
            self._attention_post_norm.output = value

    @property
    def pattern(self) -> Float[Tensor, "row head query key"]:
        """What each head looks at. Only eager attention has it; ``models.attention.attention_patterns`` sees to that."""
        return self._attention.output[1]

    def skip_projections(self, projections: Projections) -> None:
        """Does not compute queries, keys and values; these are used instead, behind norms of all heads together where there are some."""
        for envoys, served, places in self._projections:
            value = together(served, [projections[place] for place in places])
            for envoy in envoys:
                envoy.skip(value)

    def skip_out_proj(self, out: Resid) -> None:
        """Does not compute the output projection; ``out`` is what it would give."""
        self._out_proj.skip(out)

    def skip_attention(self, out: Resid) -> None:
        """Does not compute the attention or mixer; ``out`` is what it would give. ``attention_added`` is seen then only behind a norm."""
        self._attention.skip(_addend(self._attention_addend).alone(out.clone()))  # some models add to it in place


class MlpSites(Sites):
    """The sites of a layer's MLP, or of its routed experts as a whole. Where a block has none they are not to be touched."""

    def __init__(self, block: Block, find: Find) -> None:
        addend = block.mlp
        self._mlp_addend = addend
        self._mlp: Any = None if addend is None else find(addend.module)
        self._mlp_post_norm: Any = None if addend is None or addend.post_norm is None else find(addend.post_norm)
        self._mlp_norm: Any = None if addend is None else find(addend.norm or addend.module)
        self._mlp_out_proj: Any = None if block.neurons is None else find(block.neurons)

    @property
    def mlp_norm_in(self) -> Resid:
        """What the norm before the MLP reads, or the MLP itself where it has none: the residual stream at this point."""
        return self._mlp_norm.input

    @mlp_norm_in.setter
    def mlp_norm_in(self, value: Resid) -> None:
        self._mlp_norm.input = value

    @property
    def mlp_in(self) -> Resid:
        """What the MLP reads, after its norm."""
        return self._mlp.input

    @mlp_in.setter
    def mlp_in(self, value: Resid) -> None:
        self._mlp.input = value

    @property
    def mlp_act(self) -> Float[Tensor, "row pos d_mlp"]:
        """The neurons' activations: what the MLP's output projection reads."""
        return self._mlp_out_proj.input

    @mlp_act.setter
    def mlp_act(self, value: Float[Tensor, "row pos d_mlp"]) -> None:
        self._mlp_out_proj.input = value

    @property
    def mlp_out(self) -> Resid:
        """What the MLP gives: what it adds to the residual stream, or what the norm reads that lies behind it."""
        return self._kept(_addend(self._mlp_addend).of(self._mlp.output))

    @mlp_out.setter
    def mlp_out(self, value: Resid) -> None:
        addend = _addend(self._mlp_addend)
        self._mlp.output = value if addend.item is None else addend.within(self._mlp.output, value)

    @property
    def mlp_added(self) -> Resid:
        """What the MLP adds to the residual stream, behind a norm that lies there."""
        return self.mlp_out if self._mlp_post_norm is None else self._mlp_post_norm.output

    @mlp_added.setter
    def mlp_added(self, value: Resid) -> None:
        if self._mlp_post_norm is None:
            self.mlp_out = value
        else:
            self._mlp_post_norm.output = value

    def skip_mlp(self, out: Resid) -> None:
        """Does not compute the MLP; ``out`` is what it would give."""
        self._mlp.skip(_addend(self._mlp_addend).alone(out.clone()))  # some models add to it in place


class Layer(AttentionSites, MlpSites):
    """One layer of a model in the middle of a pass. Final.

    Args:
        index: Which layer, from 0.
        block: Where its parts are.
        find: Gives what stands for a module in a pass, by the module's path.
        copies: Whether what modules give is handed out as a copy.

    Attributes:
        index, block, copies: As given.
    """

    def __init__(self, index: int, block: Block, find: Find, copies: bool = False) -> None:
        self.copies = copies
        AttentionSites.__init__(self, block, find)
        MlpSites.__init__(self, block, find)
        self.index = index
        self.block = block
        self._block = find(block.module)

    @property
    def resid(self) -> Resid:
        """What enters the layer."""
        return self._block.input

    @resid.setter
    def resid(self, value: Resid) -> None:
        self._block.input = value

    @property
    def out(self) -> Resid:
        """What leaves the layer: the residual stream behind it."""
        return taken(self._block.output, self.block.item)

    @out.setter
    def out(self, value: Resid) -> None:
        self._block.output = value if self.block.item is None else put(self._block.output, self.block.item, value)

    def skip(self, resid: Resid) -> None:
        """Does not compute the layer; ``resid`` leaves it."""
        self._block.skip(self.block.alone(resid))


@dataclass(frozen=True)
class Traced:
    """What stands for a model's modules in a pass, looked up once. Final.

    Attributes:
        layers: Its layers.
        unembed: Its unembedding.
    """

    layers: tuple[Layer, ...]
    unembed: Any

    @classmethod
    def of(cls, envoy: Any, hf: nn.Module, model_map: ModelMap) -> Traced:
        """Looks them up by module and not by name: names that nnsight takes for itself make no difference."""
        envoys = {id(each._module): each for each in envoy.modules()}

        def find(path: str) -> Any:
            return envoys[id(hf.get_submodule(path))]

        layers = tuple(Layer(index, block, find, model_map.in_place) for index, block in enumerate(model_map.blocks))
        return cls(layers, find(model_map.unembed))


def _addend(addend: Addend | None) -> Addend:
    assert addend is not None, "the block has no such part"
    return addend
