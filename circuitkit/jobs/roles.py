"""What each part of a model does on a task: attention roles, copy and next scores, logit lens, direct attribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from circuitkit import storage
from circuitkit.analysis import (
    OTHER_MEMBER,
    ROLES,
    MeanPattern,
    Role,
    best,
    chance,
    direct_attribution,
    logit_lens,
    mean_patterns,
    ov_scores,
    repeated_tokens,
    role_scores,
)
from circuitkit.analysis.logit_lens import most_common
from circuitkit.analysis.roles import member_positions
from circuitkit.config import build
from circuitkit.core.circuit import Circuit
from circuitkit.core.describe import describe
from circuitkit.core.errors import ConfigError, UserError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.role_bodies import (
    AttentionPattern,
    Attribution,
    LogitLens,
    OVScores,
    PlayedRole,
    RoleParts,
    Roles,
    RoleScores,
    RolesInModel,
)
from circuitkit.engine.filtering import Solves
from circuitkit.jobs import measuring
from circuitkit.jobs.find import load
from circuitkit.loggers.redaction import redacted
from circuitkit.models.attention import eager_attention
from circuitkit.models.hooked import HookedModel
from circuitkit.results import versions
from circuitkit.tasks import Task, words

T = TypeVar("T")

ORDINALS = "ordinals"
SETTINGS = ("circuit", "threshold", "top", "top_tokens", "ov_prompts", "successors")


def run(config: DictConfig) -> None:
    """Looks at the parts, hands ``roles.json`` to the run's folder and the loggers, and prints a summary."""
    check(config)
    circuit = None if config.circuit is None else storage.load(Circuit, config.circuit)
    task = build(config.task, Task)
    following = successors(config.successors, task)
    settings = {key: OmegaConf.to_container(config)[key] for key in SETTINGS}  # type: ignore[index,call-overload]
    with measuring.recording(config) as group:
        model = load(config)
        if circuit is not None:
            circuit.check_fits(model.n_layers, model.n_heads, model.name)
        prompts = task.prompts(model.tokenizer, accept=Solves(model) if task.filter else None)
        measuring.start(group, config)
        body: Roles = {"task": task.name, **look(model, prompts, settings | {"successors": following}, circuit)}
        finding = Finding("roles", f"Roles in {model.name} on {task.name}", body, provenance(model, task, prompts, settings))
        measuring.leave(group, finding, numbers(body))
    show(body, circuit)
    Console(highlight=False).print(f"\nfolder    {measuring.folder_of(config)}", soft_wrap=True)


def numbers(body: Roles) -> dict[str, float]:
    """What the roles are summed up by: the best head's score for each, and the means of the other parts."""
    found = {f"roles/{name}": max(role["scores"].values()) for name, role in body["roles"].items()}
    if "ov" in body:
        found |= {"roles/ov_copy": body["ov"]["mean_copy"], "roles/ov_next": body["ov"]["mean_next"]}
    return found | ({"roles/attributed": body["attribution"]["total"]} if "attribution" in body else {})


def check(config: DictConfig) -> None:
    """Refuses settings before a large model is loaded.

    Raises:
        ConfigError: A setting cannot be used.
    """
    for key in ("top", "top_tokens", "ov_prompts"):
        if type(config[key]) is not int or config[key] < 1:
            raise ConfigError(f"{key} must be a whole number, 1 or more; found {config[key]!r}.")
    if isinstance(config.threshold, bool) or not isinstance(config.threshold, (int, float)) or not -1 <= config.threshold <= 1:
        raise ConfigError(f"threshold must be a share of attention, from -1 to 1; found {config.threshold!r}.")
    if config.circuit is not None and not isinstance(config.circuit, str):
        raise ConfigError(f"circuit must be the path of one circuit file, or null; found {config.circuit!r}.")
    if config.successors not in (None, ORDINALS) and not OmegaConf.is_dict(config.successors):
        raise ConfigError(f"successors must be null, {ORDINALS}, or a mapping such as {{January: second}}; found {config.successors!r}.")


def successors(setting: str | Mapping[str, str] | None, task: Task) -> dict[str, str] | None:
    """What counts as the next member; ``ordinals`` says it as an ordinal, so that second follows January.

    Raises:
        ConfigError: The task has no list of members to number.
    """
    if setting is None or not isinstance(setting, str):
        return None if setting is None else {str(word): str(after) for word, after in setting.items()}
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is None:
        raise ConfigError(f"successors={ORDINALS} needs a task of sequence members; found {task.name}. Give a mapping instead.")
    return dict(zip(vocabulary, words.ORDINALS[1:], strict=False))


def look(model: HookedModel, prompts: PromptSet, settings: Mapping[str, Any], circuit: Circuit | None = None) -> RolesInModel:
    """The body of the finding, but for the name of the task.

    A part that cannot be made for this model or these prompts is left out, and ``skipped`` says why.

    Args:
        model: The model.
        prompts: The prompts of the task.
        settings: Those of the job.
        circuit: Whose heads' patterns to keep; None for the best heads of every role.
    """
    skipped: dict[str, str] = {}

    def attempt(part: str, make: Callable[..., T], *inputs: Any) -> T | None:
        try:
            return make(*inputs)
        except UserError as reason:
            skipped[part] = str(reason)
            return None

    with eager_attention(model):  # once for both
        patterns = mean_patterns(model, prompts)
        control = attempt("control", control_patterns, model, opening(model, prompts))
    measured = roles_of(patterns, control, attempt)
    roles = {name: role_body(role, scores, settings) for name, (role, _, scores) in measured.items()}
    found = dict.fromkeys(head for role in roles.values() for head in role["found"])
    heads = list(found) if circuit is None else [str(head) for head in circuit.heads]
    parts: RoleParts = {}
    if (scores := attempt("ov", ov, model, few(prompts, settings["ov_prompts"]), settings)) is not None:
        parts["ov"] = scores
    if (logits := attempt("logit_lens", lens, model, prompts)) is not None:
        parts["logit_lens"] = logits
    if (shares := attempt("attribution", attribution, model, prompts)) is not None:
        parts["attribution"] = shares
    return {
        "model": model.name,
        "circuit": None if circuit is None else list(circuit.names),
        "groups": {pattern.group: {"tokens": list(pattern.tokens), "labels": dict(pattern.labels)} for pattern in patterns},
        "patterns": {head: kept(patterns[0], Node.parse(head)) for head in heads},
        "roles": roles,
        "heads": {head: played(Node.parse(head), measured, settings["threshold"]) for head in heads},
        **parts,
        "skipped": skipped,
    }


Measured = Mapping[str, tuple[Role, Sequence[MeanPattern], torch.Tensor]]
"""By name: a role, the patterns that it was measured on, and the scores of all heads."""


def roles_of(patterns: Sequence[MeanPattern], control: Sequence[MeanPattern] | None, attempt: Callable[..., Any]) -> Measured:
    """Scores of all heads for every role that can be measured here."""
    found: dict[str, tuple[Role, Sequence[MeanPattern], torch.Tensor]] = {}
    for role in (*ROLES, OTHER_MEMBER) if len(member_positions(patterns[0].labels)) > 1 else ROLES:
        on = control if role.control else patterns
        scores = None if on is None else attempt(f"role {role.name}", role_scores, on, role)
        if scores is not None:
            assert on is not None
            found[role.name] = (role, on, scores)
    return found


def role_body(role: Role, scores: torch.Tensor, settings: Mapping[str, Any]) -> RoleScores:
    """A role with the scores of all heads, and the heads that are found to play it best."""
    where = "repeated random tokens" if role.control else "the task's prompts"
    return {
        "description": f"{role.description} (measured on {where})",
        "scores": by_head(scores),
        "found": [str(node) for node in best(scores, threshold=settings["threshold"], top=settings["top"])],
    }


def played(head: Node, measured: Measured, threshold: float) -> dict[str, PlayedRole]:
    """The roles that a head plays, its highest score first, each with its control: how often keys taken at random score as much."""
    scored = {name: scores[head.layer, head.head].item() for name, (_, _, scores) in measured.items()}
    played = sorted((name for name in scored if scored[name] >= threshold), key=lambda name: -scored[name])
    return {name: {"score": scored[name], "chance": chance(measured[name][1], measured[name][0], head)} for name in played}


def control_patterns(model: HookedModel, first: int | None) -> tuple[MeanPattern, ...]:
    """Mean patterns on repeated random tokens, behind the token that the task's prompts begin with."""
    return mean_patterns(model, repeated_tokens(model, first=first))


def opening(model: HookedModel, prompts: PromptSet) -> int | None:
    """The special token that all prompts begin with, if they do."""
    firsts = prompts.clean.gather(1, prompts.pads[:, None])[:, 0]
    first = int(firsts[0])
    special = getattr(model.tokenizer, "all_special_ids", None) or ()
    return first if first in special and bool((firsts == first).all()) else None


def few(prompts: PromptSet, n: int) -> PromptSet:
    """The first prompts of each template."""
    return prompts.take(torch.cat([(prompts.groups == group).nonzero()[:n, 0] for group in range(len(prompts.group_names))]))


def kept(pattern: MeanPattern, head: Node) -> AttentionPattern:
    """The mean pattern of one head, rounded: the file is for people and figures."""
    mean = pattern.mean[head.layer, head.head].double()
    return {"group": pattern.group, "mean": [[round(cell, 5) for cell in row] for row in mean.tolist()]}


def ov(model: HookedModel, prompts: PromptSet, settings: Mapping[str, Any]) -> OVScores:
    """Copy and next scores as plain values."""
    found = ov_scores(model, prompts, k=settings["top_tokens"], successors=settings["successors"])
    return {
        "k": found.k,
        "definition": found.definition,
        "copy": by_head(found.copy),
        "next": by_head(found.next),
        "mean_copy": found.copy.mean().item(),
        "mean_next": found.next.mean().item(),
        "n": found.n,
    }


def lens(model: HookedModel, prompts: PromptSet) -> LogitLens:
    """The logit lens as plain values, averaged over the prompts."""
    found = logit_lens(model, prompts)
    switch, top1 = found.switches(), found.top1_switches()
    return {
        "sites": list(found.sites),
        "answer_top1": found.answer_is_top.double().mean(1).tolist(),
        "wrong_top1": found.wrong_is_top.double().mean(1).tolist(),
        "answer_logit": found.answer.double().mean(1).tolist(),
        "wrong_logit": found.wrong.double().mean(1).tolist(),
        "switch": switch,
        "switch_site": most_common(switch),
        "switch_top1": top1,
        "n": found.answer.shape[1],
    }


def attribution(model: HookedModel, prompts: PromptSet) -> Attribution:
    """Direct attribution as plain values, averaged over the prompts."""
    found = direct_attribution(model, prompts)
    return {"nodes": found.means, "total": found.differences.mean().item(), "unit": "logits"}


def by_head(table: torch.Tensor) -> dict[str, float]:
    """A number a head, by name."""
    return {str(Node.of_head(layer, head)): value for layer, row in enumerate(table.tolist()) for head, value in enumerate(row)}


def provenance(model: HookedModel, task: Task, prompts: PromptSet, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the result depends on."""
    return {
        "settings": redacted({"task": describe(task), **settings}),
        "seed": getattr(task, "seed", None),
        "model": {
            "name": model.name,
            "revision": model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint(),
        },
        "prompts_hash": prompts.content_hash(),
        "n_prompts": len(prompts),
        "versions": versions(),
    }


def show(body: RolesInModel, circuit: Circuit | None) -> None:
    """Prints the best parts, a row each kind. Members of the circuit are marked with a star."""

    def named(values: Mapping[str, float], names: Sequence[str], form: str) -> str:
        return ", ".join(f"{name}{'*' if circuit is not None and name in circuit.names else ''} {values[name]:{form}}" for name in names)

    def largest(values: Mapping[str, float], n: int = 5) -> list[str]:
        return sorted(values, key=lambda name: -abs(values[name]))[:n]

    table = Table("", "best first", box=None, pad_edge=False)
    for name, role in body["roles"].items():
        table.add_row(name.replace("_", " "), named(role["scores"], role["found"], ".2f") or "no head above the threshold")
    if "ov" in body:
        told = body["ov"]
        for name, scores, mean in (("copy", told["copy"], told["mean_copy"]), ("next", told["next"], told["mean_next"])):
            heads = [head for head in largest(scores) if scores[head] > 0]
            table.add_row(f"OV {name}, %", f"{named(scores, heads, '.0f') or 'no head'} (mean of all heads {mean:.1f})")
    if "logit_lens" in body:
        found = body["logit_lens"]
        counts = ", ".join(f"{site} {count}" for site, count in sorted(found["switch"].items(), key=lambda item: -item[1])[:5])
        table.add_row("switch to the answer", f"{counts or 'no prompt switches'} (of {found['n']} prompts)")
    if "attribution" in body:
        nodes = body["attribution"]["nodes"]
        table.add_row("direct attribution", f"{named(nodes, largest(nodes, 8), '+.2f')} (sum {body['attribution']['total']:.2f} logits)")
    console = Console(highlight=False)
    console.print(table)
    for head, roles in body["heads"].items() if circuit is not None else ():
        said = ", ".join(f"{name.replace('_', ' ')} {each['score']:.2f} (chance {each['chance']:.3f})" for name, each in roles.items())
        console.print(f"{head}: {said or 'no role above the threshold'}", soft_wrap=True)
    if circuit is not None:
        console.print("* member of the circuit")
    for part, reason in body["skipped"].items():
        console.print(f"skipped {part}: {reason}", soft_wrap=True)
