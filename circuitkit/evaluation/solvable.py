"""The prompts that a circuit is evaluated on: those of a task that the untouched model can do."""

from __future__ import annotations

import logging

from jaxtyping import Bool
from torch import Tensor

from circuitkit.core.errors import ConfigError, MeasurementError, PromptError
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.filtering import Solves
from circuitkit.models.hooked import HookedModel
from circuitkit.tasks.base import Task

_log = logging.getLogger(__name__)


class _Tally:
    """A filter that remembers how many prompts it saw and accepted."""

    def __init__(self, model: HookedModel) -> None:
        self._solves = Solves(model)
        self.seen = self.solved = 0

    def __call__(self, prompts: PromptSet) -> Bool[Tensor, " prompt"]:
        accepted = self._solves(prompts)
        self.seen, self.solved = self.seen + len(accepted), self.solved + int(accepted.sum())
        return accepted

    @property
    def accuracy(self) -> float:
        return self.solved / self.seen if self.seen else 1.0


def solvable_prompts(task: Task, model: HookedModel, *, least_accuracy: float = 0.1, force: bool = False) -> PromptSet:
    """Draws a task's prompts, and refuses a task that the untouched model cannot do.

    A prompt is solved where the answer is the most likely next token, and more than twice as likely as the wrong one.

    Args:
        task: Makes the prompts; its own ``filter`` says whether those that are not solved are drawn again.
        model: The untouched model.
        least_accuracy: Share of the prompts drawn that the model must solve.
        force: Go on all the same; where no prompt at all is solved, with prompts that were not filtered.

    Raises:
        MeasurementError: The model cannot do the task.
        PromptError: No prompts can be made.
    """
    if not 0 <= least_accuracy <= 1:
        raise ConfigError(f"least_accuracy must be in [0, 1], found {least_accuracy}.")
    tally = _Tally(model)
    try:
        prompts = task.prompts(model.tokenizer, accept=tally if task.filter else None)
    except PromptError:
        if not tally.seen or tally.solved:
            raise
        prompts = task.prompts(model.tokenizer)
    if not task.filter:
        tally(prompts)
    sentence = (
        f"The untouched model {model.name} solves {tally.solved} of the {tally.seen} prompts drawn for {task.name} "
        f"({100 * tally.accuracy:.1f} %)."
    )
    if tally.solved and tally.accuracy >= least_accuracy:
        _log.info("%s", sentence)
    elif force:
        _log.warning("%s That is too few, but force is set.", sentence)
    else:
        raise MeasurementError(
            f"{sentence} At least {100 * least_accuracy:g} % are expected (least_accuracy), because what is measured on a task that the "
            "model cannot do says little about its circuit. Take another model or task, or set force=true to go on all the same."
        )
    return prompts
