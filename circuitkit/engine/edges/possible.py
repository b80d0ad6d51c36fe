"""Which models have edges, and between which of them they are scored fast: there every part can run by itself on a stream of its own."""

from __future__ import annotations

from circuitkit.core.errors import ModelError
from circuitkit.core.node import Level
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import check_sums


def check_streams(model: HookedModel, level: Level) -> None:
    """Refuses a model between whose parts there are no edges that could be scored.

    Raises:
        ModelError: It is one; the text says where and why.
    """
    check_sums(model, "Edges")
    why = _no_edges(model, level)
    if why:
        raise ModelError(
            f"Edges need parts that read and write one residual stream, but in {model.name} ({model.map.family}) {why}. Search nodes in "
            "it, or take another model."
        )


def check_gradients(model: HookedModel) -> None:
    """Refuses a model whose edges have no gradients here.

    Raises:
        ModelError: It is one; the text says where and why.
    """
    shared = (layer for layer, block in enumerate(model.map.blocks) if block.shares_norm)
    heads = next((block.heads for block in model.map.blocks if block.heads is not None), None)
    unequal = "" if heads is None or heads.d_value == heads.d_head else f"values are {heads.d_value} wide and queries {heads.d_head}"
    why = not_fast(model) or unequal or next((f"attention and MLP of layer {layer} read what one norm gives" for layer in shared), "")
    if why:
        raise ModelError(
            "Gradients of edges need a model each of whose layers has heads and an MLP that can run by themselves on what they read, and "
            f"in {model.name} ({model.map.family}) {why}. Take the gradients of nodes, or score edges (method=edge_pruning)."
        )


def not_fast(model: HookedModel) -> str:
    """Why edges of a model are scored by the naive path alone; empty where the fast path does it."""
    if len({block.heads.n_kv_heads for block in model.map.blocks if block.heads is not None}) > 1:
        return "layers have different numbers of key/value heads"
    for layer, block in enumerate(model.map.blocks):
        if block.heads is None:
            return f"layer {layer} has a mixer in the place of attention heads" if block.is_mixer else f"layer {layer} has no attention"
        if block.heads.gated:
            return f"layer {layer} has a gate on its heads that reads what its attention reads"
        if block.heads.ports is None:
            return f"layer {layer} makes queries, keys and values in another way than by projections of what its attention reads"
        if block.mlp is None:
            return f"layer {layer} has no MLP"
        for addend in block.addends:
            if not addend.whole:
                return f"{addend.module} is only the last projection of a part, which cannot run by itself on what it reads"
            if addend.scale != 1:
                return f"layer {layer} multiplies what its parts add"
    return ""


def _no_edges(model: HookedModel, level: Level) -> str:
    if not model.map.additive:
        return "each sum in its residual stream goes through a norm, so that what a part reads is no sum of what others add"
    for layer, block in enumerate(model.map.blocks):
        if block.parallel != model.map.blocks[0].parallel:
            return f"MLP and attention read the same in some layers and not in others, such as layer {layer}"
        if level is Level.EDGE_QKV and block.heads is not None and not block.heads.has_ports:
            return f"not all that the heads of layer {layer} read goes through queries, keys and values of their own (take level=edge)"
        for addend in block.addends:
            if not addend.whole and (addend.norm is None or block.shares_norm):
                return f"{addend.module} is only the last projection of a part, and nothing before it reads for that part alone"
    return ""
