"""Which prompts the untouched model can do."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.metrics.functional import gather, log_probs
from circuitkit.models.hooked import HookedModel


class Solves:
    """Accepts the prompts of which the model is right, and clearly so. Final.

    The rule is the paper's: the answer is the most likely next token, and more than twice as likely as the last shown member.

    Args:
        model: The untouched model.
        max_rows: Bound on the prompts of a pass.
    """

    def __init__(self, model: HookedModel, max_rows: int | None = None) -> None:
        self._model = model
        self._max_rows = max_rows

    def __call__(self, prompts: PromptSet) -> Bool[Tensor, "prompt"]:
        rows = RowBudget(self._model, prompts.n_pos, self._max_rows).rows
        accepted = []
        for ids, answers, wrongs in zip(*(column.split(rows) for column in (prompts.clean, prompts.answers, prompts.wrongs)), strict=True):
            logits = self._model.run(ids, gather=True)
            assert logits is not None
            logs = log_probs(logits[:, -1].float())
            answer, wrong = gather(logs, answers), gather(logs, wrongs)
            right = logs.argmax(-1) == answers.to(logs.device)
            accepted.append((right & (answer.exp() > 2 * wrong.exp())).cpu())
        return torch.cat(accepted)
