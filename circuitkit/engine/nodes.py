"""NodeEngine: an engine over heads, MLPs and other slices of what flows in a model, which gives logits for each mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Masks, StepLogits, Values
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.base import Engine
from circuitkit.engine.featurizing import Featurizers, featurizers_for
from circuitkit.metrics.base import Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers.base import Patcher

if TYPE_CHECKING:
    from circuitkit.engine.dense.gradients import Gradients


class NodeEngine(Engine):
    """Runs masks over nodes, part by part; the score of a mask is the metric of its logits.

    A head is replaced before the output projection, an MLP where it gives its output. A norm that lies behind attention or MLP (post-norm)
    reads what was replaced. Features of what attention or MLP give are those of what that norm adds to the residual stream.

    Attributes:
        universe: The nodes.
        featurizers: For each site and layer at which the universe has features or neurons, what makes them of the activation.

    Raises:
        MeasurementError: Units of the universe contradict each other or the patcher, or a featurizer is missing or does not fit the model.
    """

    universe: NodeUniverse

    def __init__(
        self,
        model: HookedModel,
        prompts: PromptSet,
        patcher: Patcher,
        metric: Metric,
        universe: NodeUniverse | None = None,
        featurizers: Featurizers | None = None,
    ) -> None:
        super().__init__(model, prompts, patcher, metric, universe)
        self.featurizers = featurizers_for(self.universe, featurizers or {}, model, patcher)

    @property
    def placed(self) -> dict[str, Any]:
        """The featurizers as an argument, where there are any: an engine of one's own need not know them."""
        return {"featurizers": self.featurizers} if self.featurizers else {}

    def on(self, prompts: PromptSet) -> NodeEngine:
        return type(self)(self.model, prompts, self.patcher, self.metric, self.universe, **self.placed)

    @abstractmethod
    def passes(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Iterator[tuple[Int[Tensor, " some"], slice, StepLogits]]:
        """Runs the masks, part by part.

        Args:
            masks: One row per mask.
            base: The mask from which these were made by small changes, if there is one: what they share is computed once.

        Yields:
            Which masks, which prompts, and their logits at the last position in float32; where answers have several tokens, with an axis of
            their steps before that of the vocabulary.
        """

    def all_logits(self, masks: Masks) -> StepLogits:
        """Logits of every mask and prompt at once. Large: masks x prompts x vocabulary."""
        steps = () if self.prompts.n_scored == 1 else (self.prompts.n_scored,)
        logits = torch.empty(len(masks), len(self.prompts), *steps, self.model.d_vocab)
        for chosen, rows, part in self.passes(self.checked(masks), None):
            logits[chosen, rows] = part.cpu()
        return logits

    def score(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Values:
        masks = self.checked(masks, base)
        _ = self.known_clean  # before the passes, whose held states it would replace
        values = torch.empty(len(masks), len(self.prompts))
        for chosen, rows, logits in self.passes(masks, base):
            values[chosen, rows] = self.measure(logits, rows)
        return values

    def gradients(self) -> Gradients:
        from circuitkit.engine.dense.gradients import Gradients  # stands beside this room, and loads nothing that a search needs

        return Gradients(self.model, self.prompts, self.patcher, self.metric, self.universe)

    def check(self) -> None:
        from circuitkit.engine.proof.quick import quick_check  # stands on this room

        quick_check(self)
