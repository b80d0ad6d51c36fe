"""Sequences to be continued, without sentences: "one two three four" -> " five".

These are the paper's prompts for Llama, whose tokenizer splits digits and many words: hence the shorter ranges. One
prompt for each first member, no more: ``n`` beyond that gives a warning and no duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from circuitkit.tasks import words
from circuitkit.tasks.sequences import SequenceTask
from circuitkit.tasks.templates import BARE


@final
@dataclass(frozen=True)
class BareNumerals(SequenceTask):
    """1 to 9: "1 2 3 4" to "5 6 7 8"."""

    n: int = 5
    templates: Sequence[str] = ("bare",)
    top: int = 9

    name = "bare_numerals"
    vocabulary = words.NUMERALS
    offered = BARE


@final
@dataclass(frozen=True)
class BareNumwords(SequenceTask):
    """one to twelve: "one two three four" to "eight nine ten eleven"."""

    n: int = 8
    templates: Sequence[str] = ("bare",)

    name = "bare_numwords"
    vocabulary = words.NUMWORDS
    offered = BARE


@final
@dataclass(frozen=True)
class BareMonths(SequenceTask):
    """January to December."""

    n: int = 8
    templates: Sequence[str] = ("bare",)

    name = "bare_months"
    vocabulary = words.MONTHS
    others = words.NUMWORDS[:12]
    offered = BARE


@final
@dataclass(frozen=True)
class BareEsNumwords(SequenceTask):
    """uno to siete, three shown: "uno dos tres" to "cuatro cinco seis"."""

    n: int = 4
    templates: Sequence[str] = ("bare",)
    length: int = 3
    top: int = 7

    name = "bare_es_numwords"
    vocabulary = words.ES_NUMWORDS
    others = words.ES_MONTHS
    offered = BARE


@final
@dataclass(frozen=True)
class BareEsMonths(SequenceTask):
    """enero to mayo, three shown: "enero febrero marzo" and "febrero marzo abril"."""

    n: int = 2
    templates: Sequence[str] = ("bare",)
    length: int = 3
    top: int = 5

    name = "bare_es_months"
    vocabulary = words.ES_MONTHS
    others = words.ES_NUMWORDS[:12]
    offered = BARE
