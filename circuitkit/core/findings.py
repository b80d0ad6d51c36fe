"""Finding: what an evaluation or an analysis found, as plain values with where they came from. The report draws each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitkit.core.sealed import Savable, reading, seal, unseal


@dataclass(frozen=True)
class Finding(Savable):
    """One result that is no circuit and no table of scores: an evaluation, a comparison, attention roles, a transfer table.

    Attributes:
        kind: What it is, such as ``evaluation``; the name of its file without ``.json``.
        title: For people.
        body: The result, plain values only.
        provenance: Settings, seed, versions, model and hashes.
    """

    kind: str
    title: str
    body: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The finding as the text of a file."""
        return seal({"kind": self.kind, "title": self.title, "body": dict(self.body), "provenance": dict(self.provenance)})

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Finding:
        """The finding that the text of a file stands for.

        Raises:
            CircuitError: No finding, another format version, or damaged.
        """
        body = unseal(text, where)
        with reading(where, "result") as entry:
            return cls(entry(body, "kind", str), entry(body, "title", str), entry(body, "body", dict), entry(body, "provenance", dict))
