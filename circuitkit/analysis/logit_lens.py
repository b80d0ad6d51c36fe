"""Logit lens: what the model would say at the last position if it stopped after the embedding, after each attention, after each MLP.

The final norm is applied exactly once to every state; the last state's logits are the model's own. In models whose attention and MLP
read the same input, the attention's share is added first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.errors import ModelError
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.models.hooked import HookedModel, Layer

Sites = Float[Tensor, " site"]


@dataclass(frozen=True)
class LogitLens:
    """What each prompt's state at the last position says about two tokens, at every site.

    Attributes:
        sites: ``input``, ``a0``, ``m0``, ``a1``, ...: the state after that part has been added.
        answer: Logit of the answer.
        wrong: Logit of the wrong answer, that is the last member shown.
        answer_is_top: Whether the answer is the most likely of all tokens.
        wrong_is_top: Whether the wrong answer is.
    """

    sites: tuple[str, ...]
    answer: Float[Tensor, "site prompt"]
    wrong: Float[Tensor, "site prompt"]
    answer_is_top: Bool[Tensor, "site prompt"]
    wrong_is_top: Bool[Tensor, "site prompt"]

    def switches(self) -> dict[str, int]:
        """How many prompts make their final switch from the wrong answer to the answer at each site, in the order of the sites.

        Of the two tokens alone: the site from which on the answer's logit is the larger one to the end, if it was not before. Prompts
        that end with the wrong answer, or prefer the answer from the embedding on, are not counted.
        """
        right = (self.answer > self.wrong).T.tolist()
        places = Counter(len(row) - row[::-1].index(False) for row in right if row[-1] and not all(row))
        return {self.sites[place]: places[place] for place in sorted(places)}

    def top1_switches(self) -> dict[str, int]:
        """The same by the most likely of all tokens: it is the wrong answer before a site, and the answer after it. The first such site."""
        moves = (self.wrong_is_top[:-1] & self.answer_is_top[1:]).T.tolist()
        places = Counter(row.index(True) + 1 for row in moves if any(row))
        return {self.sites[place]: places[place] for place in sorted(places)}


def most_common(counts: Mapping[str, int]) -> str | None:
    """The site with the highest count, the first of several; None if there is none."""
    return max(counts, key=lambda site: counts[site], default=None)


def logit_lens(model: HookedModel, prompts: PromptSet) -> LogitLens:
    """Reads the clean prompts' states at the last position. Costs an unembedding a site and prompt.

    Args:
        model: The model, of any architecture.
        prompts: Their answers and wrong answers are what is looked for.
    """
    prompts.require_last("The logit lens")
    if not model.map.direct or len(model.map.layers_with_attention) + len(model.map.layers_with_mlps) < 2 * model.n_layers:
        why = "some layers have no attention or no MLP" if model.map.direct else "something lies between its final norm and its unembedding"
        raise ModelError(
            f"The logit lens reads {model.name} ({model.map.family}) behind every attention and MLP through its final norm, and {why}. "
            "Measure the parts by removing them (method=knockout)."
        )
    sites = ("input", *(f"{part}{layer}" for layer in range(model.n_layers) for part in "am"))
    rows = RowBudget(model, prompts.n_pos).rows
    parts = [_judge(model, prompts.take(part)) for part in torch.arange(len(prompts)).split(rows)]
    answer, wrong, top = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    return LogitLens(sites, answer, wrong, top == prompts.answers.tokens, top == prompts.wrongs.tokens)


def _judge(model: HookedModel, prompts: PromptSet) -> tuple[Float[Tensor, "site row"], Float[Tensor, "site row"], Int[Tensor, "site row"]]:
    """Logits of the two tokens, and the most likely token, at each site."""
    answers, wrongs = prompts.answers.tokens, prompts.wrongs.tokens
    states: list[Tensor] = []

    def visit(layer: Layer) -> None:
        states.append(layer.resid[:, -1:])
        # In a parallel block the norm before the MLP reads what enters the block.
        attention = layer.block.attention
        if layer.block.parallel and attention is not None:
            states.append((layer.resid + attention.scale * layer.attention_added)[:, -1:])
        else:
            states.append(layer.mlp_norm_in[:, -1:])

    final = model.run(prompts.clean, visit, **prompts.padding(slice(0, len(prompts))))
    assert final is not None
    answer, wrong, top = [], [], []
    for state in (*states, None):
        logits = (final if state is None else model.unembed(state))[:, -1].float().cpu()
        answer.append(logits.gather(1, answers[:, None])[:, 0])
        wrong.append(logits.gather(1, wrongs[:, None])[:, 0])
        top.append(logits.argmax(-1))
    return torch.stack(answer), torch.stack(wrong), torch.stack(top)
