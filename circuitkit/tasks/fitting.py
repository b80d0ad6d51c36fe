"""Which members and fillers fit a tokenizer, so that every prompt gets the same number of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from circuitkit.core.errors import PromptError
from circuitkit.tasks import words
from circuitkit.tasks.encoding import Encoder
from circuitkit.tasks.templates import Template

_SEQUENCES = (
    words.NUMERALS, words.NUMWORDS, words.ORDINALS, words.MONTHS, words.DAYS, words.LETTERS, words.ES_NUMWORDS, words.ES_MONTHS,
)  # fmt: skip
_MEMBERS = frozenset(member.casefold() for sequence in _SEQUENCES for member in sequence)


def check_members(encoder: Encoder, template: Template, members: Sequence[str], length: int) -> None:
    """Refuses members that differ in their number of tokens.

    Raises:
        PromptError: Says which member has how many tokens.
    """
    context = template.fill(members[:length], template.fillers[:1] * (length + 1))
    tokens = dict(zip(members, encoder.added(context.text, [context.gap + member for member in members]), strict=True))
    usual = Counter(len(added) for added in tokens.values()).most_common(1)[0][0]
    odd = next((member for member, added in tokens.items() if len(added) != usual or not encoder.knows(added)), None)
    if odd is None:
        return
    found = f"{len(tokens[odd])} tokens {encoder.show(tokens[odd])}" if encoder.knows(tokens[odd]) else "no token of its own"
    longest = members.index(odd)
    shorter = f"a shorter range (task.top={longest}), " if longest > length else ""
    raise PromptError(
        f"Every member must have the same number of tokens, which is {usual} for most, but {odd!r} has {found}. "
        f"Use {shorter}another task or another model."
    )


def usable_openers(encoder: Encoder, members: Sequence[str], starts: Sequence[str]) -> frozenset[str]:
    """The members that have as many tokens at the beginning of a text, without a space before them, as those that clean prompts begin with.

    Raises:
        PromptError: Those that clean prompts begin with differ among themselves.
    """
    counts = {member: len(ids) for member, ids in zip(members, encoder.ids(members), strict=True)}
    usual = Counter(counts[start] for start in starts).most_common(1)[0][0]
    for start in starts:
        if counts[start] != usual:
            raise PromptError(
                f"Every first member must have the same number of tokens at the beginning of a text, which is {usual} for most, but "
                f"{start!r} has {counts[start]}. Use the same members in sentences, another range (task.top) or another model."
            )
    return frozenset(member for member in members if counts[member] == usual)


def usable_fillers(encoder: Encoder, templates: Mapping[str, Template], shown: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The fillers of each template with which all prompts, of all templates, have the same number of tokens.

    A filler is dropped if it is a member of any sequence, is not one token behind a space, or changes the length of
    the prompt elsewhere, as a first word without a space may.

    Raises:
        PromptError: Too few are left in a template.
    """
    needed = len(shown) + 1
    candidates = {name: _one_token(encoder, template.fillers) for name, template in templates.items()}
    pairs = [(name, filler) for name, fillers in candidates.items() for filler in fillers]
    lengths = [len(ids) for ids in encoder.ids([templates[name].fill(shown, [filler] * needed).text for name, filler in pairs])]
    usual = _common_length([(name, length) for (name, _), length in zip(pairs, lengths, strict=True)])
    kept = {pair for pair, length in zip(pairs, lengths, strict=True) if length == usual}
    pools = {name: tuple(filler for filler in fillers if (name, filler) in kept) for name, fillers in candidates.items()}
    for name, pool in pools.items():
        if templates[name].fillers and len(pool) < needed:
            raise PromptError(
                f"Template {name!r} needs {needed} fillers that are one token and make prompts of {usual} tokens, and {len(pool)} of its "
                f"{len(templates[name].fillers)} are. Use other templates (task.templates) or another model."
            )
    return pools


def _common_length(found: Sequence[tuple[str, int]]) -> int:
    """The length of prompts that leaves most fillers to the template to which it leaves fewest."""
    counts = Counter(found)
    names = {name for name, _ in found}
    return max(sorted({length for _, length in found}), key=lambda length: min(counts[name, length] for name in names), default=0)


def _one_token(encoder: Encoder, fillers: Collection[str]) -> list[str]:
    apart = [filler for filler in dict.fromkeys(fillers) if filler.casefold() not in _MEMBERS]
    return one_token(encoder, ".", apart)


def one_token(encoder: Encoder, text: str, choices: Sequence[str], gap: str = " ") -> list[str]:
    """The words that add exactly one token, a known one, when they are appended to a text behind a gap, and leave its own tokens alone."""
    (base,) = encoder.ids([text])
    rows = encoder.ids([text + gap + word for word in choices])
    return [word for word, row in zip(choices, rows, strict=True) if row[:-1] == base and encoder.knows(row[-1:])]
