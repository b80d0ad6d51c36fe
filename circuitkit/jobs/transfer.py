"""What becomes of other tasks, answered by generating, when the heads of circuits are removed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from circuitkit.config import build
from circuitkit.core.bodies import Accuracy, LeftOutTask, Transfer
from circuitkit.core.circuit import Circuit
from circuitkit.core.describe import describe
from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.core.findings import Finding
from circuitkit.core.questions import QuestionSet
from circuitkit.evaluation.transfer import transfer
from circuitkit.jobs import measuring
from circuitkit.jobs.circuit_files import origin
from circuitkit.jobs.find import load
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.patchers import Patcher
from circuitkit.storage.literature import read
from circuitkit.tasks import Questions, Tokenizer

INTERSECTION = "intersection"
_WIDE = 240

_log = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Removes the sets of ``sets``, and what all of them share, while the model answers the questions of ``question``."""
    if not processes().is_first and not config.model.get("tp_plan"):
        _log.info("job=transfer uses one process; this one has nothing to do.")
        return
    if not isinstance(config.sets, Mapping | DictConfig) or not config.sets:
        raise ConfigError(f"sets must give a label to at least one circuit file, such as {{months: a.json}}; found {config.sets}.")
    files = {str(label): read(Path(str(path))) for label, path in config.sets.items()}
    asked, patcher = questions(config), build(config.patcher, Patcher)
    with measuring.recording(config) as group:
        model = load(config)
        circuits = {label: measuring.on_model(found, model) for label, found in files.items()}
        for label in [label for label, circuit in circuits.items() if circuit.level.of_edges]:
            _log.warning("%s is a circuit of edges: its nodes are removed, whatever edges it has.", label)
        sets = with_intersection({label: circuit.nodes_only() for label, circuit in circuits.items()})
        encoded, left_out = as_tokens(asked, model.tokenizer)
        settings = {key: config[key] for key in ("mlps", "draws", "seed", "examples", "confidence")}
        measuring.start(group, config)
        finding = transfer(model, encoded, sets, patcher, **settings, max_rows=config.engine.get("max_rows"))
        body: Transfer = {**finding.body, "left_out": [*left_out, *finding.body["left_out"]]}
        finding = replace(finding, body=body, provenance=provenance(model, asked, patcher, settings, sets))
        measuring.leave(group, finding, numbers(body))
    show(finding, measuring.folder_of(config))


def questions(config: DictConfig) -> dict[str, Questions]:
    """The question sets that the configuration names, by name."""
    if not config.get("question"):
        raise ConfigError("No question set is named. Choose some, such as question=[numerals_plus_2,addition_1_digit]; job=list shows all.")
    given = {} if config.n is None else {"n": config.n}
    return {str(name): build(node, Questions, **given) for name, node in config.question.items()}


def as_tokens(asked: Mapping[str, Questions], tokenizer: Tokenizer) -> tuple[list[QuestionSet], list[LeftOutTask]]:
    """The question sets as token ids, and those that the tokenizer has no words for.

    Raises:
        PromptError: It has words for none of them.
    """
    encoded: list[QuestionSet] = []
    left_out: list[LeftOutTask] = []
    problem = None
    for name, each in asked.items():
        try:
            encoded.append(replace(each.encoded(tokenizer), name=name))
        except PromptError as error:
            problem = error
            _log.warning("%s", error)
            left_out.append({"name": name, "asked": 0, "solved": 0, "clean_accuracy": None, "reason": str(error)})
    if problem is not None and not encoded:
        raise problem
    return encoded, left_out


def with_intersection(sets: Mapping[str, Circuit]) -> dict[str, Circuit]:
    """The sets, and behind them what all of them share, unless that is nothing."""
    if len(sets) < 2:
        return dict(sets)
    if INTERSECTION in sets:
        raise ConfigError(f"sets must not use the label {INTERSECTION!r}, which is that of what all sets share. Use another one.")
    shared = reduce(and_, sets.values())
    if not shared:
        _log.warning("The sets %s share no component, so their intersection is left out.", ", ".join(sets))
        return dict(sets)
    return {**sets, INTERSECTION: shared}


def provenance(
    model: HookedModel, asked: Mapping[str, Questions], patcher: Patcher, settings: Mapping[str, Any], sets: Mapping[str, Circuit]
) -> dict[str, Any]:
    """Settings, seed, versions, model and the circuits' own hashes."""
    return {
        "settings": {"questions": describe(asked), "patcher": describe(patcher), **settings},
        "seed": settings["seed"],
        "model": {"name": model.name, "revision": model.revision, "dtype": describe(str(model.dtype)), "fingerprint": model.fingerprint()},
        **origin(sets.items()),
    }


def numbers(body: Transfer) -> dict[str, float]:
    """Every accuracy, as numbers to log."""
    rows = body["accuracy"].items()
    return {f"transfer/{label}/{task}": entry["mean"] for task, row in rows for label, entry in row.items()}


def show(finding: Finding[Transfer], folder: Path) -> None:
    """Prints a row a question set: its accuracy without each set of components, and beside it without random ones."""
    body = finding.body
    table = Table(box=None, pad_edge=False)
    table.add_column("question set", no_wrap=True)
    table.add_column("solved", no_wrap=True)
    for entry in body["sets"]:
        size = f"{entry['n_heads']} heads" + (f", {entry['n_mlps']} MLPs" if body["mlps"] else "")
        table.add_column(f"random\n({entry['draws']} draws)" if entry["control"] else f"without {entry['label']}\n({size})", no_wrap=True)
    for task in body["tasks"]:
        cells = [percent(body["accuracy"][task["name"]][entry["label"]]) for entry in body["sets"]]
        table.add_row(task["name"], f"{task['solved']} of {task['asked']}", *cells)
    # A file or pipe keeps whole lines, however wide a table with many sets is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(table)
    console.print(
        f"\nAccuracy in % on what the untouched model solves, with {100 * body['confidence']:g} % intervals. Random: as many components, "
        f"from outside of the set; the mean, lowest and highest draw. Patcher: {body['patcher']}.",
        soft_wrap=True,
    )
    for other in body["left_out"]:
        console.print(f"left out: {other['reason']}", soft_wrap=True)
    console.print(f"folder    {folder}", soft_wrap=True)


def percent(entry: Accuracy) -> str:
    """An accuracy with its interval, in %."""
    return f"{100 * entry['mean']:.0f} [{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"
