"""What a dense pass is: prompts as rows, a soft mask of its own for every row, logits that autograd can follow back to the masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[[Float[Tensor, "row d_vocab"]], Float[Tensor, "row"]]
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
    def logits(self, masks: Float[Tensor, "row unit"], rows: slice) -> Float[Tensor, "row d_vocab"]:
        """Logits at the last position, float32 at least, differentiable by the masks.

        Args:
            masks: One mask for each prompt.
            rows: The prompts.
        """

    def derivatives(self, mask: Float[Tensor, "unit"], rows: slice, score: Score) -> Iterator[Float[Tensor, "unit"]]:
        """For each of some prompts the derivative of its metric by the mask."""
        masks = mask.detach().expand(rows.stop - rows.start, -1).clone().requires_grad_()
        (found,) = torch.autograd.grad(score(self.logits(masks, rows)).sum(), masks)
        yield from found
