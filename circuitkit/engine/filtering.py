"""Which prompts the untouched model can do."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.metrics.functional import is_top, log_probs, mass
from circuitkit.models.hooked import HookedModel


class Solves:
    """Accepts the prompts of which the model is right, and clearly so. Final.

    The rule is the paper's: the answer is the most likely next token, and more than twice as likely as the last shown member. Of sets: one
    of the answers is the most likely token, and all together are more than twice as likely as all wrong answers. An answer of several
    tokens is right if each of its tokens is the most likely one behind those before it.

    Args:
        model: The untouched model.
        max_rows: Bound on the prompts of a pass.
    """

    def __init__(self, model: HookedModel, max_rows: int | None = None) -> None:
        self._model = model
        self._max_rows = max_rows

    def __call__(self, prompts: PromptSet) -> Bool[Tensor, " prompt"]:
        rows = RowBudget(self._model, prompts.n_pos, self._max_rows).rows
        accepted = []
        for first in range(0, len(prompts), rows):
            part = prompts.take(range(first, min(first + rows, len(prompts))))
            logits = self._model.run(part.clean, keep=part.n_kept, gather=True, **part.padding(slice(0, len(part))))
            assert logits is not None
            if part.targets.shape[1]:
                likeliest = logits[:, -part.n_scored :].float().argmax(-1).cpu()
                accepted.append(((likeliest == part.targets) | (part.targets < 0)).all(-1))
                continue
            logs = log_probs(part.scored(logits))
            accepted.append((is_top(logs, part.answers) & (mass(logs, part.answers) > 2 * mass(logs, part.wrongs))).cpu())
        return torch.cat(accepted)
