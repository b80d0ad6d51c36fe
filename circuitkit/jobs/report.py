"""Makes one page of a run or a study, with its figures as files beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from circuitkit.config import build_each, check_plain
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError, ConfigError, UserError
from circuitkit.core.node import INPUT, LOGITS
from circuitkit.core.records import FigureArtifact
from circuitkit.loggers import Logger, LoggerGroup
from circuitkit.report.needs import check_installed
from circuitkit.report.reading import FIGURES, Material, read
from circuitkit.storage.exchange import graph_of, to_dot, to_graphml, to_json
from circuitkit.storage.writing import write_text

if TYPE_CHECKING:
    from circuitkit.report.blocks import Drawing

PAGE = "report.html"

_log = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Writes ``report.html`` and ``figures/`` into the folder ``run``.

    Raises:
        ConfigError: No such folder, nothing in it to report on, or a package is missing.
        UserError: The folder cannot be written.
    """
    check_installed()
    folder = Path(str(config.run))
    if not folder.is_dir():
        raise ConfigError(f"run must be the folder of a run or of a study, such as runs/demo; found no folder {folder}.")
    check_plain(folder, [*folder.glob(f"{PAGE}*"), folder / FIGURES, *(folder / FIGURES).glob("*")])
    material = read(folder)
    if not (material.circuits or material.scores or material.findings or material.problems):
        raise ConfigError(
            f"There is nothing to report on in {folder}. Expected a folder in which a job left its results, such as circuit.json, "
            "scores.json or evaluation.json, there or in folders below it."
        )
    loggers = LoggerGroup(build_each(config.logger, Logger))
    loggers.log_config(f"report-{material.name}", {"report": str(folder)})
    try:
        made, drawings, problems = report(material, folder)
        for drawing in drawings if loggers.loggers else ():
            figure = drawing.escaped
            loggers.log_artifact(FigureArtifact(f"{FIGURES}/{drawing.name}.json", figure.to_json(), figure=figure))
    except BaseException as error:
        loggers.finalize("failed")
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written: {error}. Free some space, or correct its permissions.") from error
        raise
    loggers.finalize("finished")
    show(made, problems)


def report(material: Material, folder: Path) -> tuple[list[Path], list[Drawing], list[str]]:
    """Makes the page and the files of a report.

    Returns:
        The files, the page first; what is drawn in it; and sentences on what is missing.
    """
    from circuitkit.report.blocks import Drawing
    from circuitkit.report.contents import sections
    from circuitkit.report.page import page
    from circuitkit.report.static import write_svgs

    parts, problems = sections(material)
    problems = [*material.problems, *problems]
    drawings = [block for part in parts for block in part.blocks if isinstance(block, Drawing)]
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    graphs = export(material, figures)
    svgs, missing = write_svgs(drawings, figures)
    notes = [f"Each figure is also in {FIGURES}/ as SVG."] if svgs and not missing else [missing] if missing else []
    notes += [f"Each circuit is also in {FIGURES}/ as a universe: DOT, GraphML and JSON."] if graphs else []
    made = write_text(folder / PAGE, page(f"Circuits: {material.name}", parts, problems, notes))
    return [made, *svgs, *graphs], drawings, [*problems, *([missing] if missing else [])]


def export(material: Material, folder: Path) -> list[Path]:
    """Writes each circuit as a graph in three formats: DOT, GraphML and JSON."""
    from circuitkit.report.figures.edges import circuit_of, costs_of
    from circuitkit.report.figures.layout import layered
    from circuitkit.report.figures.maps import file_name

    found: dict[str, tuple[Circuit, dict[str, float]]] = {each.label: (each.what, {}) for each in material.circuits}
    for each in material.of_kind("edges"):
        try:
            found[f"{each.label}-edges"] = (circuit_of(each.what.body), costs_of(each.what.body))
        except (CircuitError, KeyError, TypeError, ValueError, AttributeError):
            continue  # the page says so
    paths = []
    for label, (circuit, costs) in found.items():
        graph = graph_of(circuit, layered([*circuit.nodes, INPUT, LOGITS]), costs)
        for ending, text in (("dot", to_dot(graph)), ("graphml", to_graphml(graph)), ("json", to_json(graph))):
            paths.append(write_text(folder / f"{file_name('circuit', label)}.{ending}", text))
    return paths


def show(made: Sequence[Path], problems: Sequence[str]) -> None:
    """Says what was written and what is missing."""
    for problem in problems:
        _log.warning("%s", problem)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"written: {made[0]}")
    if len(made) > 1:
        console.print(f"written: {made[0].parent / FIGURES}/ ({len(made) - 1} files)")
