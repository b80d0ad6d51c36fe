"""Indirect objects: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Source: Wang et al., "Interpretability in the Wild" (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import final

from circuitkit.core.errors import ConfigError, PromptError, unknown_choice
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.tasks import words
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.drawing import draw
from circuitkit.tasks.encoding import Encoder, encode
from circuitkit.tasks.fitting import one_token

ORDERS: Mapping[str, tuple[str, str]] = MappingProxyType({"abba": ("IO", "S1"), "baba": ("S1", "IO")})
"""Which name comes first, by the order of all names."""


@final
@dataclass(frozen=True)
class IndirectObject(Task):
    """Two names, one of which comes again; the answer is the other one, the wrong answer the one that came again.

    The corrupt twin has three other names, each once, so that nothing is left to tell who was given the thing. Names are labelled IO, S1
    and S2.

    Attributes:
        n: Prompts an order of names.
        seed: Of the draw.
        orders: Which name is first: ``abba`` for the indirect object, ``baba`` for the subject.
        filter: Whether prompts that the untouched model cannot do are drawn again.
        bos: None begins texts as the tokenizer does on its own, True with its BOS token, False with no special token.
    """

    n: int = 256
    seed: int = 0
    orders: Sequence[str] = ("abba", "baba")
    filter: bool = True
    bos: bool | None = None

    name = "ioi"

    def __post_init__(self) -> None:
        names = (self.orders,) if isinstance(self.orders, str) else tuple(self.orders)
        object.__setattr__(self, "orders", names)
        for name in names:
            if name not in ORDERS:
                raise ConfigError(unknown_choice("order of names (task.orders)", name, ORDERS))
        if not names or len(set(names)) < len(names) or self.n < 1:
            raise ConfigError(f"task.orders must name at least one order, each once, and task.n be 1 or more; found {names} and {self.n}.")

    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        n, seed = self.n if n is None else n, self.seed if seed is None else seed
        encoder = Encoder(tokenizer, self.bos)
        names, places, things = (one_token(encoder, "to", choices) for choices in (words.NAMES, words.PLACES, words.OBJECTS))
        if len(names) < 5 or not places or not things:
            raise PromptError(
                f"Five names, a place and a thing must be one token each behind a space, and {len(names)} names, {len(places)} places and "
                f"{len(things)} things of the task's lists are. Use another task or another model."
            )

        def candidate(order: str, k: int) -> Prompt:
            rng = Random(f"{seed}/{order}/{k}")
            indirect, subject, *others = rng.sample(names, 5)
            place, thing = rng.choice(places), rng.choice(things)
            clean, spans = _sentence(order, (indirect, subject, subject), place, thing)
            corrupt, corrupt_spans = _sentence(order, others, place, thing)
            return Prompt(clean, corrupt, f" {indirect}", f" {subject}", order, "", spans, corrupt_spans)

        kept = draw(dict.fromkeys(self.orders, n), candidate, lambda batch: encode(batch, encoder), accept if self.filter else None)
        return encode([prompt for order in self.orders for prompt in kept[order]], encoder)


def _sentence(order: str, names: Sequence[str], place: str, thing: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """The prompt in which the first name is the indirect object and the third one gives, and where the names lie."""
    indirect, subject, giver = names
    named = {"IO": indirect, "S1": subject}
    text, spans = "When", {}
    for label, behind in zip(ORDERS[order], (" and", f" went to the {place},"), strict=True):
        spans[label] = (len(text) + 1, len(text) + 1 + len(named[label]))
        text += f" {named[label]}{behind}"
    spans["S2"] = (len(text) + 1, len(text) + 1 + len(giver))
    return f"{text} {giver} gave a {thing} to", spans
