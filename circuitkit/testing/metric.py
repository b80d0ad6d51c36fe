"""What every metric must keep to."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.metrics.base import Metric
from circuitkit.testing.base import PartConformance


class MetricConformance(PartConformance):
    """What every metric must keep to. ``make`` returns one.

    Attributes:
        differentiable: Whether gradients must flow; set to False for counts such as accuracy.
    """

    differentiable = True

    def _case(self, leading: tuple[int, ...] = (), n: int = 4, vocab: int = 7, seed: int = 0) -> tuple[Tensor, PromptSet, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        answers = torch.randint(0, vocab, (n,), generator=generator)
        ids = torch.zeros(n, 3, dtype=torch.long)
        prompts = PromptSet(ids, ids, answers, (answers + 1) % vocab, torch.zeros(n, dtype=torch.long))
        return torch.randn(*leading, n, vocab, generator=generator), prompts, torch.randn(n, vocab, generator=generator)

    def test_it_says_what_it_is(self) -> None:
        """Name, unit and direction."""
        metric: Metric = self.make()
        assert metric.name and metric.unit and isinstance(metric.higher_is_better, bool)

    def test_one_float32_a_prompt_for_any_leading_axes(self) -> None:
        """The engine passes logits of many masks at once."""
        for leading in ((), (1,), (3,), (2, 3)):
            logits, prompts, clean = self._case(leading)
            values = self.make().score(logits, prompts, clean_logits=clean)
            assert values.shape == logits.shape[:-1], f"expected {tuple(logits.shape[:-1])}, found {tuple(values.shape)}"
            assert values.dtype == torch.float32, f"expected float32, found {values.dtype}"

    def test_masks_and_prompts_are_independent(self) -> None:
        """Packed scores are those of each mask, and of each prompt, alone."""
        logits, prompts, clean = self._case((3,))
        metric = self.make()
        values = metric.score(logits, prompts, clean_logits=clean)
        for mask in range(3):
            torch.testing.assert_close(metric.score(logits[mask], prompts, clean_logits=clean), values[mask])
        for row in range(4):
            one = metric.score(logits[:, row : row + 1], prompts.take([row]), clean_logits=clean[row : row + 1])
            torch.testing.assert_close(one, values[:, row : row + 1])

    def test_nothing_is_changed_in_place(self) -> None:
        """Logits are used again."""
        logits, prompts, clean = self._case()
        copies = logits.clone(), clean.clone()
        self.make().score(logits, prompts, clean_logits=clean)
        assert torch.equal(logits, copies[0]) and torch.equal(clean, copies[1])

    def test_it_reads_others_only_where_it_says_so(self) -> None:
        """With ``reads_others = False`` logits come with the columns of answers and wrong answers alone."""
        metric = self.make()
        if metric.reads_others:
            return
        logits, prompts, clean = self._case((2,))
        asked = prompts.asked
        found = metric.score(logits[..., asked], prompts.renumbered(asked), clean_logits=clean[:, asked])
        expected = metric.score(logits, prompts, clean_logits=clean)
        assert torch.equal(found, expected), "reads_others = False was declared, and other logits change the score"

    def test_gradients_flow(self) -> None:
        """Attribution needs the derivative; a count declares ``differentiable = False``."""
        logits, prompts, clean = self._case()
        values = self.make().score(logits.requires_grad_(True), prompts, clean_logits=clean)
        assert values.requires_grad == self.differentiable, f"differentiable = {self.differentiable} was declared"
        if self.differentiable:
            gradient = torch.autograd.grad(values.sum(), logits)[0]
            assert gradient.isfinite().all() and gradient.any(), "the gradient is zero or not finite"

    def test_an_untouched_model_is_the_best_or_the_zero_of_a_distance(self) -> None:
        """A metric where less is better, compared with the untouched model, is least for it."""
        metric = self.make()
        if metric.name == "kl" or (not metric.higher_is_better and metric.floor.value == "ablated"):
            logits, prompts, clean = self._case()
            assert (metric.score(logits, prompts, clean_logits=logits) <= metric.score(logits, prompts, clean_logits=clean) + 1e-6).all()
