"""Prompts of one's own, from a JSONL file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import final

from circuitkit.core import plain
from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.core.prompts import Prompt, PromptSet, weighted
from circuitkit.storage.reading import read_lines
from circuitkit.tasks.base import Accept, Task, Tokenizer
from circuitkit.tasks.encoding import Encoder, encode

_TEXTS, _ANSWERS = ("clean", "corrupt"), ("answer", "wrong")
_REQUIRED = (*_TEXTS, "answer")
_OPTIONAL = ("wrong", "group", "labels", "corrupt_labels")


@final
@dataclass(frozen=True)
class FromFile(Task):
    """Reads one prompt a line, in the order of the file.

    A line is a JSON object with the texts ``clean``, ``corrupt``, ``answer`` and ``wrong``; the last two as they would be
    appended to the prompt, so usually with a space before them. Each of the two may be several: a list of texts that count alike, or an
    object from texts to the weights that their probabilities count with; there may be no wrong one, for metrics that look at none. One
    answer may have several tokens, for ``metric=log_prob``. ``group`` names the template (``all`` if not given), ``labels``
    gives labels to pieces of the clean text as ``{"S1": [start, end]}``, and ``corrupt_labels`` does so for the corrupt text where
    they lie elsewhere. Prompts may differ in length, a corrupt prompt from its clean twin may not.

    Attributes:
        path: The file.
        n: Prompts a group, the first ones; None for all.
        seed: Without effect, since nothing is drawn.
        filter: Whether prompts that the untouched model cannot do are left out.
        bos: None begins texts as the tokenizer does on its own, True with its BOS token, False with no special token.
    """

    path: str | Path
    n: int | None = None
    seed: int = 0
    filter: bool = True
    bos: bool | None = None

    name = "from_file"
    reads_files = ("path",)

    def prompts(self, tokenizer: Tokenizer, *, n: int | None = None, seed: int | None = None, accept: Accept | None = None) -> PromptSet:
        n = self.n if n is None else n
        if n is not None and n < 1:
            raise ConfigError(f"task.n, the number of prompts a group, must be 1 or more, or null for all; found {n}.")
        lines, read = self._read()
        try:
            prompts = encode(read, Encoder(tokenizer, self.bos), equal=False, several=True)
        except PromptError as problem:
            if problem.row is None:
                raise
            raise PromptError(f"Line {lines[problem.row]} of {str(self.path)!r}: {problem}") from None
        if accept and self.filter:
            passed = accept(prompts)
            if not passed.any():
                raise PromptError(
                    f"None of the {len(prompts)} prompts in {str(self.path)!r} passed the filter (0 %). The model cannot do this task; "
                    "take another model or other prompts, or turn the filter off (task.filter=false)."
                )
            prompts = prompts.take(passed)
        seen: Counter[int] = Counter()
        rows = []
        for row, group in enumerate(prompts.groups.tolist()):
            seen[group] += 1
            if n is None or seen[group] <= n:
                rows.append(row)
        return prompts.take(rows)

    def _read(self) -> tuple[list[int], list[Prompt]]:
        """The prompts, and on which line each of them is."""
        try:
            lines = read_lines(self.path, "prompt", PromptError)
        except PromptError as problem:
            raise PromptError(f"task.path must be a JSONL file in UTF-8, but this was found: {problem}") from None
        prompts = {number: _parse(line, f"Line {number} of {str(self.path)!r}") for number, line in enumerate(lines, 1) if line.strip()}
        if not prompts:
            raise PromptError(f"{str(self.path)!r} holds no prompts. Expected a JSON object a line, with {', '.join(_REQUIRED)}.")
        return list(prompts), list(prompts.values())


def _parse(line: str, where: str) -> Prompt:
    """The prompt of one line.

    Raises:
        PromptError: Says where the line is and what is wrong with it.
    """
    expected = f"Expected a JSON object with the texts {', '.join(_REQUIRED)}, and optionally {', '.join(_OPTIONAL)}."
    try:
        record = plain.parse(line)
    except ValueError as problem:
        raise PromptError(f"{where} is not JSON ({problem}). {expected}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where} is a {type(record).__name__}. {expected}")
    unknown = sorted(record.keys() - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise PromptError(f"{where} has the unknown keys {', '.join(unknown)}. {expected}")
    for key in (*_TEXTS, "group"):
        value = record.get(key, "all" if key == "group" else None)
        if not isinstance(value, str) or not value:
            raise PromptError(f"{where} has {value!r} as {key!r}, which must be a text that is not empty. {expected}")
    for key in _ANSWERS:
        if key in record or key == "answer":
            _check_answers(record.get(key), key, where, expected)
    labels = record.get("labels", {})
    return Prompt(
        **{key: record[key] for key in _REQUIRED},
        wrong=record.get("wrong", ()),
        group=record.get("group", "all"),
        spans=_spans(labels, record["clean"], where),
        corrupt_spans=_spans(record.get("corrupt_labels", labels), record["corrupt"], where),
    )


def _check_answers(value: object, key: str, where: str, expected: str) -> None:
    """Refuses what is neither a text, nor several, nor texts with weights.

    Raises:
        PromptError: Says where the line is and what is wrong with it.
    """
    texts: list[object] = list(value) if isinstance(value, list | dict) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise PromptError(
            f"{where} has {value!r} as {key!r}, which must be a text that is not empty, a list of such texts, or an object from such texts "
            f"to weights. {expected}"
        )
    weights = list(value.values()) if isinstance(value, dict) else []
    if not all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights):
        raise PromptError(f"{where} has {value!r} as {key!r}, whose weights must be numbers above 0. {expected}")
    try:
        weighted(value)  # type: ignore[arg-type]
    except PromptError as problem:
        raise PromptError(f"{where}, {key!r}: {problem}") from None


def _spans(labels: object, text: str, where: str) -> dict[str, tuple[int, int]]:
    form = f'{where} has labels {labels!r}. Expected places within the {len(text)} characters of the text, like {{"S1": [4, 7]}}.'
    if not isinstance(labels, dict):
        raise PromptError(form)
    for place in labels.values():
        whole = isinstance(place, list) and len(place) == 2 and all(type(end) is int for end in place)
        if not whole or not 0 <= place[0] < place[1] <= len(text):
            raise PromptError(form)
    return {label: (start, end) for label, (start, end) in labels.items()}
