"""Whether an engine's numbers for a model can be trusted: checks of every shortcut against the naive path, and of what they leave behind.

Those that need nothing but the model are in ``models/checks.py``. ``circuitkit job=doctor`` runs all of them; their cheap form, at the
start of every run, is in ``quick.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from circuitkit.core.node import Kind, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks, StepLogits
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.nodes import NodeEngine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.metrics.base import Metric
from circuitkit.models.checks import (
    MODEL_CHECKS,
    Check,
    digests_of,
    hooks_gone,
    hooks_of,
    largest,
    plain,
    relative,
    shortened,
    tolerance,
    weights_kept,
)
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.patchers.base import Patcher


@dataclass(frozen=True)
class Patient:
    """What is examined, and with which tools.

    Attributes:
        model: The model.
        prompts: A few prompts.
        zero, resample, means, conditional: A patcher of each kind.
        metric: Any; the checks compare logits.
        engine: Makes the engine that is examined. It has to know ``max_rows``.
    """

    model: HookedModel
    prompts: PromptSet
    zero: Patcher
    resample: Patcher
    means: Patcher
    conditional: Patcher
    metric: Metric
    engine: Callable[..., NodeEngine] = PackedEngine

    def logits(self, masks: Masks, patcher: Patcher, universe: NodeUniverse | None = None, **options: Any) -> StepLogits:
        """Logits of every mask and prompt, by the engine."""
        return self.engine(self.model, self.prompts, patcher, self.metric, universe, **options).all_logits(masks)

    def expected(self, masks: Masks, patcher: Patcher, universe: NodeUniverse | None = None) -> StepLogits:
        """The same by the naive path."""
        return ReferenceEngine(self.model, self.prompts, patcher, self.metric, universe).all_logits(masks)


def examine(patient: Patient) -> Iterator[Check]:
    """Runs every check, in the order in which they are best read."""
    model = patient.model
    hooks, weights = hooks_of(model), digests_of(model)
    longest = patient.prompts.take(patient.prompts.pads == 0)
    for check in MODEL_CHECKS:
        yield _outcome(check, model, longest)
    for each in ENGINE_CHECKS:
        yield _outcome(each, patient)
    yield hooks_gone(model, hooks)
    yield weights_kept(model, weights)


def corrupt_run(patient: Patient) -> Check:
    """Corrupt prompts with every component replaced by its own corrupt output are the corrupt run."""
    prompts = replace(patient.prompts, clean=patient.prompts.corrupt)
    found = replace(patient, prompts=prompts).logits(patient.model.universe.empty()[None], patient.resample)[0]
    expected = prompts.scored(plain(patient.model, prompts.clean, **prompts.padding(slice(0, len(prompts))))).cpu()
    what = "corrupt prompts, everything replaced by its own corrupt output = the corrupt run"
    return Check.of("corrupt_run", what, relative(found, expected), tolerance(patient.model))


def all_patched(patient: Patient) -> Check:
    """With everything replaced the clean prompts count only through their embeddings; the naive path says how."""
    empty = patient.model.universe.empty()[None]
    return _compared(patient, "all_patched", "everything resampled = the naive path", empty, (patient.resample,))


def any_mask(patient: Patient) -> Check:
    """Random masks give what the naive path gives."""
    masks = sample_masks(patient.model.universe)
    return _compared(patient, "any_mask", "random masks = the naive path, by zeros, means and resampling", masks, _plain_patchers(patient))


def conditional(patient: Patient) -> Check:
    """So do means that are taken with the removed heads replaced."""
    masks = sample_masks(patient.model.universe)
    return _compared(patient, "conditional", "means taken with removed heads replaced = the naive path", masks, (patient.conditional,))


def positions(patient: Patient) -> Check:
    """So do masks of single positions."""
    spans = ("0", "last") if patient.prompts.lengths.min() > 1 else ("last",)
    universe = patient.model.universe.at(spans)
    what = f"random masks of (component, position) pairs, at {' and '.join(spans)} = the naive path"
    return _compared(patient, "positions", what, sample_masks(universe), _plain_patchers(patient), universe)


def base(patient: Patient) -> Check:
    """Masks that are made from a base by removing one unit start from states that are held for the base."""
    universe = patient.model.universe
    start = sample_masks(universe)[-1]
    masks = torch.stack([universe.without(start, [node]) for node in _one_of_each_layer(universe)])
    engine = patient.engine(patient.model, patient.prompts, patient.means, patient.metric)
    engine.all_logits(start[None])
    found = torch.empty(len(masks), *engine.known_clean.shape)
    for chosen, rows, logits in engine.passes(masks, start):
        found[chosen, rows] = logits.cpu()
    difference = _largest_difference(found, patient.expected(masks, patient.means))
    return Check.of("base", "one unit less than a mask whose states are held = the naive path", difference, tolerance(patient.model))


def packing(patient: Patient) -> Check:
    """Many masks and prompts in one pass give what each gives alone."""
    masks = sample_masks(patient.model.universe)
    found = patient.logits(masks, patient.resample)
    alone = patient.logits(masks, patient.resample, max_rows=1)
    return Check.of("packing", "masks and prompts packed = one row a pass", _largest_difference(found, alone), tolerance(patient.model))


def fires(patient: Patient) -> Check:
    """Each component's removal changes the logits, in the engine as in the naive path, unless the component writes nothing."""
    patient = replace(patient, prompts=patient.prompts.take(range(min(2, len(patient.prompts)))))
    silent = set(patient.model.universe.nodes)
    deaf: set[Node] = set()
    for patcher in (patient.resample, patient.zero):
        if silent:
            silent, missed = _silent(patient, [node for node in patient.model.universe.nodes if node in silent], patcher)
            deaf |= missed
    dead = silent & _write_nothing(patient)
    wrong = [str(node) for node in patient.model.universe.nodes if node in deaf | (silent - dead)]
    noted = [str(node) for node in patient.model.universe.nodes if node in dead]
    detail = shortened(wrong) or (f"write nothing at all: {shortened(noted)}" if noted else "")
    what = f"removing any of {len(patient.model.universe)} components changes the logits (number of those where it does not)"
    return Check.of("fires", what, len(wrong), 0.0, detail)


ENGINE_CHECKS: tuple[Callable[[Patient], Check], ...] = (
    corrupt_run, all_patched, any_mask, conditional, positions, base, packing, fires,
)  # fmt: skip
"""In the order in which they are best read."""


def sample_masks(universe: NodeUniverse) -> Masks:
    """Nothing kept, only MLPs, only heads, random masks of three densities, and one near the full model."""
    generator = torch.Generator().manual_seed(0)
    is_mlp = torch.tensor([node.kind is Kind.MLP for node in universe.nodes])
    drawn = [torch.rand(len(universe), generator=generator) < keep for keep in (0.3, 0.6, 0.9)]
    return torch.stack([universe.empty(), is_mlp, ~is_mlp, *drawn, universe.without(universe.full(), universe.nodes[-2:])])


def _plain_patchers(patient: Patient) -> tuple[Patcher, ...]:
    return patient.zero, patient.means, patient.resample


def _compared(
    patient: Patient, name: str, what: str, masks: Masks, patchers: tuple[Patcher, ...], universe: NodeUniverse | None = None
) -> Check:
    """Engine against naive path, with each patcher."""
    differences = {
        type(patcher).__name__: _largest_difference(patient.logits(masks, patcher, universe), patient.expected(masks, patcher, universe))
        for patcher in patchers
    }
    detail = ", ".join(f"{patcher} {difference:.1e}" for patcher, difference in differences.items()) if len(patchers) > 1 else ""
    return Check.of(name, what, largest(differences.values()), tolerance(patient.model), detail)


def _largest_difference(found: StepLogits, expected: StepLogits) -> float:
    """Mask by mask, because the spread of logits differs a lot between masks."""
    return largest(relative(one, other) for one, other in zip(found, expected.to(found.device), strict=True))


def _one_of_each_layer(universe: NodeUniverse) -> list[Node]:
    return [node for node in universe.nodes if node.kind is not Kind.HEAD or node.head == node.layer % universe.n_heads]


def _silent(patient: Patient, nodes: list[Node], patcher: Patcher) -> tuple[set[Node], set[Node]]:
    """Nodes whose removal changes nothing: in the naive path, where that shows bit for bit; and in the engine although it does there.

    Rows of other shapes round otherwise. So the engine misses a removal if it is nearer to no removal than to what the naive path
    gives, and further from that than untouched logits of the two differ.
    """
    universe = patient.model.universe
    masks = torch.stack([universe.full(), *(universe.without(universe.full(), [node]) for node in nodes)])
    found, expected = patient.logits(masks, patcher), patient.expected(masks, patcher)
    rounding = max((found[0] - expected[0]).abs().max().item(), torch.finfo(patient.model.dtype).eps * expected[0].std().item())
    silent, missed = set(), set()
    for node, one, other in zip(nodes, found[1:], expected[1:], strict=True):
        effect, error = (other - expected[0]).abs().max().item(), (one - other).abs().max().item()
        if effect == 0:
            silent.add(node)
        elif not error <= max(4 * rounding, effect / 2):
            missed.add(node)
    return silent, missed


def _write_nothing(patient: Patient) -> set[Node]:
    """Components that add exact zeros to the residual stream on these prompts, such as pruned ones."""
    model, seen = patient.model, dict[Node, Tensor]()

    def visit(layer: Layer) -> None:
        block, index = layer.block, layer.index
        if block.heads is not None:
            seen[Node.of_head(index, 0)] = layer.z
        elif block.attention is not None:
            seen[Node.of_attention(index)] = layer.attention_out
        if block.mlp is not None:
            seen[Node.of_mlp(index)] = layer.mlp_out

    prompts = patient.prompts
    model.run(prompts.clean, visit, stop=model.n_layers - 1, **prompts.padding(slice(0, len(prompts))))
    dead = set()
    for node, out in seen.items():
        if node.kind is not Kind.HEAD:
            dead |= set() if out.any() else {node}
            continue
        bias = model.project(node.layer, torch.zeros_like(out))
        for head in range(model.n_heads):
            alone = torch.zeros_like(out)
            alone[..., head, :] = out[..., head, :]
            if torch.equal(model.project(node.layer, alone), bias):
                dead.add(Node.of_head(node.layer, head))
    return dead


def _outcome(check: Callable[..., Check], *given: Any) -> Check:
    """What a check says. One that raises has failed: an unknown model may break anything, and the rest is still worth knowing."""
    try:
        return check(*given)
    except Exception as error:
        text = str(error).strip().split("\n", 1)[0]
        what = (check.__doc__ or "").strip().split("\n", 1)[0]
        return Check(check.__name__, what, nan, 0.0, passed=False, detail=f"raised {type(error).__name__}: {text}")
