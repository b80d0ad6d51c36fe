"""Tasks: prompts in which a behaviour shows, each with a corrupt twin in which it cannot."""

from circuitkit.tasks.arithmetic import Addition, Arithmetic, Multiplication, Subtraction
from circuitkit.tasks.bare_sequences import BareEsMonths, BareEsNumwords, BareMonths, BareNumerals, BareNumwords
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.from_file import FromFile
from circuitkit.tasks.greater_than import GreaterThan
from circuitkit.tasks.intervals import Intervals, NextWord
from circuitkit.tasks.ioi import IndirectObject
from circuitkit.tasks.mixed import MixedMonths
from circuitkit.tasks.questions import Question, Questions, QuestionSet
from circuitkit.tasks.sequences import Days, EsMonths, EsNumwords, Letters, Months, Numerals, Numwords, SequenceTask
from circuitkit.tasks.word_problems import DateProblem, MonthList, MonthProblem

__all__ = [
    "Accept",
    "Addition",
    "Arithmetic",
    "BareEsMonths",
    "BareEsNumwords",
    "BareMonths",
    "BareNumerals",
    "BareNumwords",
    "DateProblem",
    "Days",
    "EsMonths",
    "EsNumwords",
    "FromFile",
    "GreaterThan",
    "IndirectObject",
    "Intervals",
    "Letters",
    "MixedMonths",
    "MonthList",
    "MonthProblem",
    "Months",
    "Multiplication",
    "NextWord",
    "Numerals",
    "Numwords",
    "Question",
    "QuestionSet",
    "Questions",
    "SequenceTask",
    "Subtraction",
    "Task",
    "Tokenizer",
]
