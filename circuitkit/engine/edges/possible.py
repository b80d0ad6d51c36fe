"""Which models have edges: those whose every part reads and writes one residual stream in a way that the map spells out."""

from __future__ import annotations

from circuitkit.core.errors import ModelError
from circuitkit.models.hooked import HookedModel
from circuitkit.models.linear import check_sums


def check_streams(model: HookedModel, what: str) -> None:
    """Refuses a model between whose parts there are no edges that could be scored.

    Args:
        model: The model.
        what: What is wanted, as the subject of a sentence.

    Raises:
        ModelError: It is one; the text says where and why.
    """
    check_sums(model, what)
    if not model.map.additive:
        raise ModelError(
            f"{what} need a residual stream that is the sum of what the parts add, but in {model.name} ({model.map.family}) each sum "
            "passes through a norm before the next part is added. Search nodes in it, or take another model."
        )
    for layer, block in enumerate(model.map.blocks):
        why = None
        if block.heads is None:
            why = "has a mixer in the place of attention heads" if block.is_mixer else "has no attention"
        elif block.heads.ports is None:
            why = "makes queries, keys and values in another way than by projections of what its attention reads"
        elif block.mlp is None:
            why = "has no MLP"
        elif any(addend.scale != 1 for addend in block.addends):
            why = "multiplies what its parts add"
        elif block.parallel != model.map.blocks[0].parallel:
            why = "is not built as the first one: in one of them MLP and attention read the same, in the other one after the other"
        if why is not None:
            raise ModelError(
                f"{what} need a model each of whose layers has heads and an MLP that read and write the residual stream one by one, and "
                f"layer {layer} of {model.name} ({model.map.family}) {why}. Search nodes in it, or take another model."
            )
