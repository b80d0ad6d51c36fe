"""How good one circuit is: its score, what each member is worth, and how random circuits of its size do."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from circuitkit.config import build
from circuitkit.core.bodies import Estimate, Evaluation, RemovedSet
from circuitkit.core.findings import Finding
from circuitkit.evaluation import evaluate
from circuitkit.jobs import measuring
from circuitkit.jobs.circuit_files import label, origin
from circuitkit.jobs.find import load
from circuitkit.storage.literature import read
from circuitkit.tasks import Task

_SHOWN = 12  # members of a table


def run(config: DictConfig) -> None:
    """Evaluates the circuit of a file on the configured task, and says what was found."""
    path = Path(str(config.circuit))
    found, also = read(path), None if config.shared is None else read(config.shared)
    task, parts, settings = build(config.task, Task), measuring.Parts.of(config), measuring.sampling(config, least_draws=1)
    with measuring.recording(config) as group:
        model = load(config)
        circuit, shared = measuring.on_model(found, model), None if also is None else measuring.on_model(also, model)
        circuits = {"circuit": circuit} | ({"shared": shared} if shared is not None else {})
        engine = parts.over(parts.on(model, task, circuits.values()), circuit)
        question = {name: measuring.asked(each) for name, each in circuits.items()} | settings
        with measuring.scorer(engine) as scorer:
            if scorer is None:
                return
            provenance = parts.provenance(engine, task, question) | origin(circuits.items())
            measuring.start(group, config)
            finding = evaluate(scorer, circuit, shared=shared, label=label(path), task=task.name, provenance=provenance, **settings)
            measuring.leave(group, finding, numbers(finding.body))
    show(finding, measuring.folder_of(config))


def numbers(body: Evaluation) -> dict[str, float]:
    """What an evaluation is summed up by."""
    score = body["score"]
    found = {
        "evaluation/score": score["value"],
        "evaluation/low": score["low"],
        "evaluation/high": score["high"],
        "evaluation/prompts": body["n_prompts"],
        "evaluation/random_mean": body["random_circuits"]["mean"],
        "evaluation/share_as_good": body["random_circuits"]["share_as_good"],
        "evaluation/random_head_mean_drop": body["random_head"]["mean_drop"],
        "evaluation/n_edges": body["circuit"].get("n_edges"),
        "evaluation/model_without_circuit": body["sets_removed_from_model"][0]["score"]["value"],
        f"baseline/{body['metric']}": body["clean_mean"],
        f"patched/{body['metric']}": body["patched_mean"],
    }
    return {key: value for key, value in found.items() if value is not None}


def show(finding: Finding[Evaluation], folder: Path) -> None:
    """Prints the evaluation, and where it is."""
    body = finding.body
    circuit, control, whole = body["circuit"], body["random_circuits"], whole_of(body)
    head = Table(show_header=False, box=None, pad_edge=False)
    nodes = f"{circuit['n_heads']} heads, {circuit['n_mlps']} MLPs"
    head.add_row("circuit", f"{circuit['label']}: {circuit.get('size', nodes)}")
    if "frame" in body:
        head.add_row("edges", f"{circuit['n_edges']} of the {body['frame_edges']} in its frame of {len(body['frame'])} components")
    head.add_row("prompts", f"{body['n_prompts']} of {body['task']}, {body['clean_mean']:.3f} {body['unit']} untouched")
    head.add_row("score", f"{measuring.spoken(**body['score'])} % ({100 * body['confidence']:g} % interval)")
    head.add_row("", body["formula"])
    chance = f"p = {control['share_as_good']:.3f}"
    head.add_row("random", f"{control['mean']:.1f} % on average of {len(control['scores'])} circuits of its size, {chance}")
    if body["random_head"]["mean_drop"] is not None:
        head.add_row("any head", "-{mean_drop:.2f} points on average of all {n}, alone; gains count as 0".format(**body["random_head"]))
    members = Table("member", "circuit without it", "drop", f"{whole} without it", "drop", box=None, pad_edge=False)
    ranked = sorted(body["removed_from_circuit"].items(), key=lambda item: -item[1]["drop"])
    for node, removed in ranked[:_SHOWN]:
        alone = body["removed_from_model"][node]
        members.add_row(node, _score(removed), f"{removed['drop']:.1f}", _score(alone), f"{alone['drop']:.1f}")
    if len(ranked) > _SHOWN:
        members.add_row(f"... {len(ranked) - _SHOWN} more", "", "", "", "")
    console = Console(highlight=False)
    console.print(head, "", members, "", _sets(body["sets_removed_from_model"], whole), sep="\n")
    console.print(f"folder    {folder}", soft_wrap=True)


def whole_of(body: Evaluation) -> str:
    """What members are removed from, besides the circuit: the model, or for edges the frame in which they were searched."""
    return "frame" if "frame" in body else "model"


def _sets(entries: list[RemovedSet], whole: str) -> Table:
    """The sets that were removed at once, each with the mean of its controls, and how many members these have to share with it."""
    table = Table(f"removed from the {whole}", "score", "random sets like it", "shared", box=None, pad_edge=False)
    for entry in entries:
        if entry["control_of"] is None:
            control = next(each for each in entries if each["control_of"] == entry["label"])
            row = f"{entry['label']} ({len(entry['nodes'])})", _score(entry["score"]), _score(control["score"])
            table.add_row(*row, f"{control['in_common']:g}")
    return table


def _score(entry: Estimate) -> str:
    return measuring.spoken(entry["value"], entry["low"], entry["high"])
