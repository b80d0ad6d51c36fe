"""Compares circuits: their sizes, the overlap of each pair, and what all of them share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from operator import and_
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError


def run(config: DictConfig) -> None:
    """Loads the circuit files and compares them; with ``dir`` set the result is written there too."""
    if isinstance(config.circuits, str) or len(config.circuits) < 2:
        raise ConfigError(f"circuits must be a list of at least two circuit files, such as [a.json,b.json]; found {config.circuits}.")
    circuits = by_label([Path(path) for path in config.circuits])
    show(circuits, write(circuits, Path(config.dir)) if config.dir else None)


def by_label(paths: list[Path]) -> dict[str, Circuit]:
    """Loads circuits under short names: the file's own, its folder's, or the whole path, whichever tells them apart."""
    for label in (lambda path: path.stem, lambda path: path.absolute().parent.name, str):
        labels = [label(path) for path in paths]
        if len(set(labels)) == len(paths):
            return {label: Circuit.load(path) for label, path in zip(labels, paths, strict=True)}
    raise ConfigError(f"circuits names a file twice: {', '.join(map(str, paths))}. Name each file once.")


def overlap(circuits: Mapping[str, Circuit]) -> dict[str, Any]:
    """Sizes, pairwise overlap and shared members, as plain values."""
    return {
        "circuits": {
            label: {"model": each.model, "heads": len(each.heads), "mlps": len(each.mlps), "score": each.score, "nodes": list(each.names)}
            for label, each in circuits.items()
        },
        "pairs": [
            {"a": a, "b": b, "shared": len(circuits[a] & circuits[b]), "jaccard": circuits[a].jaccard(circuits[b])}
            for a, b in combinations(circuits, 2)
        ],
        "shared_by_all": list(reduce(and_, circuits.values()).names),
    }


def write(circuits: Mapping[str, Circuit], folder: Path) -> Path:
    """Writes the comparison as ``compare.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compare.json"
    path.write_text(json.dumps(overlap(circuits), indent=2) + "\n", encoding="utf-8")
    return path


def show(circuits: Mapping[str, Circuit], path: Path | None = None) -> None:
    """Prints the comparison."""
    found = overlap(circuits)
    sizes = Table("circuit", "model", "heads", "MLPs", "score", "members", box=None, pad_edge=False)
    for label, each in found["circuits"].items():
        score = "" if each["score"] is None else f"{each['score']:.1f} %"
        sizes.add_row(label, each["model"], str(each["heads"]), str(each["mlps"]), score, " ".join(each["nodes"]))
    pairs = Table("pair", "shared", "Jaccard", box=None, pad_edge=False)
    for pair in found["pairs"]:
        pairs.add_row(f"{pair['a']} & {pair['b']}", str(pair["shared"]), f"{pair['jaccard']:.2f}")
    console = Console(highlight=False)
    console.print(sizes, "", pairs, "", f"shared by all: {' '.join(found['shared_by_all']) or 'nothing'}", sep="\n")
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)
