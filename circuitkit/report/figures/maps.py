"""Maps of a model: a cell a head, layers from bottom to top, the MLPs in a column of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import plotly.graph_objects as go

from circuitkit.core.circuit import Scores
from circuitkit.core.node import Kind, Node
from circuitkit.report.blocks import Drawing
from circuitkit.report.figures.style import DIVERGING, INK, SEQUENTIAL, WIDTH, figure, number

Shape = tuple[int, int]
"""Layers, and heads per layer."""

_TEXT_UP_TO = 17  # columns; numbers in narrower cells could not be read


def shape_of(names: Iterable[str]) -> Shape:
    """The least numbers of layers and heads a layer that a model with these nodes has."""
    nodes = [Node.parse(name) for name in names]
    return max((node.layer + 1 for node in nodes), default=1), max((node.head + 1 for node in nodes if node.head is not None), default=1)


def model_shape(known: Shape | None, names: Iterable[str]) -> Shape:
    """That of the model, where it is known, else what its nodes need."""
    least = shape_of(names)
    layers, heads = known or least
    return max(layers, least[0]), max(heads, least[1])


def node_map(
    values: Mapping[str, float | None],
    shape: Shape,
    *,
    unit: str,
    middle: float | None = None,
    marked: Iterable[str] = (),
    digits: int = 0,
) -> go.Figure:
    """The map of a number for each node.

    Args:
        values: Node name to number; what is missing stays white.
        shape: Layers, and heads per layer.
        unit: Title of the colour bar.
        middle: The number that is drawn white, with what is below in orange and above in blue; None for a scale that begins at white.
        marked: Nodes to draw a frame around, such as the circuit's.
        digits: Behind the point, of the numbers in the cells.
    """
    n_layers, n_heads = shape
    columns = [*(f"h{head}" for head in range(n_heads)), "MLP"]
    cells: list[list[float | None]] = [[None] * (n_heads + 1) for _ in range(n_layers)]
    for name, value in values.items():
        layer, column = _cell(name, n_heads)
        cells[layer][column] = number(value)
    known = [cell for row in cells for cell in row if cell is not None] or [0.0]
    text = [["" if cell is None else f"{cell:.{digits}f}" for cell in row] for row in cells] if len(columns) <= _TEXT_UP_TO else None
    heat = go.Heatmap(
        z=cells,
        x=columns,
        y=[str(layer) for layer in range(n_layers)],
        hovertext=[[_hover(layer, column, cell, n_heads) for column, cell in enumerate(row)] for layer, row in enumerate(cells)],
        hoverinfo="text",
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14, "outlinewidth": 0},
        **({"text": text, "texttemplate": "%{text}", "textfont": {"size": 10}} if text else {}),
        **_scale(known, middle),
    )
    drawn = figure(
        min(900, 110 + n_layers * max(20, min(40, (WIDTH - 160) // (n_heads + 1)))),
        [heat],
        xaxis={"title": {"text": "head"}, "side": "bottom", "showgrid": False, "type": "category", "tickangle": 0},
        yaxis={"title": {"text": "layer"}, "showgrid": False, "type": "category", "dtick": 1 if n_layers <= 24 else 2},
    )
    for name in marked:
        layer, column = _cell(name, n_heads)
        box = {"x0": column - 0.48, "x1": column + 0.48, "y0": layer - 0.48, "y1": layer + 0.48}
        drawn.add_shape(type="rect", line={"color": INK, "width": 2}, **box)
    return drawn


def knockout(label: str, scores: Scores, marked: Iterable[str] = ()) -> list[Drawing]:
    """The maps of a run that removed each node alone: one, or one for each position that nodes were split by."""
    by_span: dict[str, dict[str, float]] = {}
    for name, value in scores.values.items():
        node = Node.parse(name)
        by_span.setdefault(node.span or "", {})[str(node.component)] = value
    is_percent = scores.unit.startswith("%")
    shape, unit, middle = (scores.n_layers, scores.n_heads), scores.unit.partition(" ")[0], 100.0 if is_percent else 0.0
    drawings = []
    for span, values in by_span.items():
        drawn = node_map(values, shape, unit=unit, middle=middle, marked=marked)
        where = f" at position {span}" if span else ""
        frames = " A frame marks a member of the circuit of the same folder." if marked else ""
        reading = " Orange: the model gets worse without it, blue: better." if is_percent else ""
        drawings.append(
            Drawing(
                file_name("knockout", label, span),
                drawn,
                f"Knock-out map of {label}: {scores.unit} that is left when one component alone is removed{where}.{reading}{frames}",
            )
        )
    return drawings


def is_map(scores: Scores) -> bool:
    """Whether the numbers belong to nodes, and not to drawn circuits."""
    return are_cells(scores.values)


def are_cells(names: Iterable[str]) -> bool:
    """Whether these are names of heads and MLPs, which have a place in a map; at least one."""
    names = list(names)
    return bool(names) and all(re.match(r"(a\d+\.h\d+|m\d+)(@|\Z)", name) for name in names)


def file_name(*parts: str) -> str:
    """Parts as the name of one file, without an ending."""
    return "-".join(filter(None, (re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)))[:100] or "figure"


def _scale(known: list[float], middle: float | None) -> dict[str, object]:
    if middle is None:
        return {"colorscale": SEQUENTIAL, "zmin": min(0.0, *known), "zmax": max(1e-9, *known)}
    reach = max(1e-9, *(abs(value - middle) for value in known))
    return {"colorscale": DIVERGING, "zmid": middle, "zmin": middle - reach, "zmax": middle + reach}


def _cell(name: str, n_heads: int) -> tuple[int, int]:
    node = Node.parse(name)
    if node.kind is Kind.MLP:
        return node.layer, n_heads
    assert node.head is not None
    return node.layer, node.head


def _hover(layer: int, column: int, cell: float | None, n_heads: int) -> str:
    name = f"m{layer}" if column == n_heads else f"a{layer}.h{column}"
    return f"{name}: {'not measured' if cell is None else f'{cell:.4g}'}"
