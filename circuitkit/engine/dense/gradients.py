"""Gradients: the derivative of the mean metric by every unit's mask, at any soft mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import MeasurementError, noting
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import pass_over
from circuitkit.engine.dense.base import DensePass, Score
from circuitkit.engine.dense.blend import accumulator
from circuitkit.engine.dense.edges import DenseEdges
from circuitkit.engine.dense.nodes import DenseNodes
from circuitkit.engine.packed.memory import RowBudget, free_room, in_slices, within_memory
from circuitkit.metrics.base import Metric
from circuitkit.models import differentiable
from circuitkit.models.hooked import HookedModel
from circuitkit.models.rules import Rules
from circuitkit.patchers.base import Patcher

_Derivative = Callable[[Tensor, slice, Score], Tensor]


class Gradients:
    """Soft masks and derivatives over one universe. Final.

    A unit under a soft mask m in [0, 1] gives m x what it computes + (1 - m) x what the patcher gives; for an edge its receiver reads that.
    With the mask full, the derivative times (mask - 1) is attribution patching (arXiv 2310.10348, 2403.00745) for nodes and for edges.

    Args:
        model, prompts, patcher, metric: As for every engine.
        universe: The units: nodes of any kind that the model has as they are, or edges. With edges, every node that is not in their
            universe is replaced throughout.
        outside: By what nodes outside of an edge universe are replaced; None for the patcher too.
        max_rows: Bound on the prompts of a pass; None to use free memory.

    Raises:
        MeasurementError: The metric has no gradient, the patcher cannot be differentiated, or its values depend on the mask.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: PromptSet,
        patcher: Patcher,
        metric: Metric,
        universe: NodeUniverse | EdgeUniverse,
        *,
        outside: Patcher | None = None,
        max_rows: int | None = None,
    ) -> None:
        metric.check(prompts)
        patcher.check(prompts)
        if prompts.n_scored > 1:
            raise MeasurementError(
                f"Gradients are taken of answers of one token, and these prompts have answers of up to {prompts.n_scored} tokens. Score "
                "masks with the packed engine, or give answers of one token."
            )
        prompts.require_last("A gradient")
        if not metric.differentiable:
            raise MeasurementError(
                f"{metric.name} counts, so it has no gradient. Take a metric that is a smooth function of the logits, such as logit_diff, "
                "prob_diff or kl."
            )
        if patcher.needs.conditional:
            raise MeasurementError(
                f"The values of {type(patcher).__name__} depend on which heads are out (conditional means), so a soft mask does not say "
                "what they are. Take plain means (patcher.means=plain)."
            )
        self._model = model
        self._prompts = prompts
        self._metric = metric
        self._universe = universe
        self._n_units = len(universe)
        self._pass: DensePass
        if isinstance(universe, EdgeUniverse):
            self._pass = DenseEdges(model, prompts, patcher, universe, outside or patcher)
        else:
            self._pass = DenseNodes(model, prompts, patcher, universe)
        self._budget = RowBudget(model, prompts.n_pos, _rows_a_pass(model, prompts.n_pos, max_rows))
        self._budget.rows = min(self._budget.rows, len(prompts))

    def grad(self, mask: Tensor | None = None, rules: Rules | str = "plain") -> Float[Tensor, " unit"]:
        """The derivative of the mean metric by each unit's mask.

        Args:
            mask: Where it is taken: a number in [0, 1] for each unit; None for the full mask.
            rules: Of the backward pass: a published set by name, or rules of your own.

        Returns:
            Units of the metric per unit of mask. Positive: with more of the unit the metric rises.

        Raises:
            MeasurementError: The mask belongs to another universe or leaves [0, 1]; gradients are NaN or infinite.
            ConfigError: No such set of rules.
            ModelError: A rule has no place in this model, or did not fire.
        """
        total = torch.zeros(self._n_units, dtype=torch.float64)
        self._derive(mask, rules, self._pass.total, total.add_)
        return (total / len(self._prompts)).to(accumulator(self._model.dtype))

    def per_prompt(self, mask: Tensor | None = None, rules: Rules | str = "plain") -> Float[Tensor, "prompt unit"]:
        """The same for the metric of each prompt. Arguments as in ``grad``."""
        found: list[Tensor] = []
        self._derive(mask, rules, self._pass.each, found.append)
        return torch.cat(found)

    def loss(self, masks: Float[Tensor, "*mask unit"], rows: slice | None = None) -> Float[Tensor, "*mask"]:
        """The mean metric under soft masks, as a function of them that autograd can follow: for masks that are learned.

        Args:
            masks: Numbers in [0, 1].
            rows: Some of the prompts; None for all. They are run at once.

        Raises:
            MeasurementError: Masks of another universe, or outside of [0, 1].
        """
        first, last, _ = (rows or slice(None)).indices(len(self._prompts))
        rows, flat = slice(first, last), masks.reshape(-1, masks.shape[-1] if masks.ndim else 0)
        for mask in flat:
            self._checked(mask)
        score = self._score(rows, clean=False)
        with differentiable.frozen(self._model):
            self._prepare()
            with noting(lambda: f"under soft masks {pass_over(rows, flat, self._universe, range(len(flat)))}"):
                found = [score(self._pass.logits(mask[None], rows)).mean() for mask in flat]
        return torch.stack(found).reshape(masks.shape[:-1])

    def _derive(self, mask: Tensor | None, rules: Rules | str, of: _Derivative, take: Callable[[Tensor], object]) -> None:
        """Hands on a derivative of all prompts, pass by pass."""
        mask = self._checked(torch.ones(self._n_units) if mask is None else mask)
        rules = Rules.named(rules, self._model) if isinstance(rules, str) else rules
        clean = self._pass.full_is_clean and bool((mask == 1).all())
        with differentiable.frozen(self._model):
            self._prepare()
            with rules.applied(self._model):
                run = partial(self._part, mask, of, clean)
                for _, part in in_slices(len(self._prompts), run, self._budget):
                    take(part)

    def _part(self, mask: Tensor, of: _Derivative, clean: bool, rows: slice) -> Tensor:
        with noting(lambda: f"in a gradient {pass_over(rows, mask[None], self._universe)}"):
            found = of(mask, rows, self._score(rows, clean)).cpu()
        if not bool(found.isfinite().all()):
            raise MeasurementError(
                "The gradients hold NaN or infinity. Load the model in float32 or bfloat16 (model.dtype) and check its weights with "
                "`circuitkit job=doctor`."
            )
        return found

    def _score(self, rows: slice, clean: bool) -> Score:
        """The metric of some prompts; ``clean`` says that the run itself is the untouched model."""
        prompts = self._prompts.take(range(rows.start, rows.stop))

        def score(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
            untouched = logits.detach() if clean else self._untouched(rows)
            return self._metric.score(logits, prompts, clean_logits=untouched)

        return score

    def _untouched(self, rows: slice) -> Float[Tensor, "row d_vocab"]:
        with torch.no_grad():
            return differentiable.logits(self._model, self._prompts.clean[rows], **self._prompts.padding(rows))

    def _checked(self, mask: Tensor) -> Float[Tensor, " unit"]:
        if mask.shape != (self._n_units,):
            raise MeasurementError(
                f"A soft mask has one number for each of the {self._n_units} units of its universe, found a tensor of {tuple(mask.shape)}. "
                "Make it from a mask of that universe, such as universe.full().float()."
            )
        dtype = accumulator(self._model.dtype)
        mask = mask.detach().to(dtype)
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            low, high = mask.min().item(), mask.max().item()
            raise MeasurementError(f"A soft mask lies between 0 (replaced) and 1 (kept), found {low:.4g} to {high:.4g}. Clamp it.")
        return mask

    def _prepare(self) -> None:
        whole = slice(0, len(self._prompts))
        for _ in within_memory([whole], lambda _: self._pass.prepare(self._budget.rows), self._budget, lambda piece: [piece]):
            pass


def _rows_a_pass(model: HookedModel, n_pos: int, max_rows: int | None) -> int:
    if max_rows is not None:
        return max_rows
    # What autograd keeps of a layer, measured on GPT-2: about 20 times the residual stream and 6 times the MLP's inside.
    row = model.n_layers * n_pos * (20 * model.d_model + 6 * model.d_mlp + model.n_heads * n_pos) * accumulator(model.dtype).itemsize
    return max(1, int(0.5 * free_room(model) // row))
