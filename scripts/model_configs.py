"""Writes a file of conf/model for every model with a short name, because Hydra wants one each: ``python scripts/model_configs.py``."""

from __future__ import annotations

from circuitkit.config import conf_dir
from circuitkit.models.named import HUB_MODELS, NamedModel

GATED = "Gated: needs its licence accepted on the hub."


def text_of(model: NamedModel) -> str:
    """The file of a model: its first line is what ``circuitkit job=list`` shows."""
    comment = " ".join(filter(None, [model.summary, model.note, GATED if model.gated else ""]))
    return f"# {comment}\ndefaults:\n  - shared/load@_here_\n  - _self_\n\nname: {model.name}\n"


if __name__ == "__main__":
    for each in HUB_MODELS.values():
        (conf_dir() / "model" / f"{each.name}.yaml").write_text(text_of(each), encoding="utf-8")
