"""Indirect objects and greater-than: what the prompts say, on what tokenizers, and that an embedded model can do them."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import torch
from test_tasks import wrap
from tokenizers import Regex, pre_tokenizers

from circuitkit import load_model
from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.engine.filtering import Solves
from circuitkit.metrics import ProbDiff
from circuitkit.tasks import GreaterThan, IndirectObject, words
from circuitkit.testing import TaskConformance

GLUE = "When The and went to the a gave lasted from year".split()


@lru_cache
def zoo():
    return load_model("tiny_gpt2")


def splitting():
    """Like GPT-2's: a year is split behind its century, except 1776, and a space belongs to the word behind it."""
    kept = [*GLUE, *words.NAMES, *words.PLACES, *words.OBJECTS, "war", "trip", *map(str, range(10, 100)), ",", "1776"]
    split = pre_tokenizers.Split(Regex(r" ?1776| ?\d\d|,| ?[A-Za-z]+"), "isolated")
    return wrap([form for word in kept for form in (word, f" {word}")], split)


class TestIndirectObject(TaskConformance):
    def make(self):
        return IndirectObject()

    def tokenizer(self):
        return zoo().tokenizer


class TestGreaterThan(TaskConformance):
    def make(self):
        return GreaterThan()

    def tokenizer(self):
        return zoo().tokenizer


@pytest.mark.parametrize("tokenizer", [zoo().tokenizer, splitting()], ids=["embedded", "splitting"])
def test_indirect_objects(tokenizer):
    form = r"When (\w+) and (\w+) went to the (\w+), (\w+) gave a (\w+) to"
    prompts = IndirectObject(n=20).prompts(tokenizer)
    assert prompts.group_names == ("abba", "baba") and len(prompts) == 40
    for item in prompts.items:
        (first, second, place, giver, thing), twin = re.fullmatch(form, item.clean).groups(), re.fullmatch(form, item.corrupt).groups()
        assert giver == (second if item.group == "abba" else first) == item.wrong.strip()
        assert item.answer.strip() == (first if item.group == "abba" else second)
        assert (twin[2], twin[4]) == (place, thing)
        assert len({first, second, twin[0], twin[1], twin[3]}) == 5, "other names, each once"
        named = {label: item.clean[slice(*span)] for label, span in item.spans.items()}
        assert named == {"IO": item.answer.strip(), "S1": giver, "S2": giver}
    for label, offset in (("IO", {"abba": 1, "baba": 3}), ("S1", {"abba": 3, "baba": 1}), ("S2", {"abba": 9, "baba": 9})):
        assert [prompts.position(label, group) for group in (0, 1)] == [offset[name] for name in prompts.group_names]


@pytest.mark.parametrize("years", ["all", "pair"])
def test_greater_than(years):
    for tokenizer, gap in ((zoo().tokenizer, " "), (splitting(), "")):
        prompts = GreaterThan(n=50, years=years).prompts(tokenizer)
        form = rf"The (\w+) lasted from the year (\d\d){gap}(\d\d) to the year (\d\d)"
        for item in prompts.items:
            (noun, century, start, again), twin = re.fullmatch(form, item.clean).groups(), re.fullmatch(form, item.corrupt).groups()
            assert twin == (noun, century, twin[2], again) and century == again
            right, wrong = sorted(map(int, item.answers)), sorted(map(int, item.wrongs))
            if years == "pair":
                assert len(right) == len(wrong) == 1 and wrong[0] < int(start) < right[0] and int(twin[2]) <= wrong[0]
            else:
                assert wrong[-1] == int(start) < right[0] and right[-1] == 99 and int(twin[2]) in wrong
                assert {*item.answers.values(), *item.wrongs.values()} == {1.0}
            assert (century, start) != ("17", "76") or gap
            assert item.clean[slice(*item.spans["start"])] == start
        assert {prompts.position("start", 0)} == {7}


def test_both_choices_of_years_have_the_same_prompts():
    pair, every = (GreaterThan(n=20, years=years).prompts(zoo().tokenizer) for years in ("pair", "all"))
    assert torch.equal(pair.clean, every.clean) and torch.equal(pair.corrupt, every.corrupt)
    assert every.answers.have(pair.answers.tokens).all() and every.wrongs.have(pair.wrongs.tokens).all()


def test_an_embedded_model_can_do_them():
    model = zoo()
    prompts = IndirectObject(n=32).prompts(model.tokenizer)
    assert Solves(model)(prompts).float().mean() > 0.95
    prompts = GreaterThan(n=128, years="pair").prompts(model.tokenizer)
    means = []
    for ids in (prompts.clean, prompts.corrupt):
        logits = model.run(ids)[:, -1]
        rows = torch.arange(len(ids))
        means.append((logits[rows, prompts.answers.tokens] - logits[rows, prompts.wrongs.tokens]).mean().item())
    assert means[0] > 1 > abs(means[1]), "later years are preferred, unless all are later"


def test_greater_than_is_scored_as_published():
    """The probability of all later years minus that of all others, summed by hand over what the vocabulary says."""
    model = zoo()
    prompts = GreaterThan(n=16).prompts(model.tokenizer)
    logits = model.run(prompts.clean)[:, -1].float()
    found = ProbDiff().score(logits, prompts)
    words = [model.tokenizer.decode([token]).strip() for token in range(model.d_vocab)]
    for item, row, value in zip(prompts.items, logits.softmax(-1).tolist(), found.tolist(), strict=True):
        start = int(item.clean[slice(*item.spans["start"])])
        signs = [(1 if int(word) > start else -1) if re.fullmatch(r"\d\d", word) else 0 for word in words]
        assert value == pytest.approx(sum(sign * share for sign, share in zip(signs, row, strict=True)), abs=1e-5)
    assert found.mean() > 0.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IndirectObject(orders=["abab"]), r"no order of names \(task.orders\) named 'abab'.*Choices: abba, baba"),
        (lambda: IndirectObject(orders=[]), r"at least one order, each once, and task.n be 1 or more; found \(\)"),
        (lambda: IndirectObject(n=0), "task.n be 1 or more"),
        (lambda: GreaterThan(years="later"), r"no choice of years \(task.years\) named 'later'.*Choices: all, pair"),
        (lambda: GreaterThan(n=0), "must be 1 or more; found 0"),
    ],
)
def test_wrong_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize("task", [IndirectObject(), GreaterThan()])
def test_a_tokenizer_without_the_words_is_refused(task):
    bare = wrap(["When", "The"], pre_tokenizers.Whitespace())
    with pytest.raises(PromptError, match="must be one token each.* 0 .*Use another task or another model"):
        task.prompts(bare)
