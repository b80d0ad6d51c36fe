"""Circuits that others published as lists of heads and MLPs, read beside our own files.

A published list is JSON such as ``{"heads": [[0, 1], [4, 4]], "mlps": [0, 1, 9]}``: heads as pairs of layer and head, both zero-based.
Either entry may be the word ``"all"``, and one that is missing stands for none. A ``source`` may say where the list is from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitkit.core import plain
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError
from circuitkit.core.node import Kind, Node
from circuitkit.core.universe import Universe
from circuitkit.storage.reading import read_text

ALL = "all"
_EXAMPLE = '{"heads": [[0, 1], [4, 4]], "mlps": [0, 9]}'


@dataclass(frozen=True)
class PublishedCircuit:
    """A circuit as a list, which does not say of which model.

    Attributes:
        heads: Pairs of layer and head; None for all that the model has.
        mlps: Layers; None for all that the model has.
        where: What to call the list in an error.
    """

    heads: tuple[tuple[int, int], ...] | None
    mlps: tuple[int, ...] | None
    where: str

    def of(self, model: str, n_layers: int, n_heads: int) -> Circuit:
        """The circuit in a model of this name and shape; its score was not measured here.

        Raises:
            CircuitError: The list names a component that this model does not have.
        """
        universe = Universe.of_nodes(n_layers, n_heads)
        heads = [Node.of_head(*each) for each in self.heads] if self.heads is not None else [n for n in universe if n.kind is Kind.HEAD]
        mlps = [Node.of_mlp(layer) for layer in self.mlps] if self.mlps is not None else [n for n in universe if n.kind is Kind.MLP]
        strays = [str(node) for node in (*heads, *mlps) if node.layer >= n_layers or (node.head or 0) >= n_heads]
        if strays:
            raise CircuitError(
                f"{self.where} lists {', '.join(strays)}, but {model or 'the model'} has layers 0-{n_layers - 1} and heads "
                f"0-{n_heads - 1}. It was published for another model; load that one (model=...)."
            )
        return Circuit((*heads, *mlps), n_layers, n_heads, model, provenance={"published_list": self.where})


def read(path: str | Path) -> Circuit | PublishedCircuit:
    """Reads a circuit file of ours or a published list, whichever it is.

    Raises:
        CircuitError: It cannot be read, or is neither.
    """
    text = read_text(path, "circuit")
    try:
        body = plain.parse(text)
    except ValueError as error:
        raise CircuitError(f"{path} is not a whole JSON file ({error}). It may have been cut off; make it again.") from error
    if isinstance(body, dict) and "format_version" in body:
        return Circuit.from_json(text, where=str(path))
    return _published(body, str(path))


def fitted(found: Circuit | PublishedCircuit, model: str, n_layers: int, n_heads: int) -> Circuit:
    """What ``read`` returned, as a circuit of the model at hand.

    Raises:
        CircuitError: It belongs to another model.
    """
    if isinstance(found, PublishedCircuit):
        return found.of(model, n_layers, n_heads)
    found.check_fits(n_layers, n_heads, model)
    return found


def _published(body: Any, where: str) -> PublishedCircuit:
    if not isinstance(body, dict) or not body.keys() & {"heads", "mlps"} or not body.keys() <= {"heads", "mlps", "source"}:
        found = f"the entries {', '.join(map(str, body))}" if isinstance(body, dict) and body else f"a {type(body).__name__}"
        raise CircuitError(
            f"{where} is not a circuit: expected a file that circuitkit wrote, or a published list such as {_EXAMPLE}; found {found}."
        )
    heads, mlps = body.get("heads", []), body.get("mlps", [])
    if heads != ALL and not (isinstance(heads, list) and all(_places(each, 2) for each in heads)):
        raise CircuitError(f'{where}: heads must be "all" or a list of [layer, head] pairs such as in {_EXAMPLE}; found {_brief(heads)}.')
    if mlps != ALL and not _places(mlps):
        raise CircuitError(f'{where}: mlps must be "all" or a list of layers such as in {_EXAMPLE}; found {_brief(mlps)}.')
    pairs = None if heads == ALL else tuple((layer, head) for layer, head in heads)
    return PublishedCircuit(pairs, None if mlps == ALL else tuple(mlps), where)


def _places(values: Any, size: int | None = None) -> bool:
    """Whether it is a list of layers or heads, of this size."""
    is_list = isinstance(values, list) and size in (None, len(values))
    return is_list and all(type(value) is int and value >= 0 for value in values)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
