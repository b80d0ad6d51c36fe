"""From prompts as text to prompts as token ids, with every check that a wrong number could slip through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.core.errors import PromptError
from circuitkit.core.prompts import Answers, Prompt, PromptSet, weighted
from circuitkit.core.token_sets import TokenSets
from circuitkit.tasks.base import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the decision whether texts begin with its beginning-of-sequence token.

    Attributes:
        tokenizer: Of the model that the prompts are for.
        bos: None as the tokenizer does on its own, True to begin with its BOS token, False for no special token at all.
    """

    tokenizer: Tokenizer
    bos: bool | None = None

    def __post_init__(self) -> None:
        if self.bos and self.tokenizer.bos_token_id is None:
            raise PromptError(
                "task.bos=true needs a tokenizer with a BOS token, and this one has none. Use task.bos=null (as the tokenizer does on its "
                "own) or task.bos=false."
            )
        if self.bos is None:
            (own,), (plain,) = (self.tokenizer(["a"], add_special_tokens=special)["input_ids"] for special in (True, False))
            if own[-1:] != plain[-1:]:
                raise PromptError(
                    f"A prompt must end with its own last token, but this tokenizer adds {self.tokenizer.decode(own[-1:])!r} behind every "
                    "text. Use task.bos=true (begin with the BOS token, add nothing else) or task.bos=false (no special token)."
                )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if not texts:  # A tokenizer fails on an empty list.
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=self.bos is None)["input_ids"]
        begin = [self.tokenizer.bos_token_id] if self.bos and self.tokenizer.bos_token_id is not None else []
        return [[*begin, *row] for row in rows]

    def added(self, text: str, pieces: Sequence[str]) -> list[list[int]]:
        """The tokens that each piece adds when it is appended to the text."""
        (base,) = self.ids([text])
        return [row[len(base) :] for row in self.ids([text + piece for piece in pieces])]

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether none of these tokens, of a text without special tokens, stands for a word that the tokenizer does not know."""
        return self.tokenizer.unk_token_id not in tokens

    def show(self, tokens: Sequence[int]) -> str:
        """Tokens as text, for a message."""
        return "[" + ", ".join(repr(self.tokenizer.decode([token])) for token in tokens) + "]"


def encode(prompts: Sequence[Prompt], encoder: Encoder, *, equal: bool = True, several: bool = False) -> PromptSet:
    """Tokenizes prompts and finds their answer tokens and labelled positions. Prompts of different lengths are padded on the left.

    An answer is the token that follows the prompt when both are tokenized together. Where the tokenizer makes a token
    of the space before every answer, that space moves into the prompt, so that the last position is the one that predicts the answer.

    Args:
        prompts: The prompts.
        encoder: The tokenizer.
        equal: Refuse prompts of different lengths; False: only twins of different lengths.
        several: Whether answers may have several tokens. If any has, all are scored by teacher forcing: behind each prompt stands its
            answer but for the last token, behind the corrupt twin too.

    Raises:
        PromptError: No prompts, prompts or twins of unequal length, an answer that is not one token, or a label that lies elsewhere in a
            twin.
    """
    if not prompts:
        raise PromptError("No prompt is left. Draw more (task.n), relax the filter (task.filter=false) or take another task.")
    continued: list[list[int]] = []
    try:
        prompts, clean, answers, wrongs = _with_answers(prompts, encoder)
    except PromptError:
        continued = _continuations(prompts, encoder) if several else []
        if not continued:
            raise
        clean = encoder.ids([prompt.clean for prompt in prompts])
        answers = wrongs = TokenSets.none(len(prompts))
    corrupt = encoder.ids([prompt.corrupt for prompt in prompts])
    if continued:
        clean, corrupt = ([ids + tokens[:-1] for ids, tokens in zip(rows, continued, strict=True)] for rows in (clean, corrupt))
    _check_lengths(prompts, clean, corrupt, equal)
    longest = max(map(len, clean))
    pads = [longest - len(ids) for ids in clean]
    names = tuple(dict.fromkeys(prompt.group for prompt in prompts))
    groups = [names.index(prompt.group) for prompt in prompts]
    return PromptSet(
        clean=_right(clean, longest, 0),  # what stands in the padding is of no consequence; 0 is a token of every vocabulary
        corrupt=_right(corrupt, longest, 0),
        answers=answers,
        wrongs=wrongs,
        groups=torch.tensor(groups),
        group_names=names,
        spans={**_positions(prompts, clean, corrupt, encoder), "last": torch.tensor([len(ids) - 1 for ids in clean])},
        items=tuple(prompts),
        pads=torch.tensor(pads),
        targets=_right(continued, max(map(len, continued)), -1) if continued else None,
    )


def _right(rows: Sequence[list[int]], longest: int, filler: int) -> Int[Tensor, "prompt column"]:
    """Rows of one length, aligned at their ends."""
    return torch.tensor([[filler] * (longest - len(ids)) + ids for ids in rows])


def _continuations(prompts: Sequence[Prompt], encoder: Encoder) -> list[list[int]]:
    """The tokens that the answer of each prompt adds to it; empty if any of them leaves the rules for answers of several tokens.

    Raises:
        PromptError: There is an answer of several tokens beside others of its prompt, or it has a weight.
    """
    clean = encoder.ids([prompt.clean for prompt in prompts])
    found = []
    for row, (prompt, ids) in enumerate(zip(prompts, clean, strict=True)):
        joint = encoder.ids([prompt.clean + text for text in prompt.answers])
        if any(both[: len(ids)] != ids or len(both) == len(ids) or not encoder.knows(both[len(ids) :]) for both in joint):
            return []  # what is wrong is said where answers of one token are looked up
        added = [both[len(ids) :] for both in joint]
        if len(added) > 1 and any(len(tokens) > 1 for tokens in added):
            long = next(text for text, tokens in zip(prompt.answers, added, strict=True) if len(tokens) > 1)
            raise PromptError(
                f"An answer of several tokens must be the only one of its prompt, but {long!r} behind {prompt.clean!r} has "
                f"{max(map(len, added))} tokens and stands beside {len(added) - 1} more. Give one answer, or answers of one token.",
                row,
            )
        found.append(added)
    if not any(len(tokens) > 1 for added in found for tokens in added):
        return []
    for row, (prompt, added) in enumerate(zip(prompts, found, strict=True)):
        if len(added) != 1 or next(iter(prompt.answers.values())) != 1:
            raise PromptError(
                "Where an answer has several tokens, every prompt must have one answer, of weight 1, because all are scored by "
                f"teacher forcing; {prompt.clean!r} has {prompt.answers}. Give one answer, or answers of one token.",
                row,
            )
    return [added[0] for added in found]


def _with_answers(prompts: Sequence[Prompt], encoder: Encoder) -> tuple[list[Prompt], list[list[int]], TokenSets, TokenSets]:
    """The prompts, their tokens, and those of the answers and wrong answers, after the shortest move that makes each one token."""
    sets = [(list(prompt.answers), list(prompt.wrongs)) for prompt in prompts]
    shared = commonprefix([text for both in sets for texts in both for text in texts])
    problems = []
    for cut in range(len(shared) + 1):
        moved = [_move_to_prompt(prompt, shared[:cut]) for prompt in prompts]
        clean = encoder.ids([prompt.clean for prompt in moved])
        try:
            answers = _next_tokens(moved, clean, [prompt.answers for prompt in moved], encoder)
            wrongs = _next_tokens(moved, clean, [prompt.wrongs for prompt in moved], encoder)
        except PromptError as problem:
            problems.append(problem)
            continue
        for row, (prompt, right, wrong) in enumerate(zip(moved, answers, wrongs, strict=True)):
            both = [token for token in right if token in wrong]
            if both:
                raise PromptError(
                    "Answers and wrong answers must be different tokens, but in both sets is "
                    f"{encoder.show(both)} behind {prompt.clean!r}. Give another wrong answer.",
                    row,
                )
        return moved, clean, TokenSets.of(answers), TokenSets.of(wrongs)
    raise problems[0]  # What is wrong with the prompts as they were given.


def _move_to_prompt(prompt: Prompt, begin: str) -> Prompt:
    """The same text with what all answers begin with in the prompts."""

    def rest(answers: Answers) -> Answers:
        if isinstance(answers, str):
            return answers[len(begin) :]
        return {text[len(begin) :]: weight for text, weight in weighted(answers).items()}

    return replace(prompt, clean=prompt.clean + begin, corrupt=prompt.corrupt + begin, answer=rest(prompt.answer), wrong=rest(prompt.wrong))


def _next_tokens(
    prompts: Sequence[Prompt], clean: list[list[int]], sets: Sequence[Mapping[str, float]], encoder: Encoder
) -> list[dict[int, float]]:
    """For each prompt the one token that each of some texts adds to it, with its weight.

    Raises:
        PromptError: A text adds none or several, changes the prompt's own tokens, or is unknown to the tokenizer.
    """
    found: list[dict[int, float]] = [{} for _ in prompts]
    asked = [(row, text, weight) for row, texts in enumerate(sets) for text, weight in texts.items()]
    joint = encoder.ids([prompts[row].clean + text for row, text, _ in asked])
    for (row, text, weight), both in zip(asked, joint, strict=True):
        ids, prompt = clean[row], prompts[row]
        added = both[len(ids) :]
        if both[: len(ids)] != ids or len(added) != 1:
            raise PromptError(
                f"An answer must add exactly one token to its prompt and leave the prompt's own tokens as they are, but {text!r} behind "
                f"{prompt.clean!r} turns the end {encoder.show(ids[-2:])} into {encoder.show(both[len(ids) - 2 :])}. "
                "Give another answer (another task, or a shorter range with task.top) or use another model.",
                row,
            )
        if not encoder.knows(added):
            raise PromptError(
                f"An answer must be in the tokenizer's vocabulary, but {text!r} is unknown to it. Give another answer (another task, or a "
                "shorter range with task.top) or use another model.",
                row,
            )
        if added[0] in found[row]:
            raise PromptError(
                f"Answers must be different tokens, but {text!r} behind {prompt.clean!r} is the same token {encoder.show(added)} as "
                "another one. Name it once.",
                row,
            )
        found[row][added[0]] = weight
    return found


def _check_lengths(prompts: Sequence[Prompt], clean: list[list[int]], corrupt: list[list[int]], equal: bool) -> None:
    for row, (prompt, *pair) in enumerate(zip(prompts, clean, corrupt, strict=True)):
        if not equal and len(pair[0]) != len(pair[1]):
            raise PromptError(
                f"A corrupt prompt must have as many tokens as its clean twin, but {prompt.clean!r} has {len(pair[0])} and "
                f"{prompt.corrupt!r} has {len(pair[1])}. Use words with equal numbers of tokens in both.",
                row,
            )
    if not equal:
        return
    usual = Counter(len(ids) for ids in clean).most_common(1)[0][0]
    for row, (prompt, *pair) in enumerate(zip(prompts, clean, corrupt, strict=True)):
        for kind, text, ids in zip(("clean", "corrupt"), (prompt.clean, prompt.corrupt), pair, strict=True):
            if len(ids) != usual:
                raise PromptError(
                    f"All prompts must have the same number of tokens, which is {usual} here, but the {kind} prompt {text!r} has "
                    f"{len(ids)}. Use members and fillers with equal numbers of tokens: another task or model, a shorter range (task.top), "
                    "fewer templates (task.templates) or another corruption (task.corruption).",
                    row,
                )


def _positions(
    prompts: Sequence[Prompt], clean: list[list[int]], corrupt: list[list[int]], encoder: Encoder
) -> dict[str, Int[Tensor, " prompt"]]:
    """For each label, which token of each prompt is its last one."""
    positions = {}
    for label in dict.fromkeys(label for prompt in prompts for label in (*prompt.spans, *prompt.corrupt_spans)):
        for row, prompt in enumerate(prompts):
            if label not in prompt.spans or label not in prompt.corrupt_spans:
                raise PromptError(
                    f"A label must be in every prompt, clean and corrupt, but {label!r} is not. Add it everywhere or drop it.", row
                )
        places = _last_places(label, [prompt.clean[: prompt.spans[label][1]] for prompt in prompts], clean, encoder)
        twins = _last_places(label, [prompt.corrupt[: prompt.corrupt_spans[label][1]] for prompt in prompts], corrupt, encoder)
        for row, (place, twin) in enumerate(zip(places, twins, strict=True)):
            if place != twin:
                raise PromptError(
                    f"A label must lie at the same position in a corrupt prompt as in its clean twin, but {label!r} lies at {place} in "
                    f"{prompts[row].clean!r} and at {twin} in {prompts[row].corrupt!r}. Use words with equal numbers of tokens before it.",
                    row,
                )
        positions[label] = torch.tensor(places)
    return positions


def _last_places(label: str, texts: Sequence[str], rows: Sequence[list[int]], encoder: Encoder) -> list[int]:
    """Where in each row of tokens the beginning of its prompt, up to the end of a label, ends."""
    places = []
    for which, (text, ids, row) in enumerate(zip(texts, encoder.ids(texts), rows, strict=True)):
        # The last token may reach past the label; the tokens before it must be the same ones.
        if not ids or ids[:-1] != row[: len(ids) - 1]:
            raise PromptError(f"A label must end where a token ends, but {text!r}, up to {label!r}, has other tokens alone than within its "
                              "prompt. Put the label on whole words.", which)  # fmt: skip
        places.append(len(ids) - 1)
    return places
