"""Compares circuits: their sizes, the overlap of each pair and whether that is chance, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from circuitkit.core.bodies import Comparison
from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.evaluation import overlap
from circuitkit.jobs import measuring, plan
from circuitkit.jobs.circuit_files import origin, read_listed
from circuitkit.jobs.find import loggers
from circuitkit.jobs.found_with import found_with, warn_of_others
from circuitkit.loggers.dispatch import LoggerGroup
from circuitkit.storage import save, save_finding
from circuitkit.storage.literature import PublishedCircuit, fitted

SHARED = "shared.json"


def run(config: DictConfig) -> None:
    """Loads the circuit files and compares them, and tells the configured loggers; with ``dir`` set the result is written there too."""
    found = read_listed(config.circuits, "circuits", least=2)
    name, n_layers, n_heads = shape(found.values(), config)
    circuits = {label: fitted(each, name, n_layers, n_heads) for label, each in found.items()}
    (first, one), *others = circuits.items()
    for label, each in others:
        warn_of_others(f"Circuit {label}", found_with(each), found_with(one), first)
    with measuring.finalized(LoggerGroup(loggers(config)), config) as group:
        finding = comparison(circuits)
        measuring.start(group, config)
        measuring.leave(group, finding, numbers(finding.body))
    show(circuits, write(circuits, Path(config.dir)) if config.dir else None)


def numbers(body: Comparison) -> dict[str, float]:
    """What a comparison is summed up by: the overlap of each pair, and how much all share."""
    found = {f"compare/jaccard/{pair['a']}-{pair['b']}": pair["jaccard"] for pair in body["pairs"]}
    return found | {"compare/shared_by_all": len(body["shared_by_all"])}


def shape(found: Iterable[Circuit | PublishedCircuit], config: DictConfig) -> tuple[str, int, int]:
    """Name, layers and heads of the model: that of the first file which says so, else the configured one's."""
    for each in found:
        if isinstance(each, Circuit):
            return each.model, each.n_layers, each.n_heads
    model = plan.shape(config)
    return model.name, model.n_layers, model.n_heads


def comparison(circuits: Mapping[str, Circuit]) -> Finding[Comparison]:
    """The comparison, with where the circuits came from."""
    return overlap.compare(circuits, origin(circuits.items()))


def write(circuits: Mapping[str, Circuit], folder: Path) -> Path:
    """Writes the comparison as ``compare.json``, and what all circuits share as a circuit file, ``shared.json``, if they share anything."""
    shared = overlap.shared_by_all(circuits)
    if shared.members:
        save(replace(shared, provenance=origin(circuits.items())), folder / SHARED)
    else:
        (folder / SHARED).unlink(missing_ok=True)  # of an earlier comparison
    return save_finding(comparison(circuits), folder)


def show(circuits: Mapping[str, Circuit], path: Path | None = None) -> None:
    """Prints the comparison.

    Args:
        circuits: By label.
        path: Of ``compare.json``, if it was written.
    """
    body = comparison(circuits).body
    of_edges = "level" in body
    which = "components" if of_edges else "members"
    sizes = Table("circuit", "model", "heads", "MLPs", *(("edges",) if of_edges else ()), "score", which, box=None, pad_edge=False)
    for label, each in body["circuits"].items():
        score = "" if each["score"] is None else f"{each['score']:.1f} %"
        counts = [str(each["heads"]), str(each["mlps"]), *([str(each["n_edges"])] if of_edges else [])]
        sizes.add_row(label, each["model"], *counts, score, " ".join(each["nodes"]))
    pairs = Table("pair", "shared edges" if of_edges else "shared", "Jaccard", "containment", "p by chance", box=None, pad_edge=False)
    for pair in body["pairs"]:
        chance = "" if pair["p_value"] is None else f"{pair['p_value']:.2g}"
        contained = "" if pair["containment"] is None else f"{pair['containment']:.2f}"
        pairs.add_row(f"{pair['a']} & {pair['b']}", str(pair["shared"]), f"{pair['jaccard']:.2f}", contained, chance)
    shared = " ".join(body["shared_by_all"])
    console = Console(highlight=False)
    console.print(sizes, "", pairs, "", f"shared by all: {shared or f'nothing, so there is no {SHARED}'}", sep="\n")
    if path is not None:
        console.print(f"written: {path}{f' {path.with_name(SHARED)}' if shared else ''}", soft_wrap=True)
