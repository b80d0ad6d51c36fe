"""The study's findings as small tables, and the check of tables against expected ranges."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from circuitkit import storage
from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding

Row = dict[str, Any]
Tables = dict[str, list[Row]]


def read(study: Path) -> Tables:
    """The tables of a study's folder. The first column of each is the name of its row."""
    tasks = [path.parent.name for path in sorted(study.glob("evaluation/*/evaluation.json"))]
    found: Tables = {
        "circuits": [_circuit(study, task) for task in tasks],
        "edges": [_edges(study, task) for task in tasks],
        "parts": [_parts(study, task) for task in tasks],
        "roles": [row for task in tasks for row in _roles(study, task)],
        "stability": [_stability(study, task) for task in tasks],
    }
    for name, rows in (("compare", _compare), ("cross_task", _cross_task), ("transfer", _transfer)):
        path = study / name / f"{name}.json"
        found[name] = list(rows(storage.load(Finding, path).body)) if path.is_file() else []
    return found


def write(found: Tables, folder: Path) -> list[Path]:
    """Writes each table as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in found.items():
        if rows:
            path = folder / f"{name}.csv"
            with path.open("w", encoding="utf-8", newline="") as opened:
                writer = csv.DictWriter(opened, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
            paths.append(path)
    return paths


def load(folder: Path) -> Tables:
    """Reads tables that ``write`` wrote; every value is a text."""
    found: Tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as opened:
            found[path.stem] = list(csv.DictReader(opened))
    return found


def strays(found: Tables, expected: Path) -> list[str]:
    """What lies outside of the expected ranges, a sentence each.

    Args:
        found: Tables.
        expected: A CSV with the columns table, row, column, low, high. Low and high are numbers, or low is a text that must be in the cell.
    """
    sentences = []
    with expected.open(encoding="utf-8", newline="") as opened:
        for line in csv.DictReader(opened):
            cell = _cell(found, line["table"], line["row"], line["column"])
            where = f"{line['table']}, {line['row']}, {line['column']}"
            wanted = f"{line['low']} to {line['high']}" if line["high"] else line["low"]
            if cell in (None, ""):
                sentences.append(f"{where}: nothing was found, expected {wanted}.")
            elif not line["high"]:
                if line["low"] not in str(cell).split():
                    sentences.append(f"{where}: {line['low']} is not in {cell}.")
            elif not float(line["low"]) <= _number(cell) <= float(line["high"]):
                sentences.append(f"{where}: found {cell}, expected {wanted}.")
    return sentences


def _cell(found: Tables, table: str, row: str, column: str) -> Any:
    return next((each.get(column) for each in found.get(table, ()) if next(iter(each.values())) == row), None)


def _number(cell: Any) -> float:
    """A cell as a number; one that is none lies in no range."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _body(folder: Path, kind: str) -> Mapping[str, Any]:
    return storage.load(Finding, folder / f"{kind}.json").body


def _circuit(study: Path, task: str) -> Row:
    body, circuit = _body(study / "evaluation" / task, "evaluation"), storage.load(Circuit, study / "nodes" / task / "circuit.json")
    row: Row = {"task": task, "heads": len(circuit.heads), "mlps": len(circuit.mlps)}
    row |= {"score": _short(body["score"]["value"]), "low": _short(body["score"]["low"]), "high": _short(body["score"]["high"])}
    control = body["random_circuits"]
    row |= {"random_circuits": _short(control["mean"]), "share_as_good": _short(control["share_as_good"], 3)}
    row["random_head_drop"] = _short(body["random_head"]["mean_drop"])
    for entry in body["sets_removed_from_model"]:
        if entry["control_of"] is None:
            name = entry["label"].replace(body["circuit"]["label"], "circuit").replace("the shared set", "shared").replace(", ", "_")
            row[f"model_without_{name.replace(' ', '_')}"] = _short(entry["score"]["value"])
    dearest = sorted(body["removed_from_circuit"].items(), key=lambda item: -item[1]["drop"])[:5]
    return row | {"dearest": " ".join(f"{name}:{entry['drop']:.1f}" for name, entry in dearest), "members": " ".join(circuit.names)}


def _edges(study: Path, task: str) -> Row:
    body = _body(study / "edges" / task, "edges")
    row: Row = {"task": task, "edges": len(body["edges"]), "kept": len(body["kept"]), "dropped_nodes": " ".join(body["dropped_nodes"])}
    row |= {"node_score": _short(body["node_score"]), "pruned_score": _short(body["score"])}
    dearest = sorted(body["edges"].items(), key=lambda item: item[1])[:8]
    return row | {"dearest": " ".join(f"{name}:{score:.1f}" for name, score in dearest)}


def _parts(study: Path, task: str) -> Row:
    """What the logit lens, direct attribution and OV circuits say."""
    body = _body(study / "roles" / task, "roles")
    row: Row = {"task": task}
    if body.get("logit_lens"):
        lens = body["logit_lens"]
        row |= {"switch_site": lens["switch_site"], "switched_there": _short(lens["switch"].get(lens["switch_site"], 0) / lens["n"], 3)}
    if body.get("attribution"):
        ranked = sorted(body["attribution"]["nodes"].items(), key=lambda item: -abs(item[1]))[:5]
        row |= {"logit_difference": _short(body["attribution"]["total"]), "attribution": " ".join(f"{n}:{v:.2f}" for n, v in ranked)}
    for score in ("copy", "next") if body.get("ov") else ():
        ranked = sorted(body["ov"][score].items(), key=lambda item: -item[1])[:3]
        row[f"ov_{score}"] = " ".join(f"{name}:{value:.0f}" for name, value in ranked)
        row[f"ov_{score}_mean"] = _short(body["ov"][f"mean_{score}"])
    return row


def _roles(study: Path, task: str) -> Iterator[Row]:
    for role, entry in _body(study / "roles" / task, "roles")["roles"].items():
        ranked = sorted(entry["scores"].items(), key=lambda item: -item[1])[:3]
        best = " ".join(f"{name}:{score:.2f}" for name, score in ranked)
        yield {"row": f"{task}/{role}", "best_score": _short(ranked[0][1], 3), "best": best, "found": " ".join(entry["found"])}


def _stability(study: Path, task: str) -> Row:
    body = _body(study / "stability" / task, "stability")
    row: Row = {"task": task, "runs": len(body["runs"])}
    row |= {f"jaccard_{factor}": _short(value, 3) for factor, value in body["mean_jaccard"].items()}
    return row | {"survive_corruptions": " ".join(body["survive_corruptions"]), "survive_all": " ".join(body["survive_all"])}


def _compare(body: Mapping[str, Any]) -> Iterator[Row]:
    for pair in body["pairs"]:
        numbers = {key: _short(pair[key], 4) for key in ("jaccard", "containment")}
        chance = None if pair["p_value"] is None else f"{pair['p_value']:.2g}"  # however small, it is not 0
        yield {"pair": f"{pair['a']}&{pair['b']}", "shared": pair["shared"], **numbers, "p_value": chance}
    yield {"pair": "all", "shared": len(body["shared_by_all"]), "members": " ".join(body["shared_by_all"])}


def _cross_task(body: Mapping[str, Any]) -> Iterator[Row]:
    for label, row in zip(body["circuits"], body["percent"], strict=True):
        yield {"circuit": label} | {task: _short(entry["value"]) for task, entry in zip(body["tasks"], row, strict=True)}


def _transfer(body: Mapping[str, Any]) -> Iterator[Row]:
    for task in body["tasks"]:
        accuracy: Mapping[str, Mapping[str, float]] = body["accuracy"].get(task["name"], {})
        yield {"questions": task["name"], "solved": task["solved"], "asked": task["asked"]} | {
            label: _short(entry["mean"], 3) for label, entry in accuracy.items()
        }


def _short(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)
