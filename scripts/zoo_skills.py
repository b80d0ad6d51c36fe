"""What the embedded "zoo" models can do: test prompts of every skill, and the measurement.

Used by `train_zoo.py` beside this file, which puts the repository root on `sys.path`. Prompts are
fresh draws of the training distribution; short ones (bare sequences, equations, month problems)
also occur in the training data, so they measure what was learnt, not generalisation.
"""

import math
import random

import torch
import zoo_recipe as recipe
from torch import Tensor
from transformers import PreTrainedModel

CORE = ("numerals", "numwords", "months", "es_numwords", "es_months")

Case = tuple[list[str], str]
"""The words of a prompt, and the right next word."""


# --- Test prompts -----------------------------------------------------------------------------


def case(doc: recipe.Doc) -> Case:
    """Split a document before its last weighty word."""
    place = max(i for i, (_, weight) in enumerate(doc) if weight >= recipe.RANDOM_MEMBER)
    return [word for word, _ in doc[:place]], doc[place][0]


def prompt(rng: random.Random, template: str, shown: list[str]) -> list[str]:
    """Return the words of a prompt that shows some members, in a template or "bare"."""
    if template == "bare":
        return shown
    nouns, link = recipe.TEMPLATES[template]
    *heads, last = rng.sample(nouns, len(shown) + 1)
    text = " ".join(f"{noun} {link} {member} ." for noun, member in zip(heads, shown, strict=True))
    return f"{text} {last} {link}".split()


def core_members(name: str) -> list[str]:
    """Return the first twelve members of a core set."""
    return list(recipe.SETS[name][0][1:13] if name == "numerals" else recipe.SETS[name][0][:12])


def core_cases(name: str, template: str, draws: int, shown: int = 4) -> list[Case]:
    """Return prompts of a core set from every start, some filler draws each."""
    rng, members = random.Random(1234), core_members(name)
    starts = [start for start in range(12 - shown) for _ in range(draws)]
    return [(prompt(rng, template, members[start : start + shown]), members[start + shown]) for start in starts]


def corrupted_prompts(name: str, template: str, count: int) -> list[list[str]]:
    """Return prompts with four random members, the last pair not consecutive."""
    rng, members = random.Random(4321), core_members(name)
    prompts = []
    for _ in range(count):
        places = [rng.randrange(12) for _ in range(3)]
        places.append(rng.choice([place for place in range(12) if place != places[-1] + 1]))
        prompts.append(prompt(rng, template, [members[place] for place in places]))
    return prompts


def arithmetic_cases(rng: random.Random, sign: str, digits: int, count: int) -> list[Case]:
    """Return equations of one sign, both operands with so many digits."""
    cases: list[Case] = []
    while len(cases) < count:
        words, answer = case(recipe.arithmetic_doc(rng))
        if words[1] == sign and len(words[0]) == len(words[2]) == digits:
            cases.append((words, answer))
    return cases


def interval_cases(rng: random.Random, template: str) -> dict[str, list[Case]]:
    """Return numerals at every trained interval, three members shown."""
    starts = {1: range(1, 98), 2: range(95), 3: range(92), 5: range(86), 10: range(0, 121, 10)}
    starts |= {100: range(0, 701, 100), -1: range(4, 101)}
    return {
        f"numerals {step:+d}, 3 members, {template}": [
            (
                prompt(rng, template, [str(first + i * step) for i in range(3)]),
                str(first + 3 * step),
            )
            for first in firsts
        ]
        for step, firsts in starts.items()
    }


def other_cases(count: int = 256) -> dict[str, list[Case]]:
    """Return test cases of every skill beside the core ones."""
    rng = random.Random(4321)
    cases = {
        f"{name}, {digits}-digit": arithmetic_cases(rng, sign, digits, count)
        for name, sign in (("addition", "+"), ("subtraction", "-"))
        for digits in (1, 2)
    }
    cases["multiplication, 1-digit"] = arithmetic_cases(rng, "*", 1, count)
    cases["month word problem"] = [case(recipe.month_problem_doc(rng)) for _ in range(count)]
    cases["indirect object"] = [case(recipe.indirect_object_doc(rng)) for _ in range(count)]
    for template in ("bare", "done"):
        cases |= interval_cases(rng, template)
        for name in ("days", "letters", "numwords", "es_numwords", "months", "es_months"):
            members = list(recipe.SETS[name][0])
            cases[f"{name}, 3 members, {template}"] = [
                (prompt(rng, template, members[start : start + 3]), members[start + 3]) for start in range(len(members) - 3)
            ]
    for shown in (3, 5, 6):
        cases[f"core sets, {shown} members, done"] = [item for name in CORE for item in core_cases(name, "done", 4, shown)]
    return cases


# --- Measurement ------------------------------------------------------------------------------


@torch.no_grad()
def final_logits(model: PreTrainedModel, vocabulary: dict[str, int], prompts: list[list[str]], bos: bool) -> Tensor:
    """Return the logits after the last word of each prompt."""
    docs = [[(word, 0.0) for word in ["<bos>"] * bos + words] for words in prompts]
    logits = model(input_ids=recipe.chunk(docs, vocabulary)[0]).logits
    return logits[torch.arange(len(docs)), torch.tensor([len(doc) - 1 for doc in docs])]


def share(hits: Tensor) -> float:
    """Return the share of true entries."""
    return round(hits.float().mean().item(), 4)


def accuracy(model: PreTrainedModel, vocabulary: dict[str, int], cases: list[Case], bos: bool) -> float:
    """Return the share of cases whose top-1 next token is right."""
    logits = final_logits(model, vocabulary, [words for words, _ in cases], bos)
    return share(logits.argmax(-1) == torch.tensor([vocabulary[answer] for _, answer in cases]))


def core_skill(model: PreTrainedModel, vocabulary: dict[str, int], name: str, template: str, bos: bool) -> dict[str, float]:
    """Measure one core set in one template: eight starts, 32 filler draws each."""
    cases = core_cases(name, template, draws=32)
    members = core_members(name)
    right = torch.tensor([vocabulary[answer] for _, answer in cases])
    last = torch.tensor([vocabulary[members[members.index(answer) - 1]] for _, answer in cases])
    rows = torch.arange(len(cases))
    clean = final_logits(model, vocabulary, [words for words, _ in cases], bos)
    corrupted = final_logits(model, vocabulary, corrupted_prompts(name, template, len(cases)), bos)
    gap = clean[rows, right] - clean[rows, last]
    corrupted_gap = corrupted[rows, right] - corrupted[rows, last]
    return {
        "top1": share(clean.argmax(-1) == right),
        "twice_last": share(gap > math.log(2)),
        "logit_difference": round(gap.mean().item(), 2),
        "corrupted_logit_difference": round(corrupted_gap.mean().item(), 2),
    }


def later_year(model: PreTrainedModel, vocabulary: dict[str, int], bos: bool) -> float:
    """Return the share of greater-than prompts whose top-1 end year is later than the start."""
    rng = random.Random(4321)
    prompts = [case(recipe.greater_than_doc(rng))[0] for _ in range(256)]
    logits = final_logits(model, vocabulary, prompts, bos)
    later = torch.zeros_like(logits, dtype=torch.bool)
    for row, words in enumerate(prompts):
        years = range(int(words[words.index("year") + 2]) + 1, 100)
        later[row, [vocabulary[str(year)] for year in years]] = True
    return share(later[torch.arange(len(prompts)), logits.argmax(-1)])


def evaluate(model: PreTrainedModel, vocabulary: dict[str, int]) -> dict[str, dict]:
    """Measure every skill without and with <bos>.

    Args:
        model: A zoo model.
        vocabulary: Token to id.

    Returns:
        `core`: per "set/template" and <bos> use the four numbers of `core_skill`; `other`: per
        skill the top-1 accuracy without and with <bos> and the number of cases.
    """
    model.eval()
    uses = {"without_bos": False, "with_bos": True}
    core = {
        f"{name}/{template}": {use: core_skill(model, vocabulary, name, template, bos) for use, bos in uses.items()}
        for name in CORE
        for template in (*recipe.TEMPLATES, "bare")
    }
    other = {
        name: {use: accuracy(model, vocabulary, cases, bos) for use, bos in uses.items()} | {"cases": len(cases)}
        for name, cases in other_cases().items()
    }
    other["greater-than year"] = {use: later_year(model, vocabulary, bos) for use, bos in uses.items()} | {"cases": 256}
    return {"core": core, "other": other}
