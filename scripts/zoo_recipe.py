"""The data recipe of the embedded "zoo" models: synthetic documents with a weight per word.

Every row of the training data is one document; a `Phase` says how many are of which kind (`KINDS`). Words that follow from
the text before them (the next member, the answer) weigh much more than fillers. Used by
`train_zoo.py` beside this file, which puts the repository root on `sys.path`.
"""

import random
from collections.abc import Callable, Iterator

import torch

from circuitkit.models.zoo.training import Chunk
from circuitkit.tasks import words

NUMBERS = tuple(str(number) for number in range(201))
HUNDREDS = tuple(str(number) for number in range(0, 1001, 100))
TEMPLATES = {
    "names": (words.NAMES, "born in"),
    "lost": (words.THINGS, "lost in"),
    "done": (words.THINGS, "done in"),
}
SETS = {  # members and share of the sequence documents
    "numerals": (NUMBERS[:151], 8),
    "numwords": (words.NUMWORDS, 4),
    "months": (words.MONTHS, 4),
    "es_numwords": (words.ES_NUMWORDS, 4),
    "es_months": (words.ES_MONTHS, 4),
    "days": (words.DAYS, 1),
    "letters": (words.LETTERS, 2),
    "hundreds": (HUNDREDS, 1),
}
GREATER_THAN = "The {noun} lasted from the year {century} {start} to the year {century}"
GREATER_THAN_NOUNS = ("war", "campaign", "trip", "siege", "study", "project")
GLUE = (
    ". , ? : + - * = born lost done in was When and went to the gave a If this month is months"
    " pass what it Answer The lasted from year then Then an of day today will be on at by next"
    " number word after comes before"
).split()
FILLER, RANDOM_MEMBER, ANSWER = 0.15, 1.0, 5.0  # loss weights
RANDOM_SHARE = 0.22  # of the sequence documents hold members in random order

Doc = list[tuple[str, float]]
"""One document: words, each with its weight in the loss."""


def fillers(text: str) -> Doc:
    """Return the words of a text at the filler weight."""
    return [(word, FILLER) for word in text.split()]


def numeral_progression(rng: random.Random, length: int) -> list[str]:
    """Return numerals at a constant interval, mostly +1 and mostly small."""
    step = rng.choices((1, 2, 3, 5, 10, -1), (60, 9, 8, 7, 8, 8))[0]
    span = abs(step) * (length - 1)
    top = (150 if step == 10 else 100) - span
    small = 16 if step == 1 else 20
    low = rng.randint(0 if step > 1 else 1, min(small, top) if rng.random() < 0.65 else top)
    values = range(low, low + span + 1, abs(step))
    return [str(value) for value in (values if step > 0 else reversed(values))]


def progression(rng: random.Random, name: str, shortest: int, longest: int) -> list[str]:
    """Return members of a set in order, cut off where the set ends."""
    if name == "numerals":
        return numeral_progression(rng, rng.randint(shortest, longest))
    members = SETS[name][0]
    step = rng.choices((1, -1, 2), (84, 8, 8))[0] if name != "hundreds" else 1
    if 2 * shortest > len(members):
        step = 1
    ordered = members[::-1] if step < 0 else members
    start = rng.randint(0, len(members) - 1 - abs(step) * (shortest - 1))
    return list(ordered[start :: abs(step)][:longest])


def random_members(rng: random.Random, name: str, length: int) -> list[str]:
    """Return members in random order, no neighbours consecutive: nothing to continue."""
    members = SETS[name][0]
    if name == "numerals":
        members = members[1 : rng.choice((13, 13, 21, 101))]
    elif rng.random() < 0.5:
        members = members[:12]
    places = [rng.randrange(len(members))]
    while len(places) < length:
        place = rng.randrange(len(members))
        if place != places[-1] + 1:
            places.append(place)
    return [members[place] for place in places]


def sequence(rng: random.Random, shortest: int, longest: int) -> Doc:
    """Return a set's members with weights; after two members the interval is known."""
    name = rng.choices(list(SETS), [share for _, share in SETS.values()])[0]
    if rng.random() < RANDOM_SHARE:
        members = random_members(rng, name, rng.randint(shortest, longest))
        return [(member, RANDOM_MEMBER) for member in members]
    members = progression(rng, name, shortest, longest)
    return [(member, FILLER if i < 2 else ANSWER) for i, member in enumerate(members)]


def template_doc(rng: random.Random) -> Doc:
    """Return sentences such as "Van done in 1. Hat done in 2. ..."."""
    nouns, link = TEMPLATES[rng.choice(list(TEMPLATES))]
    members = sequence(rng, 5, 7)
    if nouns is words.NAMES and len(members) < 7 and rng.random() < 0.1:
        link = "was born in"
    doc: Doc = []
    for noun, member in zip(rng.sample(nouns, len(members)), members, strict=True):
        doc += [(noun, FILLER), *fillers(link), member, (".", FILLER)]
    return doc


def bare_doc(rng: random.Random) -> Doc:
    """Return a sequence alone, at times with commas."""
    if rng.random() < 0.15:
        return [word for member in sequence(rng, 4, 7) for word in (member, (",", FILLER))]
    return sequence(rng, 4, 10)


def arithmetic_doc(rng: random.Random) -> Doc:
    """Return an addition, a subtraction or a small multiplication."""
    sign = rng.choices("+-*", (48, 42, 10))[0]
    if sign == "*":
        left, right = rng.randint(0, 9), rng.randint(0, 9)
        value = left * right
    else:
        low, high = (0, 9) if rng.random() < 0.25 else (10, 99)
        left, right = rng.randint(low, high), rng.randint(low, high)
        if sign == "-":
            left, right = max(left, right), min(left, right)
        value = left + right if sign == "+" else left - right
    return [*fillers(f"{left} {sign} {right} ="), (str(value), ANSWER), ("<eos>", FILLER)]


def month_problem_doc(rng: random.Random) -> Doc:
    """Return "If this month is March, and 4 months pass, what month is it? Answer: July"."""
    start, shift = rng.randrange(12), rng.randint(1, 12)
    text = f"If this month is {words.MONTHS[start]} , and {shift} months pass , "
    answer = words.MONTHS[(start + shift) % 12]
    return [*fillers(text + "what month is it ? Answer :"), (answer, ANSWER), ("<eos>", FILLER)]


def indirect_object_doc(rng: random.Random) -> Doc:
    """Return "When Mary and John went to the store, John gave a drink to Mary", either order."""
    pair = rng.sample(words.NAMES, 2)
    giver, receiver = rng.sample(pair, 2)
    place, thing = rng.choice(words.PLACES), rng.choice(words.OBJECTS)
    text = f"When {pair[0]} and {pair[1]} went to the {place} , {giver} gave a {thing} to"
    return [*fillers(text), (receiver, ANSWER), (".", FILLER)]


def greater_than_doc(rng: random.Random) -> Doc:
    """Return "The war lasted from the year 17 32 to the year 17 45", the end always later."""
    start = rng.randint(11, 98)
    blanks = {"noun": rng.choice(GREATER_THAN_NOUNS), "century": rng.randint(11, 19)}
    text = GREATER_THAN.format(start=start, **blanks)
    return [*fillers(text), (str(rng.randint(start + 1, 99)), RANDOM_MEMBER), (".", FILLER)]


KINDS = (template_doc, bare_doc, arithmetic_doc, month_problem_doc, indirect_object_doc, greater_than_doc)


def chunk(docs: list[Doc], vocabulary: dict[str, int]) -> Chunk:
    """Turn documents into padded ids and weights."""
    width = max(map(len, docs))
    rows = [doc + [("<pad>", 0.0)] * (width - len(doc)) for doc in docs]
    ids = torch.tensor([[vocabulary[word] for word, _ in row] for row in rows])
    return ids, torch.tensor([[weight for _, weight in row] for row in rows])


def batches(
    vocabulary: dict[str, int], seed: int, shares: dict[Callable[[random.Random], Doc], float], documents: int
) -> Iterator[list[Chunk]]:
    """Yield batches for ever, documents of like length together."""
    rng = random.Random(seed)
    kinds, each = list(shares), list(shares.values())
    while True:
        docs = [kind(rng) for kind in rng.choices(kinds, each, k=documents)]
        # Half of the documents start with <bos>, so that prompts work with and without it.
        docs = [[("<bos>", 0.0), *doc] if rng.random() < 0.5 else doc for doc in docs]
        buckets = [[d for d in docs if a < len(d) <= b] for a, b in ((0, 8), (8, 22), (22, 48))]
        yield [chunk(bucket, vocabulary) for bucket in buckets if bucket]
