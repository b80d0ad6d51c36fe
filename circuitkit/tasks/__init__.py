"""Tasks: prompts in which a behaviour shows, each with a corrupt twin in which it cannot."""

from circuitkit.tasks.bare_sequences import BareEsMonths, BareEsNumwords, BareMonths, BareNumerals, BareNumwords
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.from_file import FromFile
from circuitkit.tasks.sequences import Days, EsMonths, EsNumwords, Letters, Months, Numerals, Numwords, SequenceTask

__all__ = [
    "Accept",
    "BareEsMonths",
    "BareEsNumwords",
    "BareMonths",
    "BareNumerals",
    "BareNumwords",
    "Days",
    "EsMonths",
    "EsNumwords",
    "FromFile",
    "Letters",
    "Months",
    "Numerals",
    "Numwords",
    "SequenceTask",
    "Task",
    "Tokenizer",
]
