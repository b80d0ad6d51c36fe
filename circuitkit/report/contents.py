"""From what lies in a folder to the sections of its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from circuitkit.core.bodies import Estimate, Evaluation
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError
from circuitkit.core.findings import Finding
from circuitkit.report.blocks import Block, Drawing, Fold, Section, Table, Text
from circuitkit.report.figures.circuit_graph import circuit_graph
from circuitkit.report.figures.edges import edges
from circuitkit.report.figures.evaluation import evaluation
from circuitkit.report.figures.maps import Shape, is_map, knockout
from circuitkit.report.figures.overlap import compared, overlap
from circuitkit.report.figures.roles import roles
from circuitkit.report.figures.search import drawn_circuits, search
from circuitkit.report.figures.style import shown, shown_interval
from circuitkit.report.figures.tables import cross_task, stability
from circuitkit.report.figures.transfer import transfer
from circuitkit.report.reading import Located, Material, RunFolder

Draw = Callable[[str, Any, Shape | None], list[Block]]

FINDINGS: Mapping[str, tuple[str, Draw]] = {
    "evaluation": ("Evaluation", evaluation),
    "edges": ("Paths", edges),
    "compare": ("Comparison", compared),
    "cross_task": ("Across tasks", cross_task),
    "stability": ("Stability", stability),
    "roles": ("Roles", roles),
    "transfer": ("Transfer", transfer),
}
"""Kind of finding to the heading and the drawing of its section, in the order of the report."""

_SHARED = "shared.json"  # what a comparison found in all of its circuits, which the picture of these shows
_WRONG = (CircuitError, KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError)


def sections(material: Material) -> tuple[list[Section], list[str]]:
    """The sections of a report, and a sentence for each part that could not be made.

    Args:
        material: What was found; sections for which nothing is there are left out.
    """
    problems: list[str] = []
    material = replace(material, circuits=tuple(each for each in material.circuits if not _is_repetition(each, material)))
    made = [Section("Summary", summary(material))]
    shaped: list[Located[Any]] = [*material.scores, *material.circuits]
    shapes = {each.what.model: (each.what.n_layers, each.what.n_heads) for each in shaped}
    own = [each for each in material.circuits if each.path.rpartition("/")[2] != _SHARED]
    with_paths = {each.path.rpartition("/")[0] for each in material.of_kind("edges")}  # drawn there, with what each path is worth
    bare = [each for each in own if not (each.what.edges and each.path.rpartition("/")[0] in with_paths)]
    made += _each(problems, material.of_kind("evaluation"), lambda each: _finding(each, shapes))
    made += _each(problems, bare, lambda each: _circuit(each, material))
    made += _each(problems, overlapping(_compared(own, material)), _overlap)
    made += [
        section
        for kind in FINDINGS
        if kind != "evaluation"
        for section in _each(problems, material.of_kind(kind), lambda each: _finding(each, shapes))
    ]
    made += _each(problems, material.scores, lambda each: _scores(each, material))
    problems += [
        f"{each.path} holds a result of the kind {each.what.kind!r}, which this version does not draw."
        for each in material.findings
        if each.what.kind not in FINDINGS
    ]
    made.append(Section("Settings and provenance", provenance(material)))
    return _with_own_names([section for section in made if section.blocks]), problems


def summary(material: Material) -> list[Block]:
    """A row for each circuit, and one for each run without one."""
    rows = []
    for each in material.circuits:
        circuit, settings = each.what, _settings(each.what)
        evaluated = _evaluated(each, material)
        rows.append(
            (
                each.label,
                circuit.model or "–",
                _part(settings, "task"),
                _part(settings, "method"),
                _part(settings, "patcher"),
                shown(circuit.score, "%") if evaluated is None else shown_interval(evaluated),
                _zero(circuit),
                str(len(circuit.heads)),
                str(len(circuit.mlps)),
                str(len(circuit.edges)) if circuit.edges else "–",
                str(circuit.provenance.get("n_prompts", "–")),
            )
        )
    header = ("circuit", "model", "task", "method", "patcher", "score", "0 % is", "heads", "MLPs", "edges", "prompts")
    blocks: list[Block] = []
    if rows:
        caption = (
            "The circuits found here; the score is in % of the untouched model, in brackets its bootstrap interval. 0 % is a metric of "
            "zero, or that of the model with everything ablated."
        )
        blocks.append(Table(header, tuple(rows), caption))
    members = tuple((each.label, " ".join(each.what.names) or "none") for each in material.circuits)
    if members:
        blocks.append(Table(("circuit", "members"), members, "Members: a7.h11 is head 11 of layer 7, m9 the MLP of layer 9."))
    lacking = [run for run in material.runs if run.status and run.status.get("status") != "finished"]
    blocks += [Text(f"The run {run.label} is not finished: its status is {run.status.get('status')}.") for run in lacking]
    counted = [f"{len(found)} {name}" for name, found in (("circuits", material.circuits), ("tables of scores", material.scores),
               ("findings", material.findings), ("runs", material.runs)) if found]  # fmt: skip
    return [*blocks, Text(f"This folder holds {', '.join(counted)}.")] if counted else blocks


def _compared(circuits: Sequence[Located[Circuit]], material: Material) -> Sequence[Located[Circuit]]:
    """The circuits that a comparison names, if there is one: not those that are only controls."""
    named = {label for each in material.of_kind("compare") for label in each.what.body["circuits"]}
    found = [each for each in circuits if each.label.rpartition("/")[2] in named or each.label in named]
    return found or circuits


def overlapping(circuits: Sequence[Located[Circuit]]) -> list[Located[dict[str, Circuit]]]:
    """The circuits that can be laid over each other: those of the same model, with or without paths, at least two."""
    alike: dict[tuple[Any, ...], dict[str, Circuit]] = {}
    for each in circuits:
        key = (each.what.model, each.what.n_layers, each.what.n_heads, bool(each.what.edges))
        alike.setdefault(key, {})[each.label] = each.what
    return [Located(f"{key[0] or 'one model'}{', with paths' * key[3]}", "", group) for key, group in alike.items() if len(group) > 1]


def provenance(material: Material) -> list[Block]:
    """Settings of each run, and where each circuit and finding comes from; folded."""
    folds: list[Block] = [Fold(f"Settings of {run.label}", run.config) for run in material.runs if run.config]
    sources: list[Located[Any]] = [*material.circuits, *material.scores, *material.findings]
    for each in sources:
        rest = {key: value for key, value in each.what.provenance.items() if key != "settings" or not material.runs}
        if rest:
            folds.append(Fold(f"Provenance of {each.path}", json.dumps(rest, indent=2, ensure_ascii=False)))
    return folds


def _each(problems: list[str], found: Sequence[Located[Any]], make: Callable[[Any], Section]) -> list[Section]:
    """A section for each result; for one that cannot be drawn a sentence."""
    made = []
    for each in found:
        try:
            made.append(make(each))
        except _WRONG as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, CircuitError) else str(error)
            problems.append(f"{each.path or each.label} could not be drawn ({' '.join(reason.split()):.200}). It was left out.")
    return made


def _finding(found: Located[Finding[Any]], shapes: Mapping[str, Shape]) -> Section:
    heading, draw = FINDINGS[found.what.kind]
    title = found.what.title or (found.label if "/" in found.path else "")
    name = title if title.startswith(heading) else f"{heading}: {title}".removesuffix(": ")
    return Section(name, draw(found.label, found.what.body, shapes.get(found.what.body.get("model", ""))), found.path)


def _circuit(found: Located[Circuit], material: Material) -> Section:
    blocks: list[Block] = [circuit_graph(found.label, found.what)]
    run = _run_of(found, material)
    if run is not None and any("step/score" in step for step in run.steps):
        threshold = _settings(found.what).get("method", {}).get("threshold")
        percent = 100 * threshold if isinstance(threshold, (int, float)) else None
        blocks.append(search(found.label, [step for step in run.steps if "step/score" in step], percent))
    return Section(f"Circuit: {found.label}", blocks, found.path)


def _overlap(found: Located[dict[str, Circuit]]) -> Section:
    return Section(f"Overlap in {found.label}", overlap(found.what))


def _scores(found: Located[Any], material: Material) -> Section:
    if not found.what.values:
        raise ValueError("it holds no scores")
    if not is_map(found.what):
        return Section(f"Random circuits: {found.label}", [drawn_circuits(found.label, found.what)], found.path)
    beside = [each.what for each in material.circuits if each.path.rpartition("/")[0] == found.path.rpartition("/")[0]]
    marked = [str(node.component) for node in beside[0].nodes] if beside else []
    return Section(f"Knock-out: {found.label}", knockout(found.label, found.what, marked), found.path)


def _evaluated(found: Located[Circuit], material: Material) -> Estimate | None:
    """The score with its interval from the evaluation of just this circuit."""
    for each in material.of_kind("evaluation"):
        body: Evaluation = each.what.body
        beside = each.path.rpartition("/")[0] == found.path.rpartition("/")[0]
        members = body["circuit"]["nodes"], body["circuit"].get("edges", [])
        same = members == (list(found.what.names), list(map(str, found.what.edges))) and body["model"] == found.what.model
        if same and (beside or body["circuit"]["label"] == found.label):
            return body["score"]
    return None


def _is_repetition(found: Located[Circuit], material: Material) -> bool:
    """Whether it is one of the repeated searches of a stability study, whose own section has them all."""
    for each in material.of_kind("stability"):
        folder = each.path.rpartition("stability.json")[0]
        if any(found.path.startswith(f"{folder}{run['label']}/") for run in each.what.body["runs"]):
            return True
    return False


def _run_of(found: Located[Circuit], material: Material) -> RunFolder | None:
    folder = found.path.rpartition("/")[0]
    return next((run for run in material.runs if run.label == folder or (not folder and run.label == material.name)), None)


def _settings(circuit: Circuit) -> Mapping[str, Any]:
    settings = circuit.provenance.get("settings")
    found = settings if isinstance(settings, Mapping) else {}
    return {key: value for key, value in found.items() if isinstance(value, Mapping)}


def _zero(circuit: Circuit) -> str:
    """What counts as 0 % of its score, where the file says so."""
    told = circuit.provenance.get("score")
    return str(told.get("zero", "–")) if isinstance(told, Mapping) else "–"


def _part(settings: Mapping[str, Any], key: str) -> str:
    """The name of a part of a run: the last of its dotted target."""
    return str(settings.get(key, {}).get("_target_", "–")).rpartition(".")[2]


def _with_own_names(made: Sequence[Section]) -> list[Section]:
    """The same sections, with drawings whose names, and so files, are no other's."""
    seen: dict[str, int] = {}

    def own(block: Block) -> Block:
        if not isinstance(block, Drawing):
            return block
        name = block.name.lower()  # some file systems know no capitals
        seen[name] = seen.get(name, 0) + 1
        return replace(block, name=f"{block.name}-{seen[name]}") if seen[name] > 1 else block

    return [replace(section, blocks=[own(block) for block in section.blocks]) for section in made]
