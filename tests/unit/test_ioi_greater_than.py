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


def test_greater_than():
    for tokenizer, gap in ((zoo().tokenizer, " "), (splitting(), "")):
        prompts = GreaterThan(n=50).prompts(tokenizer)
        form = rf"The (\w+) lasted from the year (\d\d){gap}(\d\d) to the year (\d\d)"
        for item in prompts.items:
            (noun, century, start, again), twin = re.fullmatch(form, item.clean).groups(), re.fullmatch(form, item.corrupt).groups()
            assert twin == (noun, century, twin[2], again) and century == again
            assert int(item.wrong) < int(start) < int(item.answer) and int(twin[2]) <= int(item.wrong)
            assert (century, start) != ("17", "76") or gap
            assert item.clean[slice(*item.spans["start"])] == start
        assert {prompts.position("start", 0)} == {7}


def test_an_embedded_model_can_do_them():
    model = zoo()
    prompts = IndirectObject(n=32).prompts(model.tokenizer)
    assert Solves(model)(prompts).float().mean() > 0.95
    prompts = GreaterThan(n=128).prompts(model.tokenizer)
    means = []
    for ids in (prompts.clean, prompts.corrupt):
        logits = model.run(ids)[:, -1]
        rows = torch.arange(len(ids))
        means.append((logits[rows, prompts.answers] - logits[rows, prompts.wrongs]).mean().item())
    assert means[0] > 1 > abs(means[1]), "later years are preferred, unless all are later"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IndirectObject(orders=["abab"]), r"no order of names \(task.orders\) named 'abab'.*Choices: abba, baba"),
        (lambda: IndirectObject(orders=[]), r"at least one order, each once, and task.n be 1 or more; found \(\)"),
        (lambda: IndirectObject(n=0), "task.n be 1 or more"),
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
