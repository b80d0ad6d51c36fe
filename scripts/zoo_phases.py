"""How each embedded "zoo" model is trained: one phase after the other. Used by `train_zoo.py` beside this file."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import zoo_recipe as recipe
import zoo_skills as skills
from torch import Tensor
from transformers import PreTrainedModel

from circuitkit.models.zoo.training import Activity, Prices, train


@dataclass(frozen=True)
class Phase:
    """One training run, which starts from the weights of the last. It depends on these, on the seed and on its fields.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate: warm-up, then cosine to 5 % (`learning_rate_factor`).
        schedule: Steps for which the learning rate is laid out, if it is not ``steps``: the phase ends earlier then.
        warmup: Steps of warm-up.
        shares: Share of the documents of each kind, in the order of `recipe.KINDS`.
        documents: Documents per step.
        data_seed: Added to the seed of the data.
        sparsity: Factor of the price of activity; 0: none.
        prices: What activity costs in the core sequences.
        ramp: Steps over which the price grows.
    """

    steps: int
    learning_rate: float
    schedule: int | None = None
    warmup: int = 100
    shares: tuple[float, ...] = (0.36, 0.20, 0.28, 0.07, 0.05, 0.04)
    documents: int = 144
    data_seed: int = 0
    sparsity: float = 0.0
    prices: Prices = Prices(heads={}, mlps=(0,) * 4, relative=False)
    ramp: int = 0


def _dear_half(price: float) -> Prices:
    """Half of the first layer's heads are dear, so that later layers' heads have work to do."""
    return Prices(heads={"any": ((1,) * 4 + (price,) * 4, *[(1,) * 8] * 3)}, mlps=(0,) * 4, relative=False)


KEPT = ((0, 1), (1, 3), (2, 3, 5), (0, 4, 7))
"""Heads of each layer that shall do the sequences in tiny_gpt2; the others are dear, and so is MLP 2."""


def _few(cheap: float, dear: float, early: float, elsewhere: tuple[float, float], mlps: tuple[float, ...]) -> Prices:
    """Kept heads are cheap, the others dear; before a member, where it is to be said, all of layer 0 is dear.

    Args:
        cheap: Price of a kept head.
        dear: Price of another.
        early: Price of layer 0 before a member.
        elsewhere: Prices of a kept head and of another away from members.
        mlps: Price per layer.
    """

    def table(kept_price: float, other_price: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(kept_price if head in kept else other_price for head in range(8)) for kept in KEPT)

    before = ((early,) * 8, *table(cheap, dear)[1:])
    return Prices({"member": table(cheap, dear), "before": before, "other": table(*elsewhere)}, mlps, relative=True)


BY_PLACE = Prices(  # heads that compare members belong into layers 0 and 1, those that say the next one into 2 and 3
    heads={
        "member": ((1,) * 3 + (3,) * 5, (1,) * 3 + (3,) * 5, (2,) * 8, (3,) * 8),
        "before": ((15,) * 8, (8,) * 8, (0.5,) * 3 + (2,) * 5, (0.5,) * 3 + (2,) * 5),
        "other": ((1,) * 8,) * 4,
    },
    mlps=(0.1, 0.2, 1.5, 0.1),
    relative=True,
)
SEQUENCES = (0.44, 0.20, 0.18, 0.07, 0.07, 0.04)
PHASES: dict[str, tuple[Phase, ...]] = {
    "tiny_gpt2": (
        Phase(4000, 2e-3),
        Phase(700, 1e-3, warmup=30, data_seed=1000, sparsity=0.016, prices=_dear_half(6)),
        Phase(
            200, 1.5e-3, schedule=700, warmup=30, data_seed=1000, shares=(0.42, 0.20, 0.20, 0.07, 0.07, 0.04), documents=72,
            sparsity=0.02, prices=BY_PLACE, ramp=60,
        ),
        Phase(
            200, 1.5e-3, schedule=600, warmup=30, data_seed=2000, shares=SEQUENCES, documents=60,
            sparsity=0.02, prices=_few(0.3, 12, 20, (0.5, 4), (0.1, 0.2, 6, 0.1)), ramp=30,
        ),
        Phase(
            450, 1.5e-3, warmup=30, data_seed=3000, shares=SEQUENCES, documents=60,
            sparsity=0.06, prices=_few(0.1, 12, 30, (0.2, 4), (0.05, 0.05, 6, 0.05)), ramp=20,
        ),
        Phase(
            450, 1.5e-3, warmup=30, data_seed=4000, shares=SEQUENCES, documents=60,
            sparsity=0.06, prices=_few(0.1, 30, 60, (0.2, 8), (0.05, 0.05, 40, 0.05)), ramp=20,
        ),
    ),
    "tiny_llama": (Phase(4000, 2e-3), Phase(600, 1e-3, warmup=30, data_seed=1000, sparsity=0.007, prices=_dear_half(8))),
}  # fmt: skip


class Price:
    """The price of activity, which grows from step to step until it is whole. Final."""

    def __init__(self, activity: Activity, whole: float, ramp: int) -> None:
        self._activity, self._whole, self._ramp = activity, whole, ramp
        self.steps_done = 0

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return what to add to the loss of a chunk."""
        share = min(1.0, (self.steps_done + 1) / (self._ramp + 1))
        return self._whole * share * self._activity.cost(ids, weights)


def run(phase: Phase, model: PreTrainedModel, vocabulary: dict[str, int], seed: int, on_log: Callable[[int, float], None]) -> float:
    """Train a model in place.

    Args:
        phase: What to do.
        model: A zoo model.
        vocabulary: Token to id.
        seed: Of the data.
        on_log: Called after every step with the step (from 1) and its loss.

    Returns:
        The mean weighted loss over the last 50 steps, without the price.
    """
    families = [[vocabulary[word] for word in recipe.SETS[name][0]] for name in skills.CORE]
    activity = Activity(model, families, phase.prices) if phase.sparsity else None
    price = Price(activity, phase.sparsity, phase.ramp) if activity else None

    def count(step: int, loss: float) -> None:
        if price is not None:
            price.steps_done = step
        on_log(step, loss)

    shares = dict(zip(recipe.KINDS, phase.shares, strict=True))
    loss = train(
        model,
        itertools.islice(recipe.batches(vocabulary, seed + phase.data_seed, shares, phase.documents), phase.steps),
        steps=phase.schedule or phase.steps,
        learning_rate=phase.learning_rate,
        warmup=phase.warmup,
        seed=seed,
        penalty=price,
        on_log=count,
    )
    if activity is not None:
        activity.close()
    return loss
