"""Question sets: what they ask, how that is tokenized, when an answer is right, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import re
from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from test_tasks import GPT2, LLAMA
from transformers import AutoTokenizer

import circuitkit
from circuitkit import tasks
from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.models.zoo import zoo_path
from circuitkit.tasks import Question, Questions, words

CONF = Path(circuitkit.__file__).parents[1] / "conf" / "question"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
ZOO = AutoTokenizer.from_pretrained(zoo_path("tiny_gpt2"))


def made(name, **settings):
    return instantiate(FILES[name] | settings)


def pairs(name, **settings):
    return [(each.prompt, each.answer) for each in made(name, **settings).questions()]


# --- What they ask


def test_the_prompts_of_the_paper():
    first = {"plus_1": "1 2 3 -> 4", "plus_2": "2 4 6 -> 8", "plus_3": "3 6 9 -> 12", "plus_10": "0 10 20 -> 30"}
    first["plus_100"] = "0 100 200 -> 300"
    last = {"plus_1": "50 51 52 -> 53", "plus_2": "100 102 104 -> 106", "plus_10": "490 500 510 -> 520"}
    for name, line in first.items():
        asked = pairs(f"numerals_{name}")
        assert len(asked) == 50
        assert " ->".join(asked[0]) == line
        assert " ->".join(asked[-1]) == last.get(name, " ->".join(asked[-1]))
    assert pairs("next_es_months")[0] == ("enero febrero marzo", " abril")
    assert pairs("next_es_numwords")[5] == ("seis siete ocho", " nueve")
    assert len(pairs("next_days")) == 4 and pairs("next_days")[-1] == ("Thursday Friday Saturday", " Sunday")


def test_decreasing_numbers_end_at_the_start():
    asked = pairs("numerals_minus_1")
    assert asked[0] == ("4 3 2", " 1") and asked[-1] == ("53 52 51", " 50")


@pytest.mark.parametrize("name", [name for name in FILES if "digit" in name])
def test_arithmetic_is_right_and_asked_once(name):
    asked = pairs(name)
    low, high = (0, 9) if "1_digit" in name else (10, 99)
    assert len({prompt for prompt, _ in asked}) == 50
    for prompt, answer in asked:
        left, sign, right, equals = prompt.split(" ")
        assert equals == "=" and low <= int(right) <= high and low <= int(left) <= high
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]
        assert answer == f" {value}" and value >= 0
    assert made(name, n=10**6).questions()[:50] != made(name, n=10**6, seed=1).questions()[:50]
    assert len(made("subtraction_1_digit", n=1000).questions()) == 55, "all pairs with a >= b"


def test_dates_are_those_of_2024():
    problems = pairs("date_problem")
    assert len({prompt for prompt, _ in problems}) == 100
    for prompt, answer in problems:
        month, day, days = re.fullmatch(r"If today is (\w+) (\d+)th, then in (\d+) days it will be", prompt).groups()
        then = date(2024, words.MONTHS.index(month) + 1, int(day)) + timedelta(int(days))
        assert answer == f" {words.MONTHS[then.month - 1]} {then.day}th"
    assert any("February 2" in prompt and answer.startswith(" March") for prompt, answer in pairs("date_problem", n=2000))


def test_month_problems():
    for prompt, answer in pairs("month_problem"):
        month, months = re.fullmatch(r"If this month is (\w+), and (\d+) months pass, what month is it\? Answer:", prompt).groups()
        assert answer == f" {words.MONTHS[(words.MONTHS.index(month) + int(months)) % 12]}"


@pytest.mark.parametrize("name", [name for name in FILES if name != "month_list"])
def test_corrupt_prompts_are_of_the_same_kind(name):
    """Other numbers or words, or another order, in the same form; and never a sequence that ends in step."""
    form = re.compile(rf"\d+|{'|'.join(words.MONTHS)}") if "problem" in name else re.compile(r"\d+")
    for each in made(name).questions():
        assert each.corrupt != each.prompt
        if name.startswith(("numerals", "next")):
            assert sorted(each.corrupt.split()) == sorted(each.prompt.split())
            shown = each.prompt.split()
            steps = set(zip(shown, shown[1:], strict=False))
            assert tuple(each.corrupt.split()[-2:]) not in steps
        else:
            assert form.sub("*", each.corrupt) == form.sub("*", each.prompt)
            assert re.sub(r"\d", "0", form.sub(digits_only, each.corrupt)) == re.sub(r"\d", "0", form.sub(digits_only, each.prompt))


def digits_only(match):
    return match[0] if match[0].isdigit() else "*"


def test_the_seed_decides():
    assert made("addition_2_digit").questions() == made("addition_2_digit").questions()
    assert made("addition_2_digit").questions() != made("addition_2_digit", seed=1).questions()
    assert made("month_problem", n=20).questions() == made("month_problem").questions()[:20]


# --- Tokens


def test_the_space_belongs_to_prompt_or_answer_as_the_tokenizer_has_it():
    """GPT-2: "2 4 6" -> " 8". Llama: "2 4 6 " -> "8", as in the paper."""
    for tokenizer, prompt, answer in ((GPT2, "2 4 6", " 8"), (LLAMA, "2 4 6 ", "8"), (ZOO, "2 4 6", " 8")):
        encoded = made("numerals_plus_2", n=1).encoded(tokenizer)
        assert list(encoded.ids[0]) == tokenizer([prompt])["input_ids"][0]
        assert encoded.n_new_tokens == (1,) and not encoded.free
        assert (*encoded.ids[0], *tokenizer([answer], add_special_tokens=False)["input_ids"][0][-1:]) == tuple(
            tokenizer(["2 4 6 8"])["input_ids"][0]
        )
        assert len(encoded.corrupt_ids[0]) == len(encoded.ids[0])


def test_answers_may_have_several_tokens():
    encoded = made("numerals_plus_2", n=10).encoded(LLAMA)
    assert encoded.n_new_tokens == (1, *[2] * 9)
    assert sorted(row for batch in encoded.by_length() for row in batch) == list(range(10))
    assert all(len({len(encoded.ids[row]) for row in batch}) == 1 for batch in encoded.by_length())
    assert {ids[0] for ids in encoded.ids} == {LLAMA.bos_token_id}, "as the tokenizer does on its own"


@pytest.mark.parametrize("name", ["numerals_plus_1", "addition_2_digit", "next_es_months", "month_problem", "next_letters"])
def test_embedded_models_know_the_words(name):
    asked = made(name)
    encoded = asked.encoded(ZOO)
    assert len(encoded) == len(asked.questions())
    assert all(ZOO.unk_token_id not in ids for ids in (*encoded.ids, *encoded.corrupt_ids))
    assert [len(ids) for ids in encoded.ids] == [len(ids) for ids in encoded.corrupt_ids]
    assert encoded.free == (name == "month_problem") and set(encoded.n_new_tokens) == ({20} if encoded.free else {1})


def test_questions_with_unknown_words_are_left_out(caplog):
    caplog.set_level("INFO")
    assert len(made("numerals_plus_100").encoded(ZOO)) == 8  # 0 100 200 to 700 800 900 -> 1000
    assert "42 of 50 questions have words that the tokenizer does not know" in caplog.text
    with pytest.raises(PromptError, match="date_problem: each of the 100 questions has a word that the tokenizer does not know, as in 'If"):
        made("date_problem").encoded(ZOO)


def test_an_answer_that_changes_its_prompt_is_refused():
    class Glued(Questions):
        name = "glued"

        def questions(self):
            return [Question("born i", "n", "born i")]

    with pytest.raises(PromptError, match="'n' behind 'born i' changes the last one"):
        Glued().encoded(AsIs())


class AsIs:
    """A token a word."""

    bos_token_id = unk_token_id = None

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[sum(map(ord, word)) for word in each.split()] for each in text]}

    def decode(self, token_ids):
        return str(token_ids)


def test_take_keeps_the_columns_together():
    encoded = made("addition_1_digit").encoded(ZOO)
    some = encoded.take([3, 1])
    assert some.questions == (encoded.questions[3], encoded.questions[1])
    assert some.ids == (encoded.ids[3], encoded.ids[1]) and some.corrupt_ids == (encoded.corrupt_ids[3], encoded.corrupt_ids[1])
    assert len(some) == 2 and some.name == encoded.name


# --- Right or not


@pytest.mark.parametrize(
    ("name", "answer", "generated", "right"),
    [
        ("addition_1_digit", " 7", "7", True),
        ("addition_1_digit", " 7", " 7\n", True),
        ("addition_1_digit", " 7", "17", False),
        ("date_problem", " March 7th", " March 7th", True),
        ("month_problem", " July", "\n\nIt will be July.", True),
        ("month_problem", " July", "June", False),
        ("month_problem", " May", "Maybe in June", False),
        ("month_list", "", "1. " + "\n2. ".join(words.MONTHS) + "\nThere are twelve, January is the first.", True),
        ("month_list", "", ", ".join(words.MONTHS[:11]), False),
        ("month_list", "", "February, January, " + ", ".join(words.MONTHS[2:]), False),
    ],
)
def test_is_right(name, answer, generated, right):
    assert made(name).is_right(Question("", answer), generated) is right


# --- Settings


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_named_after_what_it_makes_and_says_all_fields(name):
    assert made(name).name == name
    assert FILES[name].keys() - {"_target_"} == {field.name for field in dataclasses.fields(made(name))}
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# @package question.{name}\n# ")


def test_every_question_set_has_a_file():
    kinds = {kind for name in tasks.__all__ if isinstance(kind := getattr(tasks, name), type) and issubclass(kind, Questions)}
    assert {type(made(name)) for name in FILES} == {kind for kind in kinds if not inspect.isabstract(kind)}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: tasks.Intervals(n=0), "numerals_plus_1: n, the number of questions, must be 1 or more; found 0"),
        (lambda: tasks.Intervals(step=0), "step must not be 0"),
        (lambda: tasks.Intervals(start=-1), "found step=1 and start=-1"),
        (lambda: tasks.Intervals(length=1), "must be 2 or more, because one member is no sequence; found 1"),
        (lambda: tasks.NextWord(vocabulary="month"), "no vocabulary named 'month'. Did you mean 'months'"),
        (lambda: tasks.NextWord(vocabulary="days", length=7), "less than 7, the number of its words; found 7"),
        (lambda: tasks.Addition(digits=3), r"digits must be 1 \(0 to 9\) or 2 \(10 to 99\); found 3"),
        (lambda: tasks.MonthProblem(n_new_tokens=0), "n_new_tokens, the bound of an answer, must be 1 or more, or null; found 0"),
    ],
)
def test_wrong_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()
