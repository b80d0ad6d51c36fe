"""Sets of tokens with weights, one for each prompt: what counts as an answer, and what as a wrong one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.errors import PromptError


@dataclass(frozen=True)
class TokenSets:
    """For each prompt a set of tokens, each with the weight that its probability counts with.

    Attributes:
        ids: The tokens of each prompt, and behind them any others as padding.
        weights: More than 0 for the tokens, and 0 for the padding.
    """

    ids: Int[Tensor, "prompt choice"]
    weights: Float[Tensor, "prompt choice"]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.weights.shape:
            raise PromptError(
                f"Token sets need a table of ids and one of weights of equal size, prompts x choices, found {tuple(self.ids.shape)} and "
                f"{tuple(self.weights.shape)}. A single token per prompt is TokenSets.single(tokens)."
            )
        if not (self.weights.isfinite().all() and (self.weights >= 0).all()):
            raise PromptError(
                "The weight of an answer must be a number above 0 (0 marks what is no answer), found "
                f"{self.weights.min().item():g} to {self.weights.max().item():g}. Give 1 to answers that count alike."
            )

    @classmethod
    def single(cls, tokens: Int[Tensor, " prompt"]) -> TokenSets:
        """One token per prompt, of weight 1."""
        return cls(tokens[:, None], torch.ones(len(tokens), 1))

    @classmethod
    def of(cls, sets: Sequence[Mapping[int, float]]) -> TokenSets:
        """Sets of any size: for each prompt the weight of each of its tokens."""
        widest = max((len(each) for each in sets), default=0)
        ids, weights = torch.zeros(len(sets), widest, dtype=torch.long), torch.zeros(len(sets), widest)
        for row, each in enumerate(sets):
            ids[row, : len(each)] = torch.tensor(list(each), dtype=torch.long)
            weights[row, : len(each)] = torch.tensor(list(each.values()), dtype=torch.float32)
        return cls(ids, weights)

    @classmethod
    def none(cls, n: int) -> TokenSets:
        """Empty sets, for prompts of which no answer is asked."""
        return cls(torch.zeros(n, 0, dtype=torch.long), torch.zeros(n, 0))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> Int[Tensor, " prompt"]:
        """Number of tokens in each set."""
        return (self.weights > 0).sum(-1)

    @property
    def is_single(self) -> bool:
        """Whether every set is one token of weight 1, so that it can be looked up instead of summed."""
        return self.ids.shape[1] > 0 and bool((self.weights[:, 0] == 1).all() and (self.sizes == 1).all())

    @property
    def tokens(self) -> Int[Tensor, " prompt"]:
        """The one token of each prompt.

        Raises:
            PromptError: A set has none, several, or one of another weight.
        """
        if not self.is_single:
            sizes = self.sizes
            raise PromptError(
                "What was asked for reads one answer and one wrong answer per prompt, each of weight 1, and these prompts have sets of "
                f"{int(sizes.min())} to {int(sizes.max())} tokens. Use prompts with single answers, or a metric over sets (logit_diff, "
                "prob_diff, log_prob)."
            )
        return self.ids[:, 0]

    def take(self, rows: Int[Tensor, " row"]) -> TokenSets:
        """The sets of some prompts."""
        return TokenSets(self.ids[rows], self.weights[rows])

    def renumbered(self, tokens: Int[Tensor, " some"]) -> TokenSets:
        """The same sets with each token's place in a sorted list that holds all of them."""
        return TokenSets(torch.searchsorted(tokens, self.ids).clamp(max=max(0, len(tokens) - 1)), self.weights)

    def have(self, tokens: Int[Tensor, "*mask prompt"]) -> Bool[Tensor, "*mask prompt"]:
        """Whether a token is in the set of its prompt."""
        return ((tokens[..., None] == self.ids.to(tokens.device)) & (self.weights > 0).to(tokens.device)).any(-1)

    def shared(self, other: TokenSets) -> Bool[Tensor, " prompt"]:
        """Whether the two sets of a prompt have a token in common."""
        same = self.ids[:, :, None] == other.ids[:, None, :]
        return (same & (self.weights > 0)[:, :, None] & (other.weights > 0)[:, None, :]).flatten(1).any(-1)

    def update(self, digest: hashlib._Hash) -> None:
        """Adds all that a score can depend on to a hash."""
        for column in (self.ids.to(torch.int64), self.weights.to(torch.float64)):
            digest.update(str(tuple(column.shape)).encode())
            digest.update(column.cpu().contiguous().numpy().tobytes())
