"""A circuit's forward pass layer by layer, so that a reader of the residual stream can be given another stream than its neighbours.

Inside one pass of a transformers model all heads of a layer read the same. Here attention alone runs in the model (through nnsight, with
queries, keys and values given), and norms, projections, MLPs and sums are applied between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.core.node import Kind
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.replacements import Replacements
from circuitkit.models import blocks
from circuitkit.models.blocks import Part
from circuitkit.models.hooked import Heads, HookedModel, Layer, Projections, Resid


@dataclass
class States:
    """What flows in a circuit for some prompts, a list entry per layer.

    Attributes:
        resid: What enters the layers.
        projections: Their queries, keys and values; None where no member of the circuit reads them.
        z: What their heads give, after replacement.
        mid: What the norms before the MLPs read, or the MLPs themselves where there are none.
        mlp: What the MLPs give, after replacement, before any norm behind them.
        final: What the final norm reads.
    """

    resid: list[Resid] = field(default_factory=list)
    projections: list[Projections | None] = field(default_factory=list)
    z: list[Heads] = field(default_factory=list)
    mid: list[Resid] = field(default_factory=list)
    mlp: list[Resid] = field(default_factory=list)
    final: Resid | None = None


class CircuitLayers:
    """The layers of a model in which only a circuit's members compute and the others are replaced. Rows are copies x prompts. Final.

    Args:
        model: The model.
        mask: The circuit.
        replacements: For everything else.
        prompts: On which it runs.
        skip: Whether replaced modules may be left uncomputed.

    Attributes:
        model: The model.
        heads: For each layer, which heads are members.
        mlps: For each layer, whether its MLP is a member.
    """

    def __init__(
        self, model: HookedModel, mask: Bool[Tensor, " node"], replacements: Replacements, prompts: PromptSet, *, skip: bool
    ) -> None:
        self.model = model
        members = model.universe.members(mask)
        layers = range(model.n_layers)
        self.heads = [[node.head for node in members if node.kind is Kind.HEAD and node.layer == layer] for layer in layers]
        self.mlps = [any(node.kind is Kind.MLP and node.layer == layer for node in members) for layer in layers]
        self._replacements = replacements
        self._prompts = prompts
        self.skip = skip

    def states(self, ids: Tensor, rows: slice) -> States:
        """Everything that flows in the circuit when it reads these tokens in the place of some prompts."""
        found = States()
        resid = self.model.embed(ids, **self._prompts.padding(rows))
        for layer in range(self.model.n_layers):
            resid = resid.to(self.model.device_of(layer))
            projections = self.projections(layer, resid)
            z = self.z(layer, projections, rows, len(resid))
            mid, attention = self.mid(layer, resid, z)
            mlp = self.mlp(layer, mid, rows)
            for part, value in (("resid", resid), ("projections", projections), ("z", z), ("mid", mid), ("mlp", mlp)):
                getattr(found, part).append(value)
            resid = self.summed(resid, attention, self.added(layer, "mlp", mlp))
        found.final = resid
        return found

    def logits(self, layer: int, resid: Resid, rows: slice, z: Heads | None = None) -> Float[Tensor, "row *step d_vocab"]:
        """Logits at the last position, float32, when ``resid`` enters a layer.

        Args:
            layer: The first layer to compute; the number of layers for none.
            resid: What enters it.
            rows: The prompts.
            z: What the heads of that layer give; None to compute it.
        """
        n_kept = self._prompts.n_kept
        for index in range(layer, self.model.n_layers):
            resid = resid.to(self.model.device_of(index))
            z = self.z(index, self.projections(index, resid), rows, len(resid)) if z is None else z
            if index == self.model.n_layers - 1 and self.skip:  # later positions read earlier ones through attention alone
                resid, z = resid[:, -n_kept:], z[:, -n_kept:]
            mid, attention = self.mid(index, resid, z)
            resid = self.summed(resid, attention, self.added(index, "mlp", self.mlp(index, mid, rows)))
            z = None
        return self._prompts.scored(self.model.unembed(resid[:, -n_kept:]), rows)

    def projections(self, layer: int, resid: Resid) -> Projections | None:
        """Queries, keys and values; None where nobody needs them."""
        return self.model.queries_keys_values(layer, resid) if self.heads[layer] or not self.skip else None

    def z(self, layer: int, projections: Projections | None, rows: slice, n_rows: int) -> Heads:
        """What the heads of a layer give, after replacement."""
        if projections is None:
            value = self._replacements.heads(layer, None, rows)
            return value.repeat(n_rows // len(value), 1, 1, 1)
        return self.replaced(layer, self.attend(layer, projections, rows), rows)

    def attend(self, layer: int, projections: Projections, rows: slice) -> Heads:
        """What the heads of a layer make of queries, keys and values of some prompts."""
        seen: list[Heads] = []

        def visit(site: Layer) -> None:
            site.skip_projections(projections)
            seen.append(site.z)

        n_rows, n_pos = projections[0].shape[:2]
        blank = projections[0].new_zeros(()).expand(n_rows, n_pos, self.model.d_model)
        ids = torch.zeros(n_rows, n_pos, dtype=torch.long, device=self.model.device)
        inputs = {"attention_mask": torch.ones_like(ids)} | self._prompts.padding(rows, n_rows // (rows.stop - rows.start))
        self.model.run(ids, visit, start=layer, resid=blank, stop=layer, **inputs)
        return seen[0]

    def replaced(self, layer: int, z: Heads, rows: slice) -> Heads:
        """Heads' outputs with those replaced that are no members."""
        n_prompts = rows.stop - rows.start
        if len(self.heads[layer]) == self.model.n_heads:
            return z
        keep = torch.zeros(self.model.n_heads, 1, dtype=torch.bool)
        keep[self.heads[layer]] = True
        z = z.unflatten(0, (-1, n_prompts))
        return torch.where(keep.to(z.device), z, self._replacements.heads(layer, z, rows).to(z.device)).flatten(0, 1)

    def mid(self, layer: int, resid: Resid, z: Heads) -> tuple[Resid, Resid]:
        """The residual stream that the MLP reads, and what the attention adds to it."""
        attention = self.added(layer, "attention", self.model.project(layer, z))
        return (resid if self.model.map.is_parallel else resid + attention), attention

    def mlp(self, layer: int, mid: Resid, rows: slice) -> Resid:
        """What the MLP of a layer gives, after replacement."""
        if self.mlps[layer]:
            return self.model.mlp_from(layer, mid)
        shape = (-1, rows.stop - rows.start)
        out = None if self.skip else self.model.mlp_from(layer, mid).unflatten(0, shape)
        value = self._replacements.mlp(layer, out, rows)[..., -mid.shape[1] :, :].to(mid.device)
        return value.expand(mid.unflatten(0, shape).shape).flatten(0, 1)

    def summed(self, resid: Resid, attention: Resid, mlp: Resid) -> Resid:
        """What leaves a layer, summed in the order in which transformers does."""
        return mlp + attention + resid if self.model.map.is_parallel else resid + attention + mlp

    def given(self, layer: int, kind: Kind, act: Heads | Resid) -> Resid:
        """What the attention gives of its heads' outputs, or an MLP as it is: before any norm behind them."""
        return self.model.project(layer, act) if kind is Kind.HEAD else act

    def is_normed(self, layer: int, part: Part) -> bool:
        """Whether a norm lies between what attention or MLP give and the residual stream."""
        return blocks.norm_behind(self.model, layer, part) is not None

    def added(self, layer: int, part: Part, out: Resid) -> Resid:
        """What attention or MLP add to the residual stream where they give ``out``."""
        with torch.no_grad():
            return blocks.added(self.model, layer, part, out)

    def share(self, layer: int, head: int, z: Float[Tensor, "row pos d_head"]) -> Resid:
        """What one head gives, without the bias, in float32."""
        alone = z.new_zeros(*z.shape[:-1], self.model.n_heads, z.shape[-1])
        bias = self.model.project(layer, alone[:1, :1]).float()
        alone[..., head, :] = z
        return self.model.project(layer, alone).float() - bias
