"""The whole study of one model: circuits, edges, what tasks share, what removing it breaks, what each part does, and a report.

    python experiments/seqcont/study.py tiny_gpt2

runs one circuitkit command after the other in one process, prints each, and leaves out those that have finished before. Settings are in
conf/experiment/<name>.yaml, and serve commands typed by hand too: circuitkit --config-dir experiments/seqcont/conf +experiment=<name>
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from circuitkit.cli import main as circuitkit

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf"
sys.path.insert(0, str(HERE))

import tables  # noqa: E402  beside this file


@dataclass(frozen=True)
class Command:
    """One circuitkit command.

    Attributes:
        folder: Where it leaves its results, below the study's folder.
        overrides: Its settings.
        result: The file that is there once it has finished; None to run it every time.
    """

    folder: str
    overrides: tuple[str, ...]
    result: str | None


def commands(study: DictConfig, folder: Path, prompts: Sequence[str]) -> Iterator[Command]:
    """Every command of the study, in order.

    Args:
        study: The ``study`` part of an experiment file.
        folder: Of the study.
        prompts: Overrides behind those of every job that draws prompts.
    """
    drawn = (*study.prompts, *prompts)
    found = {task: folder / "nodes" / task / "circuit.json" for task in study.tasks}
    controls = {str(each): _control(str(each), folder) for each in study.controls}
    for task in [*study.tasks, *(name for name in controls if not name.endswith(".json"))]:
        yield Command(f"nodes/{task}", (f"task={task}", *drawn, *study.nodes), "circuit.json")
    circuits = f"circuits=[{','.join(map(str, found.values()))}]"
    yield Command("compare", ("job=compare", circuits), "compare.json")
    shared = folder / "compare" / "shared.json"
    for task, circuit in found.items():
        given = (f"task={task}", *drawn)
        yield Command(f"knockout/{task}", (*given, "method=knockout"), "scores.json")
        yield Command(f"edges/{task}", (*given, "method=edge_pruning", f"method.circuit={circuit}", *study.edges, *prompts), "edges.json")
        evaluation = (*given, "job=evaluate", f"circuit={circuit}", *([f"shared={shared}"] if shared.exists() else []), *study.evaluation)
        yield Command(f"evaluation/{task}", evaluation, "evaluation.json")
        yield Command(f"roles/{task}", (*given, "job=roles", f"circuit={circuit}", *study.roles), "roles.json")
        yield Command(f"stability/{task}", (*given, "job=stability", *study.stability, *prompts), "stability.json")
    tasks = f"tasks=[{','.join(study.tasks)}]"
    against = f"controls=[{','.join(map(str, controls.values()))}]"
    yield Command("cross_task", ("job=cross_task", circuits, tasks, against, *drawn, *study.cross_task), "cross_task.json")
    sets = ",".join(f"{task}:{found[task]}" for task in study.get("removed", study.tasks))
    yield Command("transfer", ("job=transfer", f"sets={{{sets}}}", *study.transfer), "transfer.json")
    yield Command("", ("job=report", f"run={folder}"), None)


def run(experiment: str, folder: Path, prompts: Sequence[str] = ()) -> None:
    """Runs what has not finished, then writes the tables.

    Raises:
        SystemExit: A command failed, or the folder is of other settings; it was said why.
    """
    settings = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    folder = folder.resolve()
    _note(OmegaConf.to_yaml({"experiment": experiment, "prompts": list(prompts), "settings": settings}), folder)
    for command in commands(settings.study, folder, prompts):
        place = folder / command.folder
        if command.result is not None and (place / command.result).is_file():
            continue
        arguments = _arguments(command, place, experiment)
        sys.stdout.write(f"\n$ circuitkit {shlex.join(arguments)}\n")
        sys.stdout.flush()
        started = time.perf_counter()
        circuitkit(arguments)
        sys.stdout.write(f"({time.perf_counter() - started:.1f} s)\n")
    written = tables.write(tables.read(folder), folder / "tables")
    sys.stdout.write(f"\nwritten: {' '.join(str(path) for path in written)}\n")


def _arguments(command: Command, place: Path, experiment: str) -> list[str]:
    """What to run: the command, or the rest of it where a search was stopped in the middle."""
    if (place / "journal.jsonl").is_file() and (place / "config.yaml").is_file():
        return [f"resume={place}"]
    own = () if command.result is None else (f"dir={place}", *(() if command.folder == "compare" else ("overwrite=true",)))
    return ["--config-dir", str(CONF), f"+experiment={experiment}", *command.overrides, *own]


def _note(settings: str, folder: Path) -> None:
    """Keeps what a study is run with: what is left out because it has finished must have run with the same."""
    path, has_begun = folder / "study.yaml", any(folder.glob("nodes/*/circuit.json"))
    if has_begun and path.is_file() and path.read_text(encoding="utf-8") != settings:
        sys.exit(f"{folder} holds a study with other settings, see {path.name} there. Name another folder (--dir), or remove that one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(settings, encoding="utf-8")
    except OSError as error:
        sys.exit(f"Expected to be able to write into {folder}, but: {error}. Name another folder (--dir).")


def _control(name: str, folder: Path) -> Path:
    return HERE / name if name.endswith(".json") else folder / "nodes" / name / "circuit.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    choices = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=choices)
    parser.add_argument("--dir", type=Path, help="folder of the study; runs/seqcont/<experiment> if none is given")
    parser.add_argument("--prompts", type=int, help="prompts a template in every job, instead of the experiment's own numbers")
    chosen = parser.parse_args(arguments)
    prompts = [] if chosen.prompts is None else [f"task.n={chosen.prompts}"]
    run(chosen.experiment, chosen.dir or Path("runs") / "seqcont" / chosen.experiment, prompts)


if __name__ == "__main__":
    main()
