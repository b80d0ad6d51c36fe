"""What heads and MLPs do: attention patterns, OV circuits, the logit lens and direct contributions to the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuitkit.core.role_bodies import Attribution, LogitLens, OVScores, PlayedRole, Roles, RoleScores
from circuitkit.report.blocks import Block, Drawing, Table, Text
from circuitkit.report.figures.maps import Shape, file_name
from circuitkit.report.figures.style import BLUE, GREY, ORANGE, PALE, PURPLE, SEQUENTIAL, dressed, figure, number, shown

_PATTERNS, _BARS, _NAMED = 12, 30, 10


def roles(label: str, body: Roles, shape: Shape | None = None) -> list[Block]:
    """Every drawing and table of one analysis, as far as it was made."""
    blocks: list[Block] = []
    if body["roles"]:
        blocks.append(role_table(body["roles"]))
    if body.get("heads"):
        blocks.append(head_table(body["heads"]))
    if body["patterns"]:
        blocks += attention(label, body)
    if body.get("logit_lens"):
        blocks.append(logit_lens(label, body["logit_lens"]))
    if body.get("attribution"):
        blocks.append(attribution(label, body["attribution"]))
    if body.get("ov"):
        blocks.append(ov(label, body["ov"]))
    return blocks + [Text(f"Left out, {part}: {reason}") for part, reason in body["skipped"].items()]


def role_table(found: Mapping[str, RoleScores]) -> Table:
    """The heads with the highest score for each role."""
    rows = []
    for role, each in found.items():
        scores = {head: number(score) for head, score in each["scores"].items()}
        best = ", ".join(f"{head} ({shown(scores.get(head), digits=2)})" for head in each["found"][:8])
        rows.append((str(role), str(each["description"]), best or "none"))
    return Table(("role", "what such a head does", "heads, best first (score)"), tuple(rows), "Roles of heads, by their attention.")


def head_table(found: Mapping[str, Mapping[str, PlayedRole]]) -> Table:
    """The roles of each head, with their control."""
    rows = []
    for head, roles in found.items():
        values = {role: (each["score"], each["chance"]) for role, each in roles.items()}
        said = (f"{role} ({shown(score, digits=2)}; {shown(chance, digits=3)})" for role, (score, chance) in values.items())
        rows.append((str(head), ", ".join(said) or "none"))
    return Table(("head", "roles, best first (score; share of random keys that score as much)"), tuple(rows), "Roles of each head.")


def attention(label: str, body: Roles) -> list[Drawing]:
    """Mean attention patterns, two a drawing."""
    heads = list(body["patterns"])
    drawings = []
    for start in range(0, min(len(heads), _PATTERNS), 2):
        pair = heads[start : start + 2]
        drawn = make_subplots(1, 2, horizontal_spacing=0.12, subplot_titles=pair)
        groups = []
        for column, head in enumerate(pair, start=1):
            pattern = body["patterns"][head]
            groups.append(str(pattern["group"]))
            drawn.add_trace(_pattern(head, pattern["mean"], body["groups"][pattern["group"]]["tokens"]), 1, column)
        tokens = max(len(body["groups"][group]["tokens"]) for group in groups)
        bar = {"title": {"text": "attention"}, "thickness": 14, "outlinewidth": 0}
        top = max(0.1, *(_largest(body["patterns"][head]["mean"]) for head in pair))
        dressed(drawn, 440 if tokens > 12 else 400, coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": top, "colorbar": bar})
        for column, group in enumerate(groups, start=1):
            words = [_token(token) for token in body["groups"][group]["tokens"]]
            axis = {"tickvals": list(range(len(words))), "ticktext": words, "tickfont": {"size": 9}, "showgrid": False, "automargin": True}
            drawn.update_xaxes(tickangle=-90, title={"text": "attends to"}, row=1, col=column, **axis)
            drawn.update_yaxes(autorange="reversed", row=1, col=column, **axis)
        rest = f" The first {_PATTERNS} of {len(heads)} heads are drawn." if len(heads) > _PATTERNS and start == 0 else ""
        drawings.append(
            Drawing(
                file_name("attention", label, *pair),
                drawn,
                f"Attention of {' and '.join(pair)}, from 0 to 1, mean over the prompts of {' and '.join(dict.fromkeys(groups))}: a row is "
                "a token, and its cells say how much it attends to the tokens before it (labels: those of one prompt); the scale ends at "
                f"{top:.2f}, the most that any token but the first gets.{rest}",
            )
        )
    return drawings


def logit_lens(label: str, body: LogitLens) -> Drawing:
    """What the residual stream at the last token would say after each component."""
    sites = [str(site) for site in body["sites"]]
    drawn = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.5, 0.5])
    dressed(drawn, 520)
    top1, logits = (body["wrong_top1"], body["answer_top1"]), (body["wrong_logit"], body["answer_logit"])
    for row, unit, pair in ((1, 100.0, top1), (2, 1.0, logits)):
        for values, name, colour, dash in zip(pair, ("last shown member", "answer"), (ORANGE, BLUE), ("dot", "solid"), strict=True):
            numbers = [number(value) for value in values]
            line = go.Scatter(
                x=sites,
                y=[None if value is None else unit * value for value in numbers],
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 2, "dash": dash},
                marker={"size": 5, "symbol": "circle" if dash == "solid" else "diamond"},
                showlegend=row == 1,
            )
            drawn.add_trace(line, row, 1)
    site, switches = body["switch_site"], body["switch"]
    told = ""
    if site is not None and site in sites:
        for row in (1, 2):
            drawn.add_vline(x=sites.index(site), line={"color": PURPLE, "dash": "dash", "width": 1.5}, row=row, col=1)
        count, n = number(switches.get(site)), body["n"]
        often = "" if count is None or not n else f" (in {count:.0f} of {n:.0f} prompts)"
        told = f" The dashed line marks {site}, after which the answer most often takes over{often}."
    drawn.update_yaxes(title={"text": "prompts with it on top (%)"}, range=[-4, 104], row=1, col=1)
    drawn.update_yaxes(title={"text": "mean logit"}, row=2, col=1)
    drawn.update_xaxes(type="category", tickangle=-60 if len(sites) > 16 else 0, tickfont={"size": 10 if len(sites) <= 40 else 8}, dtick=1)
    drawn.update_xaxes(title={"text": "after which component"}, row=2, col=1)
    return Drawing(
        file_name("logit-lens", label),
        drawn,
        "Logit lens at the last token: in how many prompts (%) the answer and the last shown member would come out on top if the model "
        f"ended after each component, and their mean logits below.{told}",
    )


def attribution(label: str, body: Attribution) -> Drawing:
    """What each node writes directly in favour of the answer."""
    values = {name: number(value) or 0.0 for name, value in body["nodes"].items()}
    top = sorted(values.items(), key=lambda item: -abs(item[1]))[:_BARS]
    top.sort(key=lambda item: -item[1])
    unit = str(body["unit"])
    bars = go.Bar(
        x=[name for name, _ in top],
        y=[value for _, value in top],
        marker={"color": [BLUE if value >= 0 else ORANGE for _, value in top]},
        hovertext=[f"{name}: {value:.3f} {unit}" for name, value in top],
        hoverinfo="text",
    )
    drawn = figure(380, [bars], xaxis={"type": "category", "tickangle": -60 if len(top) > 14 else 0, "dtick": 1},
                   yaxis={"title": {"text": f"direct contribution ({unit})"}, "zeroline": True, "zerolinecolor": GREY})  # fmt: skip
    rest = f" The {_BARS} largest of {len(values)} are shown." if len(values) > _BARS else ""
    return Drawing(
        file_name("attribution", label),
        drawn,
        f"What each component adds directly to the answer's lead, in {unit}, of {shown(number(body['total']), unit, 2)} in total: blue for "
        f"the answer, orange against it.{rest}",
    )


def ov(label: str, body: OVScores) -> Drawing:
    """Heads by what their OV circuit turns a member into: itself, or the next one."""
    copies, following = body["copy"], body["next"]
    heads = [head for head in copies if head in following]
    points = {head: (number(copies[head]), number(following[head])) for head in heads}
    named = sorted(heads, key=lambda head: -max(points[head][1] or 0.0, 0.6 * (points[head][0] or 0.0)))[:_NAMED]
    named = [head for head in named if max(points[head][0] or 0.0, points[head][1] or 0.0) > 0]
    reach = min(104.0, max(20.0, 1.12 * max((value or 0.0 for point in points.values() for value in point), default=0.0)))
    drawn = figure(
        520,
        [
            go.Scatter(x=[0, reach], y=[0, reach], mode="lines", line={"color": PALE, "dash": "dot"}, hoverinfo="skip", showlegend=False),
            go.Scatter(
                x=[points[head][0] for head in heads],
                y=[points[head][1] for head in heads],
                mode="markers+text",
                marker={"size": 9, "color": [_successor(points[head]) for head in heads], "opacity": 0.85},
                text=_beside(named, points, reach),
                textposition="top center",
                textfont={"size": 11},
                hovertext=[f"{head}: copy {shown(points[head][0], '%')}, next {shown(points[head][1], '%')}" for head in heads],
                hoverinfo="text",
                showlegend=False,
                cliponaxis=False,
            ),
        ],
        xaxis={"title": {"text": "copy score: same member among the top tokens (%)"}, "range": [-0.03 * reach, reach]},
        yaxis={"title": {"text": "next score: next member among the top tokens (%)"}, "range": [-0.03 * reach, 1.04 * reach]},
    )
    means = f"means of all heads: copy {shown(body['mean_copy'], '%')}, next {shown(body['mean_next'], '%')}"
    return Drawing(
        file_name("ov", label),
        drawn,
        f"OV circuits of {len(heads)} heads: in how many cases (%) a head turns a member into itself (across) or into the next one (up), "
        f"counted among the {body['k']} most likely tokens; heads above the dotted line (blue) move on rather than copy ({means}). "
        f"{body['definition']}".strip(),
    )


def _largest(mean: Sequence[Sequence[Any]]) -> float:
    """The most attention that any token but the first gets: the first often gets whatever is not needed elsewhere."""
    return max((number(value) or 0.0 for line in mean for value in line[1:]), default=0.0)


def _pattern(head: str, mean: Sequence[Sequence[Any]], tokens: Sequence[str]) -> go.Heatmap:
    words = [_token(token) for token in tokens]
    cells = [[number(value) if spot <= row else None for spot, value in enumerate(line)] for row, line in enumerate(mean)]
    hover = [
        [f"{head}: {words[row]} to {words[spot]}: {shown(value, digits=3)}" for spot, value in enumerate(line)]
        for row, line in enumerate(cells)
    ]
    return go.Heatmap(z=cells, hovertext=hover, hoverinfo="text", coloraxis="coloraxis", xgap=1, ygap=1)


def _token(token: Any) -> str:
    """A token as a label: blanks at its ends and line breaks are made visible."""
    text = str(token).replace("\n", "⏎")
    return text.replace("Ġ", "␣", 1) if text.startswith("Ġ") else "␣" + text[1:] if text.startswith(" ") else text


def _successor(point: tuple[float | None, float | None]) -> str:
    copy, following = point
    return BLUE if (following or 0.0) > (copy or 0.0) else GREY


def _beside(named: Sequence[str], points: Mapping[str, tuple[float | None, float | None]], reach: float) -> list[str]:
    """Names of the heads that stand out; a name that would lie on another one is left to the hover text."""
    placed: list[tuple[float, float]] = []
    shown_names = set()
    for head in named:
        x, y = points[head][0] or 0.0, points[head][1] or 0.0
        if all(abs(x - other) > 0.07 * reach or abs(y - height) > 0.05 * reach for other, height in placed):
            placed.append((x, y))
            shown_names.add(head)
    return [head if head in shown_names else "" for head in points]
