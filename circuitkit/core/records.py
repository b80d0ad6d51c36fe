"""Values that pass from the runner to callbacks and loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One evaluated candidate of a search.

    Attributes:
        sweep: Which pass over the nodes, from 0; its direction in ``direction``.
        order: Running number of the evaluation, from 0.
        node: Name of the candidate.
        score: Performance in % with the candidate removed (pruning), or of the drawn set.
        kept: Whether the candidate stays in the circuit.
        size: Number of nodes in the circuit after the decision.
        direction: Such as ``backward``, ``forward``, ``single`` or ``draw``.
        total: How many evaluations this sweep has at most, for progress bars.
    """

    sweep: int
    order: int
    node: str
    score: float
    kept: bool
    size: int
    direction: str = ""
    total: int = 0

    def row(self) -> dict[str, Any]:
        """The step as a row of the scores table."""
        row = asdict(self)
        del row["total"]
        return row

    def metrics(self) -> dict[str, float | int | str | bool]:
        """The step as numbers to log."""
        return {
            "step/score": self.score,
            "step/size": self.size,
            "step/node": self.node,
            "step/kept": self.kept,
            "step/sweep": self.sweep,
        }


@dataclass(frozen=True)
class RunInfo:
    """What a run is about, known before anything is computed.

    Attributes:
        name: Short name, such as ``months-tiny_gpt2-iterative_pruning``.
        settings: Every setting, nested, plain values only.
        provenance: Seed, versions, model revision and hashes.
        content_hash: Hash of settings, code version, prompts and weights: equal hash, equal result.
        n_prompts: Prompts that passed the filter.
        n_nodes: Units of the universe.
    """

    name: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    content_hash: str
    n_prompts: int
    n_nodes: int


@dataclass(frozen=True)
class TextArtifact:
    """A file of text that a run leaves, such as ``circuit.json``."""

    name: str
    text: str
    kind: str = "circuit"


@dataclass(frozen=True)
class TableArtifact:
    """A table that a run leaves, such as ``scores``: a row a mapping, all with the same keys."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    kind: str = "table"


@dataclass(frozen=True)
class FigureArtifact(TextArtifact):
    """A figure: as text, which any logger can keep as a file, and as it is for those that can show it.

    Attributes:
        figure: A plotly figure, whose type is known only to those who draw.
    """

    kind: str = "figure"
    figure: Any = None


Artifact = TextArtifact | TableArtifact
