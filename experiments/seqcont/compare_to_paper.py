"""Sets a finished study of gpt2 or llama2_7b beside the paper: knock-out maps head by head, circuits by overlap, tables cell by cell.

    python experiments/seqcont/compare_to_paper.py runs/seqcont/gpt2

The reference values (reference.json) are rebuilt from the public outputs of the paper's code; the README says how far to trust them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import UserError
from circuitkit.core.findings import Finding
from circuitkit.storage import load

HERE = Path(__file__).resolve().parent
REFERENCE: Mapping[str, Any] = json.loads((HERE / "reference.json").read_text(encoding="utf-8"))
FAMILIES = {"gpt2": "gpt2", "llama2_7b_chat": "llama2_7b_chat"}
# The paper's rows of the transfer table by the names that question sets have here.
QUESTIONS = {
    "numerals_plus_1": "+1", "numerals_plus_2": "+2", "numerals_plus_3": "+3", "numerals_plus_10": "+10",
    "addition_1_digit": "add_1_digit", "addition_2_digit": "add_2_digit",
    "subtraction_1_digit": "subtract_1_digit", "subtraction_2_digit": "subtract_2_digit",
}  # fmt: skip
SETS = {"shared16": "intersection", "numerals84": "bare_numerals", "numwords82": "bare_numwords", "months64": "bare_months"}
# How tasks are called here whose prompts are the paper's: it has sentences for gpt2, and members alone for Llama.
PREFIXES = {"gpt2": "", "llama2_7b_chat": "bare_"}


@dataclass(frozen=True)
class Line:
    """One number of the paper beside ours.

    Attributes:
        table: Which comparison.
        what: Which number in it.
        paper: The paper's; None where ours is a measure of agreement, such as a correlation.
        ours: Ours.
    """

    table: str
    what: str
    paper: float | None
    ours: float

    @property
    def gap(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None else self.ours - self.paper


def compare(study: Path) -> list[Line]:
    """Every number that both have.

    Raises:
        UserError: No finished run is there, or of a model that the paper does not have.
    """
    circuits = {path.parent.name: load(Circuit, path) for path in sorted(study.glob("nodes/*/circuit.json"))}
    if not circuits:
        raise UserError(f"Expected the folder of a study with nodes/<task>/circuit.json in it, found none in {study}. Run study.py first.")
    model = next(iter(circuits.values())).model
    if model not in FAMILIES:
        raise UserError(f"The paper has numbers for {', '.join(FAMILIES)}, and this study is of {model!r}.")
    lines = [line for task in circuits for line in knockouts(study, task)] if FAMILIES[model] == "gpt2" else []
    lines += [line for task, circuit in circuits.items() for line in overlap(task, circuit, FAMILIES[model])]
    if FAMILIES[model] == "gpt2":
        return [*lines, *cross_task(study), *parts(study, circuits)]
    return [*lines, *transfer(study)]


def knockouts(study: Path, task: str) -> Iterator[Line]:
    """The map of single knock-outs, head by head."""
    path = study / "knockout" / task / "scores.json"
    if task not in REFERENCE["full_knockout_head_pct"] or not path.is_file():
        return
    ours = load(Scores, path).values
    for kind, paper in (("heads", _heads(task)), ("MLPs", _mlps(task))):
        both = [(value, ours[name]) for name, value in paper.items() if name in ours]
        if len(both) < len(paper):
            raise UserError(f"Expected a knock-out map of all {len(paper)} {kind} of the paper, found {len(both)} of them in {path}.")
        yield Line("knockout", f"{task}, correlation over {len(both)} {kind}", None, correlation(both))
        yield Line("knockout", f"{task}, largest gap of {kind} in points", None, max(abs(a - b) for a, b in both))
        yield from (Line("knockout", f"{task}, {name}", value, ours[name]) for name, value in paper.items())


def overlap(task: str, circuit: Circuit, family: str) -> Iterator[Line]:
    """A circuit beside the published one."""
    reference, name = REFERENCE["circuits"][family], task.removeprefix(PREFIXES[family])
    if name not in reference or not task.startswith(PREFIXES[family]):
        return
    heads = {f"a{layer}.h{head}" for layer, head in reference[name]["heads"]}
    mlps = {f"m{layer}" for layer in reference[name]["mlps"]}
    for kind, paper, found in (("heads", heads, circuit.heads), ("MLPs", mlps, circuit.mlps)):
        ours = {str(node) for node in found}
        yield Line("circuit", f"{task}, number of {kind}", len(paper), len(ours))
        yield Line("circuit", f"{task}, Jaccard of {kind}", None, len(paper & ours) / max(1, len(paper | ours)))
    if name in REFERENCE["circuit_score_pct"] and circuit.score is not None and circuit.model == "gpt2":
        yield Line("circuit", f"{task}, score in %", REFERENCE["circuit_score_pct"][name], circuit.score)


def cross_task(study: Path) -> Iterator[Line]:
    """Every circuit on every task, cell by cell."""
    body = _body(study / "cross_task" / "cross_task.json")
    names = {"ioi_gpt2": "ioi_heads_all_mlps"}
    for label, row in zip(body.get("circuits", ()), body.get("percent", ()), strict=True):
        paper = REFERENCE["cross_task_pct"].get(names.get(label, label), {})
        for task, entry in zip(body["tasks"], row, strict=True):
            if task in paper:
                yield Line("cross_task", f"{label} on {task}", paper[task], entry["value"])


def parts(study: Path, tasks: Sequence[str] | Mapping[str, Any]) -> Iterator[Line]:
    """The logit lens' switch in block 9, of which the paper has seen only the end, and the OV scores of head 9.1."""
    for task in tasks:
        body = _body(study / "roles" / task / "roles.json")
        lens, ov = body.get("logit_lens"), body.get("ov")
        if lens and task in REFERENCE["logit_lens_mlp9_switch_fraction"]:
            share = REFERENCE["logit_lens_mlp9_switch_fraction"][task]
            ours = sum(lens["switch"].get(site, 0) for site in ("a9", "m9")) / lens["n"]
            yield Line("parts", f"{task}, share that switches at a9 or m9", share, ours)
        if ov:
            for score, value in REFERENCE["ov_scores_head_9_1"].get(task, {}).items():
                yield Line("parts", f"{task}, {score} score of a9.h1 in %", value, ov[score]["a9.h1"])


def transfer(study: Path) -> Iterator[Line]:
    """Accuracy without sets of heads, cell by cell."""
    body = _body(study / "transfer" / "transfer.json")
    accuracy, removed = body.get("accuracy", {}), {each["label"] for each in body.get("sets", ()) if not each["control"]}
    same = removed == set(SETS.values())  # else the intersection is of other circuits than the paper's
    table = REFERENCE["llama2_7b_chat_zero_ablation_accuracy"]
    for ours, paper in QUESTIONS.items():
        for column, value in zip(table["columns"], table[paper], strict=True):
            label = SETS.get(column)
            if label in accuracy.get(ours, {}) and (same or label != "intersection"):
                yield Line("transfer", f"{ours} without {label}", value, accuracy[ours][label]["mean"])


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's."""
    mean_a, mean_b = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    spread = (sum((a - mean_a) ** 2 for a, _ in pairs) * sum((b - mean_b) ** 2 for _, b in pairs)) ** 0.5
    return sum((a - mean_a) * (b - mean_b) for a, b in pairs) / spread if spread else 0.0


def write(lines: Sequence[Line], path: Path) -> Path:
    """Writes every line as CSV."""
    with path.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, ["table", "what", "paper", "ours", "gap"])
        writer.writeheader()
        writer.writerows({**asdict(line), "gap": line.gap} for line in lines)
    return path


def show(lines: Sequence[Line]) -> str:
    """The lines as text, without the single heads and MLPs of the knock-out maps, which are in the file."""
    shown = [line for line in lines if line.table != "knockout" or line.paper is None]
    rows = [(line.table, line.what, _number(line.paper), _number(line.ours), _number(line.gap)) for line in shown]
    rows.insert(0, ("table", "what", "paper", "ours", "gap"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _heads(task: str) -> dict[str, float]:
    rows = REFERENCE["full_knockout_head_pct"][task]
    return {f"a{layer}.h{head}": value for layer, row in enumerate(rows) for head, value in enumerate(row)}


def _mlps(task: str) -> dict[str, float]:
    return {f"m{layer}": value for layer, value in enumerate(REFERENCE["full_knockout_mlp_pct"][task])}


def _body(path: Path) -> Mapping[str, Any]:
    return load(Finding, path).body if path.is_file() else {}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    study: Path = parser.parse_args(arguments).study
    try:
        lines = compare(study)
        sys.stdout.write(f"{show(lines)}\nwritten: {write(lines, study / 'compare_to_paper.csv')}\n")
    except UserError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
