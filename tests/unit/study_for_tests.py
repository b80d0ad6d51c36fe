"""A study folder with a result of every kind, for tests of the report: random but plausible numbers, always the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from circuitkit.core.bodies import BODIES
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.findings import Finding
from circuitkit.core.node import Kind, Node
from circuitkit.core.universe import Universe
from circuitkit.storage import save_finding

TASKS = ("numerals", "numwords", "months")
SHARED = ("a0.h1", "a4.h4", "a7.h11", "a9.h1", "m0", "m8", "m9", "m10")
OWN = {
    "numerals": ("a1.h5", "a6.h1", "a8.h8", "a5.h1", "m1", "m7"),
    "numwords": ("a1.h5", "a6.h1", "a8.h1", "a10.h2", "m2", "m7"),
    "months": ("a6.h6", "a8.h8", "a8.h1", "a10.h7", "m2", "m11"),
}
TOKENS = "<bos>| Van| done| in| 1|.| Hat| done| in| 2|.| Ring| done| in| 3|.| Sun| done| in".split("|")


def write_study(folder: Path, *, model: str = "gpt2", n_layers: int = 12, n_heads: int = 12, evil: str = "") -> Path:
    """Writes three runs with a circuit and a knock-out each, and every kind of finding.

    Args:
        folder: Where to.
        model: Name of the model.
        n_layers: Of the model; nodes are folded into it.
        n_heads: A layer.
        evil: A text to add to every label, prompt and name.
    """
    drawing = random.Random(0)
    circuits = {task: _circuit(task, model, n_layers, n_heads, evil) for task in TASKS}
    labels = {task: f"{task}{evil}" for task in TASKS}
    for task, circuit in circuits.items():
        run = folder / task
        run.mkdir(parents=True)
        (run / "circuit.json").write_text(circuit.to_json())
        _run_files(run, task, circuit, drawing)
        (folder / f"knockout-{task}").mkdir()
        (folder / f"knockout-{task}" / "scores.json").write_text(_knockout(circuit, drawing).to_json())
        save_finding(Finding("evaluation", f"Evaluation: {labels[task]}", evaluation(labels[task], circuit, drawing, evil)), run)
    first = circuits["numerals"]
    (folder / "random").mkdir()
    draws = {f"draw{number}": drawing.gauss(5, 9) for number in range(40)}
    (folder / "random" / "scores.json").write_text(Scores(draws, "% of the untouched model", n_layers, n_heads, model).to_json())
    save_finding(Finding("edges", f"Paths of {labels['numerals']}", edges(labels["numerals"], first, drawing)), folder / "paths")
    save_finding(Finding("cross_task", "", cross_task(model, [*labels.values()], drawing)), folder)
    save_finding(Finding("compare", "", compare(labels, circuits)), folder)
    save_finding(Finding("stability", "", stability(labels["numerals"], model, first, drawing)), folder / "stability")
    save_finding(Finding("roles", f"Roles in {labels['numerals']}", roles(model, first, drawing, evil)), folder / "roles")
    save_finding(Finding("transfer", "", transfer(model, first, drawing, evil)), folder)
    return folder


def evaluation(label: str, circuit: Circuit, drawing: random.Random, evil: str = "") -> dict[str, Any]:
    """The body of an evaluation."""
    graph = Universe.of_nodes(circuit.n_layers, circuit.n_heads)
    removed = {name: _drop(circuit.score or 80.0, abs(drawing.gauss(12, 14))) for name in circuit.names}
    alone = {str(node): _drop(100.0, abs(drawing.gauss(14 if node in circuit.nodes else 0.5, 4))) for node in graph.nodes}
    prompts = []
    for number in range(60):
        clean = drawing.gauss(5.5, 1.2)
        text = f"Van done in {number}. Hat done in{evil}"
        group = ("names", "lost", "done")[number % 3]
        prompts.append({"text": text, "group": group, "clean": clean, "circuit": clean * drawing.gauss(0.8, 0.1)})
    return {
        "circuit": {"label": label, "nodes": list(circuit.names), "n_heads": len(circuit.heads), "n_mlps": len(circuit.mlps)},
        "task": label, "model": circuit.model, "metric": "logit_diff", "unit": "logits", "n_prompts": 60, "clean_mean": 5.512,
        "patched_mean": -0.021, "score": _about(circuit.score or 80.0, 2.0), "confidence": 0.95, "resamples": 1000, "prompts": prompts,
        "removed_from_circuit": removed, "removed_from_model": alone, "random_head": {"mean_drop": 1.4, "n": 20, "drops": {}},
        "random_circuits": {"scores": [drawing.gauss(5, 9) for _ in range(40)], "mean": 5.2, "share_as_good": 0.0},
        "sets_removed_from_model": [
            {"label": f"the circuit{evil}", "nodes": list(circuit.names), "score": _about(3.0, 2.0), "control_of": None}
        ],
    }  # fmt: skip


def edges(label: str, circuit: Circuit, drawing: random.Random) -> dict[str, Any]:
    """The body of a search of edges."""
    graph = EdgeUniverse(circuit.nodes)
    scores = {str(edge): 81.0 - abs(drawing.gauss(0, 1)) ** 3 for edge in graph.edges}
    kept = [name for name, score in scores.items() if score < 80.0]
    return {
        "task": label, "model": circuit.model, "nodes": list(circuit.names), "level": "edge_qkv", "rule": "single", "mlps": "recompute",
        "threshold": 80.0, "node_score": 81.0, "score": 71.3, "edges": scores, "kept": kept, "dropped_nodes": [],
    }  # fmt: skip


def cross_task(model: str, labels: list[str], drawing: random.Random) -> dict[str, Any]:
    """The body of a cross-task matrix."""
    rows = [*labels, "random"]
    percent = [[_about(81 if row == task else 60 if row != "random" else 4, 3 + drawing.random()) for task in labels] for row in rows]
    return {"model": model, "circuits": rows, "tasks": labels, "percent": percent, "controls": ["random"],
            "n_prompts": dict.fromkeys(labels, 512), "members": {}, "random_scores": {}, "draws": 1, "confidence": 0.95,
            "resamples": 1000}  # fmt: skip


def compare(labels: dict[str, str], circuits: dict[str, Circuit]) -> dict[str, Any]:
    """The body of a comparison."""
    names = list(labels)
    pairs = [
        {"a": labels[a], "b": labels[b], "shared": len(circuits[a] & circuits[b]), "jaccard": circuits[a].jaccard(circuits[b]),
         "containment": 0.71, "p_value": 3.2e-7}
        for place, a in enumerate(names) for b in names[place + 1 :]
    ]  # fmt: skip
    rows = {
        labels[task]: {"model": each.model, "heads": len(each.heads), "mlps": len(each.mlps), "score": each.score, "nodes": [*each.names]}
        for task, each in circuits.items()
    }
    return {"circuits": rows, "pairs": pairs, "shared_by_all": [], "union": [], "universe": {"heads": 144, "mlps": 12}}


def stability(label: str, model: str, circuit: Circuit, drawing: random.Random) -> dict[str, Any]:
    """The body of a stability study."""
    graph = Universe.of_nodes(circuit.n_layers, circuit.n_heads)
    shares = {str(node): 1.0 if node in circuit.nodes[::2] else max(0.0, drawing.gauss(0.05, 0.15)) for node in graph.nodes}
    runs = [{"label": f"run {number}", "corruption": ("random", "repeat")[number % 2], "seed": number // 2, "order": "backward",
             "threshold": 0.8, "score": 80.5, "nodes": list(circuit.names)} for number in range(6)]  # fmt: skip
    members = list(circuit.names[::2])
    return {"task": label, "model": model, "runs": runs, "nodes": {name: {"share": min(1.0, share)} for name, share in shares.items()},
            "survive_all": members, "survive_corruptions": members, "mean_jaccard": {"all": 0.61, "corruption": 0.55, "seed": 0.82,
            "order": None, "threshold": 0.7}}  # fmt: skip


def roles(model: str, circuit: Circuit, drawing: random.Random, evil: str = "") -> dict[str, Any]:
    """The body of an analysis of roles."""
    tokens = [f"{token}{evil}" if place == 3 else token for place, token in enumerate(TOKENS)]
    heads = [str(node) for node in circuit.heads]
    all_heads = [str(node) for node in Universe.of_nodes(circuit.n_layers, circuit.n_heads).nodes if node.kind is Kind.HEAD]
    sites = ["input", *(f"{kind}{layer}" for layer in range(circuit.n_layers) for kind in "am")]
    switch = int(0.8 * len(sites))
    answer = [min(1.0, max(0.0, (place - switch + 1) / 3)) for place in range(len(sites))]
    ov = {key: {head: max(0.0, drawing.gauss(mean, 7)) for head in all_heads} for key, mean in (("copy", 4), ("next", 2))}
    ov["next"][heads[-1]], ov["copy"][heads[-1]], ov["copy"][heads[-2]] = 87.4, 59.3, 95.1
    return {
        "model": model, "task": "numerals", "circuit": None,
        "groups": {f"names{evil}": {"tokens": tokens, "labels": {"S1": 4, "last": 18}}},
        "patterns": {head: {"group": f"names{evil}", "mean": attention_of(len(tokens), drawing)} for head in heads[:5]},
        "roles": {"successor": {"description": f"attends to the newest member{evil}", "scores": {heads[-1]: 0.61}, "found": [heads[-1]]},
                  "duplicate token": {"description": "attends to the same token", "scores": {}, "found": []}},
        "heads": {heads[-1]: {"successor": {"score": 0.61, "chance": 0.004}}, heads[0]: {}},
        "ov": {"k": 5, "definition": "Members are read after block 0.", **ov, "mean_copy": 5.73, "mean_next": 3.29, "n": 512},
        "logit_lens": {"sites": sites, "answer_top1": answer, "wrong_top1": [0.9 * (1 - each) for each in answer],
                       "answer_logit": [place / 2 + 4 * each for place, each in enumerate(answer)],
                       "wrong_logit": [place / 2 + 2 for place in range(len(sites))], "switch": {sites[switch]: 480},
                       "switch_site": sites[switch], "switch_top1": {}, "n": 512},
        "attribution": {"nodes": {str(node): drawing.gauss(0.3, 0.8) for node in Universe.of_nodes(circuit.n_layers, circuit.n_heads)},
                        "total": 5.4, "unit": "logits"},
        "skipped": {"QK": f"the model shares keys between heads{evil}"},
    }  # fmt: skip


def transfer(model: str, circuit: Circuit, drawing: random.Random, evil: str = "") -> dict[str, Any]:
    """The body of a transfer table."""
    tasks = [f"next month{evil}", "next number", "word problems", "greater than"]
    size = {"n_heads": 4, "n_mlps": 0}
    sets = [{"label": "circuit", "nodes": list(circuit.names), "control": False, "draws": 1, **size},
            {"label": "shared heads", "nodes": list(circuit.names[:4]), "control": False, "draws": 1, **size},
            {"label": "random heads", "nodes": [], "control": True, "draws": 10, **size}]  # fmt: skip
    accuracy: dict[str, Any] = {}
    for task in tasks:
        accuracy[task] = {}
        for each in sets:
            mean = drawing.uniform(0.6, 0.9) if each["control"] else drawing.uniform(0.05, 0.5)
            draws = [min(1.0, max(0.0, drawing.gauss(mean, 0.1))) for _ in range(10)] if each["control"] else [mean]
            accuracy[task][each["label"]] = {"mean": mean, "low": mean - 0.06, "high": mean + 0.05, "draws": draws}
    prompt = f"January February March{evil}"
    examples = [{"task": tasks[0], "prompt": prompt, "answer": " April", "set": "circuit", "generated": f" March{evil}\n"}]
    asked = [{"name": task, "asked": 64, "solved": 60, "clean_accuracy": 0.9375} for task in tasks]
    return {"model": model, "patcher": "zero", "mlps": False, "confidence": 0.95, "seed": 0, "tasks": asked, "left_out": [], "sets": sets,
            "accuracy": accuracy, "examples": examples}  # fmt: skip


def whole(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    """The body of a finding with what a test does not care for: nothing, none or zero."""
    found: dict[str, Any] = _whole(part, BODIES[kind])
    return found


def _whole(part: Any, declared: Any) -> Any:
    if is_typeddict(declared):
        entries = get_type_hints(declared)
        filled = {key: _whole(part.get(key, _BLANK.get(get_origin(of) or of, {})), of) for key, of in entries.items()
                  if key in part or key in declared.__required_keys__}  # fmt: skip
        return {**part, **filled}
    if get_origin(declared) is list:
        return [_whole(each, get_args(declared)[0]) for each in part]
    if get_origin(declared) is dict:
        return {key: _whole(each, get_args(declared)[1]) for key, each in part.items()}
    return part


_BLANK: dict[Any, Any] = {str: "", int: 0, float: 0.0, bool: False, list: [], UnionType: None}


def _circuit(task: str, model: str, n_layers: int, n_heads: int, evil: str) -> Circuit:
    nodes = set()
    for node in map(Node.parse, (*SHARED, *OWN[task])):
        layer = node.layer % n_layers
        nodes.add(Node.of_mlp(layer) if node.head is None else Node.of_head(layer, node.head % n_heads))
    method = {"_target_": "circuitkit.methods.IterativePruning", "threshold": 0.8}
    settings = {"task": {"_target_": f"circuitkit.tasks.{task.title()}{evil}", "n": 64}, "method": method}
    return Circuit(tuple(nodes), n_layers, n_heads, model, 80.4, provenance={"settings": settings, "seed": 0, "n_prompts": 192})


def _run_files(run: Path, task: str, circuit: Circuit, drawing: random.Random) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"task": task, "dir": str(run.name)}))
    (run / "status.json").write_text(json.dumps({"name": task, "status": "finished", "files": ["circuit.json"]}))
    graph = Universe.of_nodes(circuit.n_layers, circuit.n_heads)
    lines, size, score = [{"step": None, "baseline/logit_diff": 5.5}], len(graph), 100.0
    for order, node in enumerate(graph.nodes):
        kept = node in circuit.nodes
        size -= not kept
        score = max(80.2, score - drawing.random() * 0.3) if not kept else score
        shown = score - abs(drawing.gauss(15, 10)) if kept else score
        lines.append({"step": order, "step/score": shown, "step/size": size, "step/node": str(node), "step/kept": kept, "step/sweep": 0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _knockout(circuit: Circuit, drawing: random.Random) -> Scores:
    graph = Universe.of_nodes(circuit.n_layers, circuit.n_heads)
    values = {str(node): 100 - abs(drawing.gauss(14, 12)) if node in circuit.nodes else drawing.gauss(100, 1.2) for node in graph.nodes}
    return Scores(values, "% of the untouched model", circuit.n_layers, circuit.n_heads, circuit.model)


def attention_of(n: int, drawing: random.Random) -> list[list[float]]:
    """A causal attention pattern that mostly looks at the first token."""
    rows = []
    for row in range(n):
        weights = [drawing.random() ** 4 for _ in range(row + 1)]
        weights[0] += 1.0
        rows.append([weight / sum(weights) for weight in weights] + [0.0] * (n - row - 1))
    return rows


def _about(value: float, reach: float) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def _drop(before: float, drop: float) -> dict[str, float]:
    return {**_about(before - drop, 1.5), "drop": drop, "drop_low": drop - 1.5, "drop_high": drop + 1.5}
