"""What a search returns: a Circuit (a set of nodes) or Scores (a number a node), with where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.errors import CircuitError
from circuitkit.core.graph import Graph, Kind, Level, Node

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Circuit:
    """A subset of a model's components, immutable. ``&``, ``|`` and ``-`` are the set operations.

    Attributes:
        nodes: The members, in causal order.
        n_layers: Number of layers of the model.
        n_heads: Number of query heads a layer.
        model: Name of the model, for people; ``provenance`` has its fingerprint.
        score: Performance in %, of the untouched model; None where it was not measured.
        level: How fine the members are.
        provenance: Settings, seed, versions, model revision and hashes of the run that found it.
    """

    nodes: tuple[Node, ...]
    n_layers: int
    n_heads: int
    model: str = ""
    score: float | None = None
    level: Level = Level.NODE
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            head = node.head if node.head is not None else 0
            if node.kind not in (Kind.HEAD, Kind.MLP) or not (0 <= node.layer < self.n_layers and head < self.n_heads):
                raise CircuitError(
                    f"Node {str(node)!r} cannot be in a circuit of a model with {self.n_layers} layers and {self.n_heads} heads a layer."
                )
        ordered = sorted(set(self.nodes), key=_causal)
        object.__setattr__(self, "nodes", tuple(ordered))

    @classmethod
    def of(cls, graph: Graph, mask: Bool[Tensor, "node"], **fields: Any) -> Circuit:
        """The circuit that a mask over a graph stands for."""
        return cls(graph.members(mask), graph.n_layers, graph.n_heads, **fields)

    @property
    def names(self) -> tuple[str, ...]:
        """The members by name."""
        return tuple(str(node) for node in self.nodes)

    @property
    def heads(self) -> tuple[Node, ...]:
        """The members that are attention heads."""
        return tuple(node for node in self.nodes if node.kind is Kind.HEAD)

    @property
    def mlps(self) -> tuple[Node, ...]:
        """The members that are MLPs."""
        return tuple(node for node in self.nodes if node.kind is Kind.MLP)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: Node | str) -> bool:
        return (Node.parse(node) if isinstance(node, str) else node) in self.nodes

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, set(self.nodes) & set(other.nodes))

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, set(self.nodes) | set(other.nodes))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, set(self.nodes) - set(other.nodes))

    def jaccard(self, other: Circuit) -> float:
        """Size of the intersection over size of the union; 1.0 for two empty circuits."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def mask(self, graph: Graph) -> Bool[Tensor, "node"]:
        """The mask over a graph that keeps just the members.

        Raises:
            CircuitError: The circuit belongs to a model of another shape.
        """
        self.check_fits(graph.n_layers, graph.n_heads)
        nodes = [node.at(span) for node in self.nodes for span in graph.spans if node.span in (None, span)] if graph.spans else self.nodes
        return graph.mask(nodes)

    def check_fits(self, n_layers: int, n_heads: int, model: str = "") -> None:
        """Refuses a circuit that was found in a model of another shape or name.

        Raises:
            CircuitError: It does not fit; the text says how.
        """
        if (self.n_layers, self.n_heads) != (n_layers, n_heads):
            raise CircuitError(
                f"This circuit was found in {self.model or 'a model'} with {self.n_layers} layers x {self.n_heads} "
                "heads, but the model here "
                f"has {n_layers} x {n_heads}. Load the model that it was found in, or find a circuit in this one."
            )
        if model and self.model and model != self.model:
            raise CircuitError(
                f"This circuit was found in the model {self.model!r}, not in {model!r}. Load that model, or find a circuit in this one."
            )

    def save(self, path: str | Path) -> Path:
        """Writes the circuit as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads a circuit that ``save`` wrote.

        Raises:
            CircuitError: No such file, not a circuit, another format version, or damaged.
        """
        return cls.from_json(_text(Path(path), "circuit"), where=str(path))

    def to_json(self) -> str:
        """The circuit as the text of a file."""
        body = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "level": self.level.value,
            "score": self.score,
            "nodes": list(self.names),
            "provenance": dict(self.provenance),
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Circuit:
        """The circuit that the text of a file stands for.

        Args:
            text: What ``to_json`` returned.
            where: What to call it in an error.

        Raises:
            CircuitError: Not a circuit, another format version, or damaged.
        """
        body = _checked_body(text, where)
        try:
            nodes = tuple(Node.parse(name) for name in _field(body, "nodes", list))
            score = None if body["score"] is None else float(_field(body, "score", int, float))
            shape = _field(body, "n_layers", int), _field(body, "n_heads", int)
            return cls(nodes, *shape, _field(body, "model", str), score, Level(body["level"]), _field(body, "provenance", dict))
        except CircuitError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CircuitError(f"{where} is not a circuit file: {type(error).__name__} at {error}.") from error

    def _combined(self, other: Circuit, nodes: Iterable[Node]) -> Circuit:
        other.check_fits(self.n_layers, self.n_heads, self.model)
        return Circuit(tuple(nodes), self.n_layers, self.n_heads, self.model, level=self.level)


@dataclass(frozen=True)
class Scores:
    """A number for each node, such as the performance left when it alone is removed.

    Attributes:
        values: Node name to number, in causal order.
        unit: Of the numbers.
        n_layers: Number of layers of the model.
        n_heads: Number of query heads a layer.
        model: Name of the model.
        provenance: Settings of the run.
    """

    values: Mapping[str, float]
    unit: str
    n_layers: int
    n_heads: int
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def top(self, n: int, *, lowest: bool = True) -> list[tuple[str, float]]:
        """The n nodes with the lowest (or highest) numbers."""
        return sorted(self.values.items(), key=lambda item: item[1] if lowest else -item[1])[:n]

    def to_json(self) -> str:
        """The scores as the text of a file."""
        body = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "unit": self.unit,
            "values": dict(self.values),
            "provenance": dict(self.provenance),
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads a file with the text that ``to_json`` returned.

        Raises:
            CircuitError: No such file, no scores, another format version, or damaged.
        """
        return cls.from_json(_text(Path(path), "scores"), where=str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Scores:
        """The scores that the text of a file stands for.

        Args:
            text: What ``to_json`` returned.
            where: What to call it in an error.

        Raises:
            CircuitError: No scores, another format version, or damaged.
        """
        body = _checked_body(text, where)
        try:
            values = _field(body, "values", dict)
            values = {name: float(_field(values, name, int, float)) for name in values}  # nodes, or draws of random circuits
            shape = _field(body, "n_layers", int), _field(body, "n_heads", int)
            return cls(values, _field(body, "unit", str), *shape, _field(body, "model", str), _field(body, "provenance", dict))
        except CircuitError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CircuitError(f"{where} is not a scores file: {type(error).__name__} at {error}.") from error


def _field(body: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """An entry of a file, which must be just of its kind: what is only like it, such as 2.7 layers, was written by something else."""
    if type(body[key]) not in kinds or (int in kinds and float not in kinds and body[key] < 0):
        raise ValueError(f"{key} is {body[key]!r}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return body[key]


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CircuitError(f"The {what} file {path} cannot be read: {error}.") from error


def _causal(node: Node) -> tuple[int, bool, int, str]:
    return (node.layer, node.kind is Kind.MLP, node.head if node.head is not None else -1, node.span or "")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _checked_body(text: str, where: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{where} is not a whole JSON file ({error}). It may have been cut off; run the search again.") from error
    if not isinstance(body, dict) or "format_version" not in body:
        raise CircuitError(f"{where} is not a circuit file: it has no format_version.")
    if body["format_version"] != FORMAT_VERSION:
        raise CircuitError(
            f"{where} has circuit format {body['format_version']}; this version reads format {FORMAT_VERSION}. "
            "Use the version that wrote it."
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise CircuitError(f"{where} was changed or damaged after it was written: its checksum does not match.")
    return body
