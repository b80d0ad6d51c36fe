"""What every task must keep to."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from circuitkit.core.prompts import PromptSet
from circuitkit.tasks.base import Task
from circuitkit.testing.base import PartConformance


class TaskConformance(PartConformance):
    """What every task must keep to. ``make`` returns one, ``tokenizer`` what it is to be used with."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """A tokenizer whose vocabulary has the task's members."""

    def _prompts(self, **settings: Any) -> PromptSet:
        task: Task = self.make()
        return task.prompts(self.tokenizer(), **settings)

    def test_prompts_are_well_formed(self) -> None:
        """Equal lengths, answers that differ from the wrong ones, and groups that have names."""
        prompts = self._prompts(n=8)
        assert prompts.clean.shape == prompts.corrupt.shape and prompts.clean.dtype == torch.int64
        assert not prompts.answers.shared(prompts.wrongs).any(), "an answer is its own wrong answer"
        assert 0 <= int(prompts.groups.min()) and int(prompts.groups.max()) < len(prompts.group_names)
        assert not prompts.items or len(prompts.items) == len(prompts)

    def test_every_corrupt_prompt_differs_from_its_clean_twin(self) -> None:
        """Else there is nothing to find."""
        prompts = self._prompts(n=8)
        assert (prompts.clean != prompts.corrupt).any(1).all(), "a corrupt prompt is the same as the clean one"

    def test_the_seed_decides_the_draw(self) -> None:
        """Same settings and seed, same prompts."""
        assert self._prompts(n=8, seed=3).content_hash() == self._prompts(n=8, seed=3).content_hash()

    def test_positions_lie_in_the_prompt(self) -> None:
        """Every label, in every group."""
        prompts = self._prompts(n=8)
        for label in (*prompts.spans, "last"):
            for group in range(len(prompts.group_names)):
                assert 0 <= prompts.position(label, group) < prompts.n_pos

    def test_what_the_filter_refuses_is_not_there(self) -> None:
        """``accept`` decides. Here it refuses one answer."""
        task = self.make()
        if not getattr(task, "filter", False):
            return
        refused = self._prompts(n=8).answers.ids[0, 0]
        kept = task.prompts(self.tokenizer(), n=8, accept=lambda prompts: prompts.answers.ids[:, 0] != refused)
        assert (kept.answers.ids[:, 0] != refused).all()
