"""What a dense pass is: prompts as rows, a soft mask of its own for every row, logits that autograd can follow back to the masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, " row"]]
"""The metric of some prompts."""


class DensePass(ABC):
    """Runs some prompts under soft masks over one universe.

    Attributes:
        full_is_clean: Whether the full mask leaves the model as it is.
    """

    full_is_clean: bool = True

    @abstractmethod
    def prepare(self, rows_a_pass: int) -> None:
        """Runs the corrupt prompts, if the patcher needs them and they have not been run."""

    @abstractmethod
    def logits(self, masks: Float[Tensor, "#row unit"], rows: slice) -> Float[Tensor, "row d_vocab"]:
        """Logits at the last position, float32 at least, differentiable by the masks.

        Args:
            masks: One mask for each prompt, or one for all.
            rows: The prompts.
        """

    def total(self, mask: Float[Tensor, " unit"], rows: slice, score: Score) -> Float[Tensor, " unit"]:
        """The derivative of the sum of some prompts' metrics by the mask."""
        return self._derivative(mask[None], rows, score)[0]

    def each(self, mask: Float[Tensor, " unit"], rows: slice, score: Score) -> Float[Tensor, "row unit"]:
        """The derivative of each prompt's metric by the mask."""
        return self._derivative(mask.expand(rows.stop - rows.start, -1), rows, score)

    def _derivative(self, masks: Float[Tensor, "#row unit"], rows: slice, score: Score) -> Tensor:
        masks = masks.detach().clone().requires_grad_()
        return torch.autograd.grad(score(self.logits(masks, rows)).sum(), masks)[0]
