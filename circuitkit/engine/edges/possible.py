"""Which models have edges: those whose every part reads and writes one residual stream in a way that the map spells out."""

from __future__ import annotations

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel


def check_streams(model: HookedModel, what: str) -> None:
    """Refuses a model between whose parts there are no edges that could be scored.

    Args:
        model: The model.
        what: What is wanted, as the subject of a sentence.

    Raises:
        ModelError: It is one; the text says where and why.
    """
    if model.map.no_edges:
        raise ModelError(
            f"{what} need parts that read and write one residual stream, but in {model.name} ({model.map.family}) {model.map.no_edges}. "
            "Search nodes in it, or take another model."
        )
    first = model.map.heads
    for layer, block in enumerate(model.map.blocks):
        why = None
        if block.heads is None:
            why = "has a mixer in the place of attention heads" if block.is_mixer else "has no attention"
        elif block.heads.ports is None:
            why = "makes queries, keys and values in another way than by projections of what its attention reads"
        elif block.mlp is None:
            why = "has no MLP"
        elif first is not None and (block.heads.n_kv_heads, block.heads.d_head) != (first.n_kv_heads, first.d_head):
            why = "has keys and values of another number or width than the first one"
        elif any(addend.scale != 1 for addend in block.addends):
            why = "multiplies what its parts add"
        elif block.parallel != model.map.blocks[0].parallel:
            why = "is not built as the first one: in one of them MLP and attention read the same, in the other one after the other"
        if why is not None:
            raise ModelError(
                f"{what} need a model each of whose layers has heads and an MLP that read and write the residual stream one by one, and "
                f"layer {layer} of {model.name} ({model.map.family}) {why}. Search nodes in it, or take another model."
            )
