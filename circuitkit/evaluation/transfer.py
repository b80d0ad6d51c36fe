"""Transfer: what becomes of other tasks, answered by generating, when the components of a circuit are removed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.bodies import Accuracy, AskedTask, Generation, RemovedComponents, Transfer
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ConfigError, MeasurementError, PromptError
from circuitkit.core.findings import Finding
from circuitkit.core.questions import QuestionSet
from circuitkit.core.shapes import Masks
from circuitkit.core.universe import NodeUniverse
from circuitkit.evaluation.controls import random_sets
from circuitkit.evaluation.generation import generate
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """Components that are removed together, or several random draws of as many.

    Attributes:
        label: For people.
        draws: The components, once for a set and once a draw for a control.
        control: Whether they are drawn at random.
    """

    label: str
    draws: tuple[Circuit, ...]
    control: bool = False

    def plain(self) -> RemovedComponents:
        """As it is written into a finding; the members of a control are those of each draw."""
        one, drawn = self.draws[0], [list(each.names) for each in self.draws]
        plain: RemovedComponents = {
            "label": self.label,
            "control": self.control,
            "draws": len(drawn),
            "n_heads": len(one.heads),
            "n_mlps": len(one.mlps),
            "nodes": [] if self.control else drawn[0],
        }
        if self.control:
            plain["drawn"] = drawn
        return plain


@dataclass(frozen=True)
class Answers:
    """What was generated under each mask.

    Attributes:
        texts: For each mask and question.
        right: Whether it answers the question.
        cut_off: How many free answers had not ended when they came to their bound.
    """

    texts: tuple[tuple[str, ...], ...]
    right: Bool[Tensor, "mask question"]
    cut_off: int


def answers(model: HookedModel, asked: QuestionSet, masks: Masks, patcher: Patcher, *, max_rows: int | None = None) -> Answers:
    """Asks every question under every mask.

    Raises:
        PromptError: The patcher needs corrupt prompts, and a question has none of its own length.
    """
    needs_corrupt = patcher.needs.source != "none" and not masks.all()
    if needs_corrupt and (reason := unfit_twin(asked, patcher)):
        raise PromptError(reason)
    names = {question.group: None for question in asked.questions}
    groups = torch.tensor([list(names).index(question.group) for question in asked.questions])
    texts = [[""] * len(asked) for _ in masks]
    cut_off = 0
    for rows in asked.by_length():
        some = asked.take(rows)
        ids, corrupt = torch.tensor(some.ids), torch.tensor(some.corrupt_ids) if needs_corrupt else None
        most = max(some.n_new_tokens)
        found = generate(model, ids, masks, patcher, corrupt, max_new_tokens=most, groups=groups[rows], max_rows=max_rows)
        cut_off += int((~found.ended).sum()) if asked.free else 0
        for place, row in enumerate(rows):
            for mask in range(len(masks)):
                texts[mask][row] = found.text(mask, place, model.tokenizer.decode, some.n_new_tokens[place])
    right = [[asked.is_right(question, text) for question, text in zip(asked.questions, row, strict=True)] for row in texts]
    return Answers(tuple(map(tuple, texts)), torch.tensor(right), cut_off)


def transfer(
    model: HookedModel,
    asked: Sequence[QuestionSet],
    sets: Mapping[str, Circuit],
    patcher: Patcher,
    *,
    mlps: bool = False,
    draws: int = 10,
    seed: int = 0,
    examples: int = 3,
    confidence: float = 0.95,
    max_rows: int | None = None,
) -> Finding[Transfer]:
    """Accuracy on the questions that the untouched model answers rightly, when sets of components are removed, and random ones.

    Source: "Towards Interpretable Sequence Continuation" (arXiv 2311.04131), ablation on other tasks; there, only heads are removed.

    Args:
        model: The model.
        asked: The question sets.
        sets: What to remove, by label.
        patcher: What removed components are replaced by, at every position. Means are taken over the corrupt twins of the questions that
            the model solves and whose prompts have equally many tokens.
        mlps: Remove the MLPs of a set too; else only its heads.
        draws: How many random sets of equal size each set is held against. They have none of its members, as long as there are enough
            others.
        seed: Of the draws.
        examples: How many generations of each question set to keep for each removal.
        confidence: Of the Wilson interval of a set's accuracy. A control's interval is its lowest and highest draw.
        max_rows: Bound on the rows of a pass; None for what the free memory allows.

    Returns:
        A finding of kind ``transfer``.

    Raises:
        ConfigError: Nothing to remove or to ask, a name that is given twice, or a number out of range.
        MeasurementError: The model answers none of the questions.
    """
    _check(asked, sets, draws, examples, confidence)
    study = _Study(model, patcher, _removals(model.universe, sets, mlps, draws, seed), examples, confidence, max_rows)
    body: Transfer = {
        "model": model.name,
        "patcher": type(patcher).__name__,
        "mlps": mlps,
        "confidence": confidence,
        "seed": seed,
        "sets": [each.plain() for each in study.removals],
        "tasks": [],
        "left_out": [],
        "accuracy": {},
        "examples": [],
    }
    for each in asked:
        solved, reason = study.solved(each)
        task: AskedTask = {"name": each.name, "asked": len(each), "solved": len(solved), "clean_accuracy": len(solved) / len(each)}
        if reason is not None:
            _log.warning("%s", reason)
            body["left_out"].append({**task, "reason": reason})
            continue
        accuracy, shown = study.ask(each.take(solved))
        body["tasks"].append(task)
        body["accuracy"][each.name] = accuracy
        body["examples"] += shown
    if not body["tasks"]:
        raise MeasurementError(f"No question set is left to measure. {' '.join(each['reason'] for each in body['left_out'])}")
    return Finding("transfer", f"Transfer in {model.name}", body)


def unfit_twin(asked: QuestionSet, patcher: Patcher) -> str | None:
    """Why a patcher cannot take its values from the corrupt prompts of a question set; None if it can, or needs none."""
    if patcher.needs.source == "none":
        return None
    for question, ids, corrupt in zip(asked.questions, asked.ids, asked.corrupt_ids, strict=True):
        if len(ids) != len(corrupt):
            found = f"its corrupt prompt {question.corrupt!r} has {len(corrupt)}" if corrupt else "there is no corrupt prompt for it"
            return (
                f"{asked.name}: {type(patcher).__name__} takes its values from corrupt prompts with as many tokens as the clean ones, but "
                f"{question.prompt!r} has {len(ids)} tokens and {found}. Use patcher=zero, or leave these questions out."
            )
    return None


def control_of(label: str) -> str:
    """What the control of a set is called."""
    return f"random like {label}"


def wilson(n_right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays within 0 and 1 and is no point where all or none are right."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = n_right / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class _Study:
    """What every question set is asked under."""

    model: HookedModel
    patcher: Patcher
    removals: Sequence[Removal]
    examples: int
    confidence: float
    max_rows: int | None

    def solved(self, asked: QuestionSet) -> tuple[list[int], str | None]:
        """Which questions the untouched model answers rightly, and if nothing more can be asked, the reason."""
        full = self.model.universe.full()[None]
        rows = answers(self.model, asked, full, self.patcher, max_rows=self.max_rows).right[0].nonzero().flatten().tolist()
        if not rows:
            return rows, f"{self.model.name} answers 0 of {len(asked)} questions of {asked.name} (accuracy 0.00), so they are left out."
        return rows, unfit_twin(asked.take(rows), self.patcher)

    def ask(self, asked: QuestionSet) -> tuple[dict[str, Accuracy], list[Generation]]:
        """The accuracy for each removal, and some generations."""
        universe = self.model.universe
        masks = torch.stack([universe.without(universe.full(), each.nodes) for removal in self.removals for each in removal.draws])
        found = answers(self.model, asked, masks, self.patcher, max_rows=self.max_rows)
        if found.cut_off:
            _log.warning("%s: %d of %d answers had not ended after %d tokens and are judged as they are; n_new_tokens is that bound.",
                         asked.name, found.cut_off, found.right.numel(), max(asked.n_new_tokens))  # fmt: skip
        accuracy: dict[str, Accuracy] = {}
        shown: list[Generation] = []
        first = 0
        for removal in self.removals:
            accuracy[removal.label] = _accuracy(found.right[first : first + len(removal.draws)], removal.control, self.confidence)
            for question, text in list(zip(asked.questions, found.texts[first], strict=True))[: self.examples]:
                answer, generated = question.answer.strip(), text.strip()
                shown.append(
                    {"task": asked.name, "prompt": question.prompt, "answer": answer, "set": removal.label, "generated": generated}
                )
            first += len(removal.draws)
        return accuracy, shown


def _accuracy(right: Bool[Tensor, "draw question"], control: bool, confidence: float) -> Accuracy:
    shares = right.double().mean(1).tolist()
    low, high = (min(shares), max(shares)) if control else wilson(int(right.sum()), right.shape[1], confidence)
    return {"mean": sum(shares) / len(shares), "low": low, "high": high, "draws": shares}


def _removals(universe: NodeUniverse, sets: Mapping[str, Circuit], mlps: bool, draws: int, seed: int) -> list[Removal]:
    """Each set, with its control behind it. Sets with nothing to remove are left out, which is logged."""
    removals = []
    for label, circuit in sets.items():
        removed = replace(circuit.nodes_only(), nodes=circuit.nodes if mlps else circuit.heads)
        if not removed:
            what = "no member" if mlps else "no head (and MLPs are only removed with mlps=true)"
            _log.warning("The set %r has %s, so there is nothing to remove and it is left out.", label, what)
            continue
        removals.append(Removal(label, (removed,)))
        if draws:
            drawn = [universe.mask(nodes) for nodes in random_sets(universe, removed.nodes, draws=draws, seed=seed, avoid=removed.nodes)]
            removals.append(
                Removal(control_of(label), tuple(replace(removed, nodes=universe.members(each)) for each in drawn), control=True)
            )
            _note_overlap(label, removed, universe)
    if not removals:
        raise ConfigError("None of the sets has anything to remove. Give circuits with heads, or mlps=true for circuits of MLPs.")
    return removals


def _note_overlap(label: str, removed: Circuit, universe: NodeUniverse) -> None:
    n_heads, n_mlps = universe.n_layers * universe.n_heads, universe.n_layers
    if 2 * len(removed.heads) > n_heads or 2 * len(removed.mlps) > n_mlps:
        _log.warning("The set %r has more than half of the model's components, so its random control shares some of them.", label)


def _check(asked: Sequence[QuestionSet], sets: Mapping[str, Circuit], draws: int, examples: int, confidence: float) -> None:
    names = [each.name for each in asked]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"Expected at least one question set, each name once; found {names}.")
    labels = [*sets, *map(control_of, sets)]
    if not sets or len(set(labels)) < len(labels):
        raise ConfigError(f"Expected at least one set of components, under labels that are unlike those of the controls; found {[*sets]}.")
    if draws < 0 or examples < 0 or not 0 < confidence < 1:
        raise ConfigError(
            f"draws and examples must be 0 or more and confidence in (0, 1); found draws={draws}, examples={examples}, "
            f"confidence={confidence}."
        )
