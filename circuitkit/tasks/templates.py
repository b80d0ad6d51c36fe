"""Sentences with slots. A prompt is built from its slots, so what is filled in can never be filled over again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from circuitkit.core.errors import ConfigError
from circuitkit.tasks import words

MEMBER, FILLER = "{member}", "{filler}"


class Filled(NamedTuple):
    """A template with its slots filled.

    Attributes:
        text: The prompt, which ends before the answer and before the space that the answer brings along.
        gap: That space.
        spans: ``S1``, ``S2``, ... to where that member lies: ``text[start:end]``.
    """

    text: str
    gap: str
    spans: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """One sentence, said once for each member and once more up to the place of the answer.

    Attributes:
        sentence: Text with ``{member}`` once, and ``{filler}`` before it if the sentence has a filler.
        fillers: The words that the filler is drawn from.
    """

    sentence: str
    fillers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        before, *behind = self.sentence.split(MEMBER)
        if len(behind) != 1 or FILLER in behind[0] or (FILLER in before) != bool(self.fillers):
            raise ConfigError(
                f"A template must hold {MEMBER} once, and {FILLER} before it if and only if it has fillers; found {self.sentence!r} with "
                f"{len(self.fillers)} fillers. Write it like '{FILLER} born in {MEMBER}.' or '{MEMBER}'."
            )

    @property
    def opens_with_member(self) -> bool:
        """Whether the text begins with a member, which then has no space before it."""
        return self.sentence.startswith(MEMBER)

    def fill(self, members: Sequence[str], fillers: Sequence[str] = ()) -> Filled:
        """The prompt that shows these members.

        Args:
            members: In the order shown.
            fillers: One for each member and one for the unfinished sentence; none if the template has none.
        """
        before, behind = self.sentence.split(MEMBER)
        begins = [before.replace(FILLER, filler) for filler in fillers] or [before] * (len(members) + 1)
        text, spans = "", {}
        for place, (begin, member) in enumerate(zip(begins, members, strict=False), start=1):
            text += begin
            spans[f"S{place}"] = (len(text), len(text) + len(member))
            text += member + behind + " "
        text += begins[len(members)]
        shown = text.rstrip()
        return Filled(shown, text[len(shown) :], spans)


TEMPLATES: Mapping[str, Template] = {
    "names": Template("{filler} born in {member}.", words.NAMES),
    "lost": Template("{filler} lost in {member}.", words.THINGS),
    "done": Template("{filler} done in {member}.", words.THINGS),
}
"""The three sentences of the paper, in the form of its data (without "was")."""

BARE: Mapping[str, Template] = {"bare": Template("{member}")}
"""Members and nothing else."""
