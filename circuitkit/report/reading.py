"""What lies in a folder: circuits, scores, findings and runs, at any depth. What is damaged is named in a sentence and left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from circuitkit.core import plain
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError
from circuitkit.core.findings import Finding, check_body
from circuitkit.storage import run_folder
from circuitkit.storage.reading import read_text

T = TypeVar("T")

FIGURES = "figures"
_KNOWN = ("circuit.json", "scores.json", "evaluation.json", "cross_task.json", "compare.json", "stability.json", "edges.json", "roles.json",
          "transfer.json")  # fmt: skip
_NOT_RESULTS = (run_folder.STATUS, run_folder.JOB)
_MAX_ROWS = 500_000  # more than a curve can show


@dataclass(frozen=True)
class Located(Generic[T]):
    """A result and where it was found.

    Attributes:
        label: A short name for people: the folder's, or the file's where the folder holds several of the kind.
        path: Of the file, below the folder that was read.
        what: The result.
    """

    label: str
    path: str
    what: T


@dataclass(frozen=True)
class RunFolder:
    """The plain files of one run.

    Attributes:
        label: Name of its folder.
        config: Text of ``config.yaml``; secrets were left out when it was written.
        status: Content of ``status.json``.
        steps: What was logged at each evaluated candidate of the search.
        numbers: What was logged for the whole run.
    """

    label: str
    config: str
    status: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """Everything that a report is made of.

    Attributes:
        name: Of the folder.
        circuits: Circuit files.
        scores: Files with a number for each node, or for each drawn circuit.
        findings: What evaluations and analyses left.
        runs: Folders of runs.
        problems: A sentence for each file that could not be used.
    """

    name: str
    circuits: tuple[Located[Circuit], ...] = ()
    scores: tuple[Located[Scores], ...] = ()
    findings: tuple[Located[Finding[Any]], ...] = ()
    runs: tuple[RunFolder, ...] = ()
    problems: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> tuple[Located[Finding[Any]], ...]:
        """The findings of one kind."""
        return tuple(each for each in self.findings if each.what.kind == kind)


def read(folder: Path) -> Material:
    """Reads a run folder, or a folder with such folders and findings at any depth.

    Args:
        folder: Hidden folders, ``previous-<n>`` and the report's own figures are passed by.
    """
    circuits: list[Located[Circuit]] = []
    scores: list[Located[Scores]] = []
    findings: list[Located[Finding[Any]]] = []
    problems: list[str] = []
    for path in _files(folder, ".json"):
        where, label = path.relative_to(folder).as_posix(), _label(path)
        try:
            found = _result(path, where)
        except CircuitError as error:
            problems.append(f"{' '.join(str(error).split())} It was left out.")
            continue
        if isinstance(found, Circuit):
            circuits.append(Located(label, where, found))
        elif isinstance(found, Scores):
            scores.append(Located(label, where, found))
        elif found is not None:
            findings.append(Located(label, where, found))
    runs = tuple(_run(path.parent, folder) for path in _files(folder, ".yaml") if path.name == "config.yaml")
    name = folder.resolve().name
    return Material(name, tuple(_unique(circuits)), tuple(_unique(scores)), tuple(_unique(findings)), runs, tuple(problems))


def _files(folder: Path, suffix: str) -> Iterator[Path]:
    for path in sorted(folder.rglob(f"*{suffix}")):
        above = path.relative_to(folder).parts[:-1]
        if not path.is_dir() and not any(part.startswith((".", "previous-")) or part in (FIGURES, "wandb") for part in above):
            yield path


def _result(path: Path, where: str) -> Circuit | Scores | Finding[Any] | None:
    """What a file holds; None for a JSON file that is none of ours."""
    if path.name in _NOT_RESULTS:
        return None
    known = path.name in _KNOWN
    try:
        text = read_text(path, "result")
        body = plain.parse(text)
    except (CircuitError, ValueError) as error:
        if known:
            raise CircuitError(f"{where} is damaged or cut off ({str(error).splitlines()[0]}). Make it again.") from error
        return None
    if not isinstance(body, dict) or "format_version" not in body:
        if path.name == "compare.json" and isinstance(body, dict) and {"circuits", "pairs"} <= set(body):  # not every version seals it
            check_body("compare", body, where)
            return Finding("compare", "", body)
        if known:
            raise CircuitError(f"{where} is no result of circuitkit: it has no format_version. Give a file that a run left.")
        return None
    if "kind" in body:
        return Finding.from_json(text, where)
    return Scores.from_json(text, where) if "values" in body else Circuit.from_json(text, where)


def _label(path: Path) -> str:
    """Its folder's name for a file with a usual name, else the file's own."""
    return path.parent.resolve().name if path.name in _KNOWN else path.stem


def _unique(found: list[Located[Any]]) -> Iterator[Located[Any]]:
    """The same with labels that tell those of one kind apart."""
    keys = [(each.label, getattr(each.what, "kind", "")) for each in found]
    for each, key in zip(found, keys, strict=True):
        yield each if keys.count(key) == 1 else Located(each.path.rpartition("/")[0] or each.label, each.path, each.what)


def _run(folder: Path, root: Path) -> RunFolder:
    rows = list(islice(run_folder.rows(folder), _MAX_ROWS))
    return RunFolder(
        folder.relative_to(root).as_posix() if folder != root else folder.resolve().name,
        run_folder.text(folder / run_folder.CONFIG),
        run_folder.status(folder),
        tuple(row for row in rows if isinstance(row.get("step"), int)),
        {key: value for row in rows if row.get("step") is None for key, value in row.items() if key not in ("step", "time")},
    )
