"""Finding: what an evaluation or an analysis found, as plain values with where they came from. The report draws each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from circuitkit.core import plain
from circuitkit.core.bodies import BODIES
from circuitkit.core.errors import CircuitError
from circuitkit.core.sealed import Savable, reading, seal, unseal

B = TypeVar("B", bound=Mapping[str, object])


@dataclass(frozen=True)
class Finding(Savable, Generic[B]):
    """One result that is no circuit and no table of scores: an evaluation, a comparison, attention roles, a transfer table.

    Attributes:
        kind: What it is, such as ``evaluation``; the name of its file without ``.json``.
        title: For people.
        body: The result, plain values only; ``core.bodies`` declares what each kind holds.
        provenance: Settings, seed, versions, model and hashes.
    """

    kind: str
    title: str
    body: B
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The finding as the text of a file."""
        return seal({"kind": self.kind, "title": self.title, "body": dict(self.body), "provenance": dict(self.provenance)})

    @classmethod
    def from_json(cls, text: str, where: str = "this text") -> Finding[Any]:
        """The finding that the text of a file stands for.

        Raises:
            CircuitError: No finding, another format version, damaged, or its body is not what findings of its kind hold.
        """
        body = unseal(text, where)
        with reading(where, "result") as entry:
            found = Finding(entry(body, "kind", str), entry(body, "title", str), entry(body, "body", dict), entry(body, "provenance", dict))
        check_body(found.kind, found.body, where)
        return found


def check_body(kind: str, body: Any, where: str) -> None:
    """Refuses what a file gives for the body of a finding, if it is none of its kind; of a kind that is not known it can be anything.

    Raises:
        CircuitError: Something is missing, or is not as ``core.bodies`` declares it; says what and where.
    """
    wrong = plain.misfit(body, BODIES[kind], "its body") if kind in BODIES else None
    if wrong is not None:
        raise CircuitError(f"{where} is no whole result of the kind {kind!r}: {wrong}. Make it again, with this version of circuitkit.")
