"""Years that must be later: "The war lasted from the year 1732 to the year 17" -> "45".

Source: Hanna et al., "How does GPT-2 compute greater-than?" (arXiv 2305.00586).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal, final

from circuitkit.core.errors import ConfigError, PromptError, unknown_choice
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.drawing import draw
from circuitkit.tasks.encoding import Encoder, encode
from circuitkit.tasks.fitting import one_token

NOUNS = ("war", "campaign", "trip", "siege", "study", "project")
CENTURIES = tuple(str(century) for century in range(11, 20))
YEARS = tuple(str(year) for year in range(11, 100))
ENDINGS = tuple(f"{year:02}" for year in range(100))
"""All that can stand behind a century, as answers."""


@final
@dataclass(frozen=True)
class GreaterThan(Task):
    """The last two digits of a year that must be later than another one.

    All later years of the century are right and all others, the start year among them, are wrong; with ``metric=prob_diff`` this is the
    score of "How does GPT-2 compute greater-than?" (arXiv 2305.00586). The corrupt twin starts in the first year that is ever used, so that
    nearly all are later and there is nothing to tell. Where the tokenizer does not split a year after the century, a space does.

    Attributes:
        n: Prompts.
        seed: Of the draw.
        filter: Whether prompts are drawn again where no answer is the model's likeliest token.
        bos: None begins texts as the tokenizer does on its own, True with its BOS token, False with no special token.
        years: ``all`` for the sets above; ``pair`` for one later year as the answer and one that is too early as the wrong answer, both
            drawn at random, so that the mean logit difference says by how much later years are preferred.
    """

    n: int = 256
    seed: int = 0
    filter: bool = False
    bos: bool | None = None
    years: Literal["all", "pair"] = "all"

    name = "greater_than"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"task.n, the number of prompts, must be 1 or more; found {self.n}.")
        if self.years not in ("all", "pair"):
            raise ConfigError(unknown_choice("choice of years (task.years)", self.years, ("all", "pair")))

    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        n, seed = self.n if n is None else n, self.seed if seed is None else seed
        encoder = Encoder(tokenizer, self.bos)
        nouns = one_token(encoder, "The", NOUNS)
        gap, years = _years(encoder)
        if not nouns or not years:
            raise PromptError(
                "A noun and at least three years of a century must be one token each (years without their century), and the tokenizer has "
                f"{len(nouns)} such nouns and {len(years)} such centuries. Use another task or another model."
            )

        endings = {century: one_token(encoder, f"year {century}", ENDINGS, gap) for century in years}

        def candidate(_: str, k: int) -> Prompt:
            rng = Random(f"{seed}/{k}")
            noun, century = rng.choice(nouns), rng.choice(list(years))
            place = rng.randrange(1, len(years[century]) - 1)
            first, start = years[century][0], years[century][place]
            later, earlier = [rng.choice(years[century][place + 1 :])], [rng.choice(years[century][:place])]
            if self.years == "all":
                later, earlier = ([year for year in endings[century] if (year > start) is right] for right in (True, False))
            begin, end = f"The {noun} lasted from the year {century}{gap}", f" to the year {century}"
            spans = {"start": (len(begin), len(begin + start))}
            texts = begin + start + end, begin + first + end
            right, wrong = ([gap + year for year in each] for each in (later, earlier))
            return Prompt(texts[0], texts[1], right, wrong, spans=spans, corrupt_spans=spans)

        kept = draw({self.name: n}, candidate, lambda batch: encode(batch, encoder), accept if self.filter else None)
        return encode(kept[self.name], encoder)


def _years(encoder: Encoder) -> tuple[str, dict[str, list[str]]]:
    """The gap between a century and a year, and the years that are one token behind each century that has some."""
    for gap in ("", " "):
        centuries = one_token(encoder, "year", CENTURIES)
        years = {century: one_token(encoder, f"year {century}", YEARS, gap) for century in centuries}
        years = {century: found for century, found in years.items() if len(found) > 2}
        if years:
            return gap, years
    return " ", {}
