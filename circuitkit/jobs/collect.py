"""One table of a sweep: a row a job, whatever became of it. It loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuitkit.config import check_plain
from circuitkit.core.errors import ConfigError
from circuitkit.jobs import folders
from circuitkit.jobs.sweep_table import write
from circuitkit.storage import run_folder
from circuitkit.storage.run_folder import JOB, STATUS

Row = dict[str, Any]

_SHOWN = {"circuit/score": "score", "circuit/size": "size", "circuit/n_heads": "heads", "circuit/n_mlps": "MLPs",
          "circuit/n_edges": "edges", "seconds": "seconds"}  # fmt: skip
_DONE = ("finished", "skipped")


def run(config: DictConfig) -> None:
    """Collects the jobs below ``dir``, prints them, and writes ``collect.parquet``, ``collect.csv`` and ``collect.html`` there.

    Raises:
        ConfigError: ``dir`` is not given, or holds no jobs.
    """
    if config.dir is None or not Path(config.dir).is_dir():
        raise ConfigError(f"dir must be the folder of a sweep, such as multirun/2030-01-31/12-00-00; found {config.dir}.")
    root = Path(config.dir)
    check_plain(root, root.glob("collect.*"))
    rows = collect(root)
    if not rows:
        raise ConfigError(f"There are no jobs below {root}. Expected folders with {JOB} or {STATUS}, as `circuitkit -m` leaves them.")
    paths = write(rows, root, summary(rows))
    show(rows, paths)


def collect(root: Path) -> list[Row]:
    """A row for each job below a folder, in their order; each row has only what is known of it."""
    return [row(folder, root) for folder in sorted(set(_jobs(root)), key=lambda folder: (folder.parent, _number(folder), folder.name))]


def row(folder: Path, root: Path) -> Row:
    """What is known of one job: which settings it was given, what became of it, and its numbers."""
    job, status = run_folder.job(folder), run_folder.status(folder)
    source = folder / job["same_as"] if "same_as" in job else folder
    found: Row = {
        "run": job.get("number"),
        "folder": folder.relative_to(root).as_posix(),
        "status": job.get("status") or status.get("status"),
        "error": job.get("error"),
        **dict(_override(each) for each in job.get("overrides", ())),
        **folders.numbers(source),
        "seconds": round(job["ended"] - job["started"], 3) if {"started", "ended"} <= set(job) else status.get("duration"),
        "content_hash": job.get("content_hash") or folders.content_hash(source),
        "same_as": job.get("same_as"),
    }
    return {key: value for key, value in found.items() if value is not None}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many jobs there are, and what became of them."""
    counts = Counter(str(each.get("status", "unknown")) for each in rows)
    done = sum(counts[status] for status in _DONE)
    return f"{len(rows)} jobs, {done} done: " + ", ".join(f"{count} {status}" for status, count in counts.most_common())


def show(rows: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Prints a line a job: the settings in which jobs differ, and the main numbers; then the errors."""
    columns = [*differing(rows), *(key for key in _SHOWN if any(key in each for each in rows))]
    table = Table("run", "status", *(_SHOWN.get(key, key) for key in columns), box=None, pad_edge=False)
    for each in rows:
        cells = [each.get("run", each["folder"]), each.get("status", ""), *(each.get(key, "") for key in columns)]
        table.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    console.print("")
    for each in rows:
        if "error" in each:
            console.print(f"{each.get('run', each['folder'])}: {each['error']}", soft_wrap=True, markup=False)
    console.print(summary(rows))
    console.print(f"written: {' '.join(map(str, paths))}", soft_wrap=True, markup=False)


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings on the command line that are not the same for all jobs."""
    numbers = {key for each in rows for key, value in each.items() if not isinstance(value, str) or "/" in key}
    fixed = {"run", "folder", "status", "error", "seconds", "content_hash", "same_as"}
    keys = list(dict.fromkeys(key for each in rows for key in each if key not in fixed | numbers))
    known = [each for each in rows if "run" in each]
    return [key for key in keys if len({each.get(key) for each in known}) > 1]


def _jobs(root: Path) -> Iterator[Path]:
    """Folders of jobs: those of a sweep, else of single runs. What lies below the folder of a job belongs to it."""
    for file in (JOB, STATUS):
        for path in root.rglob(file):
            above = path.parent.relative_to(root).parts
            inner = any((parent / JOB).is_file() for parent in path.parent.parents if parent.is_relative_to(root))
            if not inner and not any(part.startswith((".", "previous-")) for part in above):
                yield path.parent


def _number(folder: Path) -> int:
    """Of the job: as it says itself, or else as its folder's name begins."""
    number = run_folder.job(folder).get("number", folder.name.partition("_")[0])
    return int(number) if str(number).isdecimal() else 0


def _override(text: str) -> tuple[str, str]:
    key, _, value = str(text).partition("=")
    return key.lstrip("+~"), value
