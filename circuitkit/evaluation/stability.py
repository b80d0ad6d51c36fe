"""Which components a search finds again when its corruption, seed, order or threshold changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import or_
from typing import Any

from circuitkit.core.bodies import EdgeShares, Share, Stability, StabilityRun
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError
from circuitkit.core.findings import Finding

FACTORS = ("corruption", "seed", "order", "threshold")


@dataclass(frozen=True)
class SearchRun:
    """A circuit with what its search was run with.

    Attributes:
        circuit: What was found.
        corruption: Name of the corruption; None, as for the others, where the search has no such setting.
        seed: Of the prompts.
        order: Direction of the first sweep.
        threshold: Share of the score that had to be left.
    """

    circuit: Circuit
    corruption: str | None = None
    seed: int | None = None
    order: str | None = None
    threshold: float | None = None

    @property
    def label(self) -> str:
        """Its settings as a short name, which can be that of a folder."""
        seed = None if self.seed is None else f"seed{self.seed}"
        threshold = None if self.threshold is None else f"{self.threshold:g}"
        return "-".join(part for part in (self.corruption, seed, self.order, threshold) if part is not None) or "run"

    def setting(self, *factors: str) -> tuple[Any, ...]:
        """The values of these factors."""
        return tuple(getattr(self, factor) for factor in factors)


def stability(runs: Sequence[SearchRun], *, task: str = "", provenance: Mapping[str, Any] | None = None) -> Finding[Stability]:
    """What the runs have in common.

    ``survive_all`` are the members of every run (nodes, or the edges of circuits of edges); ``survive_corruptions`` those of every run that
    differs from the first one in its corruption alone. ``mean_jaccard`` is over the pairs that differ in just that factor, and over all
    pairs; null where there is no such pair.

    Args:
        runs: The first one holds the reference settings.
        task: Name of the task, for people.
        provenance: Settings, versions and hashes to keep with the result.

    Returns:
        A finding of kind ``stability``.

    Raises:
        ConfigError: No runs, or two with the same settings.
        CircuitError: Circuits of different models or levels.
    """
    labels = [run.label for run in runs]
    if not runs or len(set(labels)) < len(labels):
        raise ConfigError(f"Expected at least one run, each with settings of its own; found {', '.join(labels) or 'none'}.")
    first = runs[0].circuit
    every = reduce(or_, (run.circuit for run in runs))
    found = [set(run.circuit.member_names) for run in runs]
    edges: EdgeShares = {"edges": _shares(map(str, every.edges), found)} if first.level.of_edges else {}
    body: Stability = {
        "task": task,
        "model": first.model,
        "runs": [_row(run) for run in runs],
        "nodes": _shares(every.names, [set(run.circuit.names) for run in runs]),
        **edges,
        "survive_all": [name for name in every.member_names if all(name in names for names in found)],
        "survive_corruptions": _survivors(runs, every.member_names, "corruption"),
        "mean_jaccard": {
            "all": _mean_jaccard(runs, lambda a, b: True),
            **{factor: _mean_jaccard(runs, _only(factor)) for factor in FACTORS},
        },
    }
    title = f"What the circuits of {len(runs)} searches for {task or 'the task'} have in common"
    return Finding("stability", title, body, provenance or {})


def _row(run: SearchRun) -> StabilityRun:
    row: StabilityRun = {
        "label": run.label,
        "corruption": run.corruption,
        "seed": run.seed,
        "order": run.order,
        "threshold": run.threshold,
        "score": run.circuit.score,
        "nodes": list(run.circuit.names),
    }
    if run.circuit.level.of_edges:
        row["edges"] = run.circuit.member_names
    return row


def _shares(names: Iterable[str], found: Sequence[set[str]]) -> dict[str, Share]:
    """Which share of the runs has each of these."""
    return {name: {"share": sum(name in each for each in found) / len(found)} for name in names}


def _survivors(runs: Sequence[SearchRun], every: Sequence[str], factor: str) -> list[str]:
    others = [name for name in FACTORS if name != factor]
    kept = [set(run.circuit.member_names) for run in runs if run.setting(*others) == runs[0].setting(*others)]
    return [node for node in every if all(node in names for names in kept)]


def _only(factor: str) -> Callable[[SearchRun, SearchRun], bool]:
    """Whether two runs differ in this factor and in no other."""
    return lambda a, b: [name for name in FACTORS if a.setting(name) != b.setting(name)] == [factor]


def _mean_jaccard(runs: Sequence[SearchRun], chosen: Callable[[SearchRun, SearchRun], bool]) -> float | None:
    found = [a.circuit.jaccard(b.circuit) for a, b in combinations(runs, 2) if chosen(a, b)]
    return sum(found) / len(found) if found else None
