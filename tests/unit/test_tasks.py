"""Tasks: what the prompts say, how they are tokenized, and what is refused with which sentence."""

import dataclasses
import json
import logging
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import circuitkit
from circuitkit import tasks
from circuitkit.core.errors import ConfigError, PromptError
from circuitkit.tasks import words
from circuitkit.tasks.corruptions import CORRUPTIONS, ends_in_step
from circuitkit.tasks.encoding import Encoder, encode
from circuitkit.tasks.fitting import usable_fillers
from circuitkit.tasks.templates import TEMPLATES, Template

ZOO = Path(circuitkit.__file__).parent / "models" / "zoo"
CONF = Path(circuitkit.__file__).parents[1] / "conf" / "task"
SENTENCES = (tasks.Numerals, tasks.Numwords, tasks.Months, tasks.EsNumwords, tasks.EsMonths, tasks.Days, tasks.Letters)
BARE = (tasks.BareNumerals, tasks.BareNumwords, tasks.BareMonths, tasks.BareEsNumwords, tasks.BareEsMonths)
ALL_WORDS = [
    *words.NUMERALS, *words.NUMWORDS, *words.MONTHS, *words.DAYS, *words.LETTERS, *words.ES_NUMWORDS, *words.ES_MONTHS, *words.NAMES,
    *words.THINGS, "born", "lost", "done", "in",
]  # fmt: skip


def wrap(vocabulary, pre_tokenizer, bos="<s>", post=None):
    """A tokenizer that makes one token of each piece that the pre-tokenizer leaves."""
    ids = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *vocabulary]))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    if post:
        backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, clean_up_tokenization_spaces=False)


def gpt2_like(broken=(), broken_at_start=(), without=(), **kwargs):
    """Like GPT-2's: a space belongs to the word behind it. Broken words are two tokens, everywhere or without a space only."""
    pieces = [f" ?{word[:2]}(?={word[2:]}\\b)|(?<={word[:2]}){word[2:]}\\b" for word in broken]
    pieces += [f"^{word[:2]}(?={word[2:]}\\b)|(?<=^{word[:2]}){word[2:]}\\b" for word in broken_at_start]
    halves = [half for word in (*broken, *broken_at_start) for half in (word[:2], " " + word[:2], word[2:])]
    vocabulary = [form for word in ALL_WORDS if word not in without for form in (word, " " + word)]
    split = pre_tokenizers.Split(Regex("|".join([*pieces, r" ?\w+", r"[^\w\s]"])), "isolated")
    return wrap([*vocabulary, *halves, "."], split, **kwargs)


def llama_like():
    """Like Llama's: a digit is a token and so is the space before it; texts begin with BOS."""
    vocabulary = ["▁", *"0123456789.", *("▁" + word for word in ALL_WORDS)]
    steps = [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    return wrap(vocabulary, pre_tokenizers.Sequence(steps), post="<s> $A")


GPT2 = gpt2_like()
LLAMA = llama_like()


def ids(tokenizer, text, special=True):
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def shown(text, spans):
    return [text[slice(*spans[label])] for label in sorted(spans)]


def pass_some(share, seed=0):
    """A filter that depends on the text alone, as that of a model does."""
    return lambda prompts: torch.tensor([Random(f"{seed}{item.clean}").random() < share for item in prompts.items])


# --- Texts ------------------------------------------------------------------------------------


def test_template_fills_the_example_of_the_paper():
    filled = TEMPLATES["done"].fill(["1", "2", "3", "4"], ["Van", "Hat", "Ring", "Desk", "Sun"])
    assert filled.text + filled.gap + "5" == "Van done in 1. Hat done in 2. Ring done in 3. Desk done in 4. Sun done in 5"
    assert shown(filled.text, filled.spans) == ["1", "2", "3", "4"]


def test_bare_prompts_are_the_windows_of_the_sequence():
    prompts = tasks.BareNumwords().prompts(GPT2)
    assert [item.clean for item in prompts.items] == [" ".join(words.NUMWORDS[i : i + 4]) for i in range(8)]
    assert [(item.answer, item.wrong) for item in prompts.items] == [
        (f" {words.NUMWORDS[i + 4]}", f" {words.NUMWORDS[i + 3]}") for i in range(8)
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(SENTENCES[:3]),
    corruption=st.sampled_from(["random", "shuffled", "repeat_last", "repeat_all"]),
    length=st.integers(2, 6),
)
def test_texts_are_the_template_filled_with_the_recorded_members(seed, kind, corruption, length):
    task = kind(n=12, seed=seed, corruption=corruption, length=length)
    phrases = {"names": "born in", "lost": "lost in", "done": "done in"}
    for item in task.prompts(GPT2).items:
        sides = {item.clean: shown(item.clean, item.spans), item.corrupt: shown(item.corrupt, item.corrupt_spans)}
        fillers = re.findall(r"(?:^|\. )(\w+)", item.clean)
        assert len(set(fillers)) == length + 1
        for text, members in sides.items():
            sentences = [f"{filler} {phrases[item.group]} {member}." for filler, member in zip(fillers, members, strict=False)]
            assert text == " ".join([*sentences, f"{fillers[-1]} {phrases[item.group]}"])
            assert len(members) == length
            assert set(members) <= set(task.members)
        clean, corrupt = sides.values()
        places = [task.members.index(member) for member in clean]
        assert places == list(range(places[0], places[0] + length))
        assert (item.answer, item.wrong) == (f" {task.members[places[-1] + 1]}", f" {clean[-1]}")
        assert not ends_in_step(corrupt, task.members)


def test_template_refuses_a_sentence_without_a_place_for_the_member():
    with pytest.raises(ConfigError, match=r"must hold \{member\} once.*found 'born in May\.' with 0 fillers\. Write it like"):
        Template("born in May.")


# --- Corruptions ------------------------------------------------------------------------------


def corrupted(name, seed=0):
    return CORRUPTIONS[name](["2", "3", "4", "5"], words.NUMERALS[:12], words.MONTHS, Random(seed))


def test_repeating_corruptions():
    assert corrupted("repeat_last") == ("2", "3", "5", "5")
    assert corrupted("repeat_all") == ("5", "5", "5", "5")


def test_shuffled_keeps_the_members_and_breaks_the_last_step():
    orders = {corrupted("shuffled", seed) for seed in range(200)}
    assert len(orders) == 24 - 6  # 6 of the 24 orders end in 2 3, 3 4 or 4 5
    assert all(sorted(order) == ["2", "3", "4", "5"] for order in orders)


def test_other_kind_shows_members_of_another_sequence():
    prompts = tasks.Numerals(n=24, corruption="other_kind").prompts(GPT2)
    seen = {member for item in prompts.items for member in shown(item.corrupt, item.corrupt_spans)}
    assert seen <= set(words.MONTHS)
    assert len(seen) == 12


def test_random_members_are_uniform_but_for_the_last_step():
    draws = [corrupted("random", seed) for seed in range(3000)]
    for place in range(2):
        counts = Counter(draw[place] for draw in draws)
        assert len(counts) == 12
        assert all(170 < count < 330 for count in counts.values())
    assert len({draw[2:] for draw in draws}) == 12 * 12 - 11
    assert not any(ends_in_step(draw, words.NUMERALS) for draw in draws)


def test_a_function_is_a_corruption():
    task = tasks.Numerals(n=3, corruption=lambda shown, members, others, rng: tuple(reversed(shown)))
    assert shown(*(lambda item: (item.corrupt, item.corrupt_spans))(task.prompts(GPT2).items[1])) == ["5", "4", "3", "2"]


def test_a_corruption_must_keep_the_number_of_members():
    task = tasks.Numerals(n=3, corruption=lambda shown, members, others, rng: ("1",))
    with pytest.raises(ConfigError, match=r"must return as many members as are shown, 4; .* returned \('1',\)"):
        task.prompts(GPT2)


# --- Tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("task", [tasks.Months, tasks.BareNumerals, tasks.BareEsNumwords])
def test_answers_are_the_next_token_of_the_joint_tokenization(task, bos, tokenizer):
    prompts = task(n=4, bos=bos).prompts(tokenizer)
    begin = [tokenizer.bos_token_id] if bos else []
    for row, item in enumerate(prompts.items):
        for text, token in ((item.answer, prompts.answers.tokens[row]), (item.wrong, prompts.wrongs.tokens[row])):
            assert [*prompts.clean[row].tolist(), token.item()] == begin + ids(tokenizer, item.clean + text, special=bos is None)
        assert prompts.corrupt[row].tolist() == begin + ids(tokenizer, item.corrupt, special=bos is None)


def test_bos_is_the_users_choice():
    (own, forced, none) = (tasks.Months(n=8, bos=bos).prompts(GPT2) for bos in (None, True, False))
    assert own.clean.equal(none.clean)
    assert forced.clean[:, 1:].equal(none.clean)
    assert forced.clean[:, 0].tolist() == [GPT2.bos_token_id] * 24
    assert torch.equal(forced.spans["S1"], none.spans["S1"] + 1)
    (own, forced, none) = (tasks.Months(n=8, bos=bos).prompts(LLAMA) for bos in (None, True, False))
    assert own.clean.equal(forced.clean)
    assert own.clean[:, 1:].equal(none.clean)


def test_bos_needs_a_token():
    with pytest.raises(PromptError, match=r"needs a tokenizer with a BOS token, and this one has none\. Use task.bos=null"):
        tasks.Months(bos=True).prompts(gpt2_like(bos=None))


def test_a_token_behind_every_text_is_refused():
    tokenizer = gpt2_like(post="$A </s>")
    with pytest.raises(PromptError, match=r"must end with its own last token, but this tokenizer adds '</s>'.*Use task.bos=true"):
        tasks.Months(n=4).prompts(tokenizer)
    assert tasks.Months(n=4, bos=False).prompts(tokenizer).n_pos == 23


def test_a_space_that_is_a_token_moves_into_the_prompt():
    prompts = tasks.BareNumerals().prompts(LLAMA)
    assert [item.clean for item in prompts.items] == ["1 2 3 4 ", "2 3 4 5 ", "3 4 5 6 ", "4 5 6 7 ", "5 6 7 8 "]
    assert LLAMA.convert_ids_to_tokens(prompts.answers.tokens.tolist()) == ["5", "6", "7", "8", "9"]
    assert LLAMA.convert_ids_to_tokens(prompts.wrongs.tokens.tolist()) == ["4", "5", "6", "7", "8"]
    assert all(item.corrupt.endswith(" ") for item in prompts.items)
    assert set(LLAMA.convert_ids_to_tokens(prompts.clean[:, -1].tolist())) == {"▁"}


@pytest.mark.parametrize("tokenizer", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("task", [tasks.Numerals(n=16, top=9), tasks.Days(n=6), tasks.BareMonths()], ids=lambda task: task.name)
def test_labels_are_at_the_last_token_of_their_member(task, tokenizer):
    prompts = task.prompts(tokenizer)
    assert set(prompts.spans) == {"S1", "S2", "S3", "S4", "last"}
    for row, item in enumerate(prompts.items):
        group = prompts.groups[row].item()
        assert prompts.group_names[group] == item.group
        for table, text, spans in ((prompts.clean, item.clean, item.spans), (prompts.corrupt, item.corrupt, item.corrupt_spans)):
            for label, (start, end) in spans.items():
                token = tokenizer.convert_ids_to_tokens(table[row, prompts.position(label, group)].item())
                assert token.strip(" ▁") == text[start:end]
    assert prompts.spans["last"].tolist() == [prompts.n_pos - 1] * len(prompts)


def test_fillers_that_break_the_length_are_dropped():
    assert {"Van", "Hat"} <= set(usable_fillers(Encoder(GPT2), TEMPLATES, words.MONTHS[:4])["done"])
    tokenizer = gpt2_like(broken=["Van"], broken_at_start=["Desk"], without=["Hat", "Alice"])
    pools = usable_fillers(Encoder(tokenizer), TEMPLATES, words.MONTHS[:4])
    assert not {"Van", "Desk", "Hat"} & set(pools["done"])
    assert set(words.THINGS) - set(pools["done"]) == {"Van", "Desk", "Hat"}
    assert set(words.NAMES) - set(pools["names"]) == {"Alice"}
    assert tasks.Months().prompts(tokenizer).n_pos == 23


def test_the_length_that_serves_every_template_is_taken():
    twice = words.THINGS[: len(words.THINGS) * 3 // 4]  # Most things, and no name, would make longer prompts.
    pools = usable_fillers(Encoder(gpt2_like(broken_at_start=twice)), TEMPLATES, words.MONTHS[:4])
    assert set(pools["lost"]) == set(words.THINGS) - set(twice)
    assert set(pools["names"]) == set(words.NAMES)


class WithMonthsAsNames(tasks.SequenceTask):
    name = "with_months_as_names"
    vocabulary = words.MONTHS
    offered = {
        "names": Template("{filler} born in {member}.", ("April", "May", "june", "Sunday", "A", "Tom", "Ann", "Amy", "Jim", "Sam", "Joe"))
    }


def test_a_member_of_a_sequence_is_never_a_filler():
    tokenizer = gpt2_like(broken=["Ann"])
    pool = usable_fillers(Encoder(tokenizer), WithMonthsAsNames.offered, words.MONTHS[:4])["names"]
    assert pool == ("Tom", "Amy", "Jim", "Sam", "Joe")
    for item in WithMonthsAsNames(n=32, templates=["names"]).prompts(tokenizer).items:
        assert sorted(re.findall(r"(?:^|\. )(\w+)", item.clean)) == sorted(pool)


def test_too_few_fillers():
    tokenizer = gpt2_like(without=words.NAMES[3:])
    with pytest.raises(PromptError, match=r"'names' needs 5 fillers that are one token .*, and 3 of its \d+ are\. Use other templates"):
        tasks.Months(n=8).prompts(tokenizer)
    assert len(tasks.Months(n=8, templates=["lost", "done"]).prompts(tokenizer)) == 16


def test_a_member_of_several_tokens_is_named_with_the_remedy():
    tokenizer = gpt2_like(broken=["eleven"])
    message = (
        r"same number of tokens, which is 1 for most, but 'eleven' has 2 tokens \[' el', 'even'\]\. Use a shorter range \(task.top=10\)"
    )
    with pytest.raises(PromptError, match=message):
        tasks.Numwords().prompts(tokenizer)
    assert len(tasks.Numwords(n=6, top=10).prompts(tokenizer)) == 18
    with pytest.raises(PromptError, match=r"'10' has 3 tokens .*task.top=9"):
        tasks.Numerals().prompts(LLAMA)


def test_an_unknown_member_is_named():
    with pytest.raises(PromptError, match=r"'March' has no token of its own\. Use another task or another model"):
        tasks.Months().prompts(gpt2_like(without=["March"]))


def test_members_that_share_no_first_token_cannot_be_answers():
    tokenizer = gpt2_like(broken=words.DAYS)
    with pytest.raises(
        PromptError, match=r"must add exactly one token.*but ' Friday' behind .* turns the end .*' Fr', 'iday'.*another task"
    ):
        tasks.Days(n=3).prompts(tokenizer)


def test_a_member_that_cannot_open_a_text_is_kept_from_there():
    tokenizer = gpt2_like(broken_at_start=["eleven"])
    prompts = [tasks.BareNumwords(seed=seed).prompts(tokenizer) for seed in range(20)]
    seen = [shown(item.corrupt, item.corrupt_spans) for each in prompts for item in each.items]
    assert "eleven" not in {members[0] for members in seen}
    assert "eleven" in {members[1] for members in seen}
    with pytest.raises(
        ConfigError, match=r"must put a member first that has as many tokens there as 'eight', but it puts 'eleven'\. Use another"
    ):
        tasks.BareNumwords(corruption="repeat_all").prompts(tokenizer)
    with pytest.raises(
        PromptError, match=r"at the beginning of a text, which is 1 for most, but 'three' has 2\. Use the same members in sentences"
    ):
        tasks.BareNumwords().prompts(gpt2_like(broken_at_start=["three"]))


# --- Draw -------------------------------------------------------------------------------------


def test_prompts_are_balanced_over_first_members_and_distinct():
    prompts = tasks.Months(n=20).prompts(GPT2)
    counts = Counter((item.group, item.stratum) for item in prompts.items)
    assert counts == {
        (name, member): 3 if place < 4 else 2 for name in ("names", "lost", "done") for place, member in enumerate(words.MONTHS[:8])
    }
    assert len({item.clean for item in prompts.items}) == 60
    assert [item.stratum for item in prompts.items[:9]] == [*words.MONTHS[:8], "January"]


def test_same_seed_same_prompts():
    first, again, other = (tasks.Months(n=16, seed=seed).prompts(GPT2) for seed in (3, 3, 4))
    assert first.content_hash() == again.content_hash()
    assert first.items == again.items
    assert not {item.clean for item in first.items} & {item.clean for item in other.items}
    assert tasks.Months(n=16).prompts(GPT2, seed=3).content_hash() == first.content_hash()


@pytest.mark.parametrize("accept", [None, pass_some(0.4)], ids=["all", "filtered"])
def test_fewer_prompts_are_the_first_of_more(accept):
    many = tasks.Numwords(n=40).prompts(GPT2, accept=accept)
    few = tasks.Numwords(n=40).prompts(GPT2, n=13, accept=accept)
    expected = [item for name in few.group_names for item in [each for each in many.items if each.group == name][:13]]
    assert list(few.items) == expected
    assert len(few) == 39


def test_tasks_share_their_fillers():
    texts = [[re.sub(r"in \w+\.", "in.", item.clean) for item in task(n=16).prompts(GPT2).items] for task in SENTENCES[:3]]
    assert texts[0] == texts[1] == texts[2]


def test_the_filter_keeps_the_balance():
    accept = pass_some(0.3)
    prompts = tasks.Months(n=64).prompts(GPT2, accept=accept)
    assert accept(prompts).all()
    assert set(Counter((item.group, item.stratum) for item in prompts.items).values()) == {8}
    assert not accept(tasks.Months(n=64).prompts(GPT2)).all()


def test_filter_false_ignores_the_filter():
    plain = tasks.Months(n=8).prompts(GPT2)
    assert tasks.Months(n=8, filter=False).prompts(GPT2, accept=pass_some(0.0)).content_hash() == plain.content_hash()


def test_too_few_are_found(caplog):
    def accept(prompts):
        return torch.tensor([item.stratum != "March" for item in prompts.items])

    with caplog.at_level(logging.WARNING):
        prompts = tasks.Months(n=16, templates=["done"]).prompts(GPT2, accept=accept)
    assert len(prompts) == 14
    assert "Only 14 of 16 prompts asked for were found: 30 were drawn, 30 of them distinct, and 47 %" in caplog.text
    assert "Fewest: done/March, with 0 of 2." in caplog.text


def test_bare_prompts_are_never_repeated(caplog):
    with caplog.at_level(logging.WARNING):
        prompts = tasks.BareMonths(n=512).prompts(GPT2)
    assert len(prompts) == len({item.clean for item in prompts.items}) == 8
    assert "Only 8 of 512 prompts asked for were found" in caplog.text


def test_none_is_left():
    message = r"None of the 48 prompts asked for is left: 384 were drawn, 384 of them distinct, and 0 \(0 %\) passed.*task.filter=false"
    with pytest.raises(PromptError, match=message):
        tasks.Months(n=16).prompts(GPT2, accept=pass_some(0.0))


# --- Settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"templates": ["name"]}, r"no template named 'name'\. Did you mean 'names'\? Choices: done, lost, names\."),
        ({"templates": []}, r"must name at least one template, each once; found \[\]"),
        ({"templates": ["lost", "lost"]}, r"each once; found \['lost', 'lost'\]"),
        ({"corruption": "shuffle"}, r"no corruption named 'shuffle'\. Did you mean 'shuffled'\? Choices: other_kind, random,"),
        ({"length": 1}, r"task.length must be 2 or more.*found 1"),
        ({"length": 4, "top": 4}, r"task.top must be more than task.length=4.*at most 12.*found 4"),
        ({"top": 13}, r"at most 12, the number of members of months; found 13"),
        ({"n": 0}, r"task.n.* must be 1 or more; found 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        tasks.Months(**wrong)


def test_one_template_may_be_given_as_a_text():
    assert tasks.Months(templates="lost") == tasks.Months(templates=["lost"])


def test_every_task_has_a_file_with_its_defaults():
    made = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    made["from_file"]["path"] = "prompts.jsonl"
    expected = {kind.name: kind() for kind in (*SENTENCES, *BARE)} | {"from_file": tasks.FromFile("prompts.jsonl")}
    for name, task in expected.items():
        assert instantiate(made[name]) == task
        assert made[name].keys() - {"_target_"} == {field.name for field in dataclasses.fields(task)}


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
@pytest.mark.parametrize("kind", [*SENTENCES, *BARE], ids=lambda kind: kind.name)
def test_embedded_models_know_every_task(kind, model):
    tokenizer = AutoTokenizer.from_pretrained(ZOO / model)
    prompts = kind(n=kind().n_starts).prompts(tokenizer)
    assert len(prompts) == kind().n_starts * len(kind().templates)
    assert {tokenizer.decode([token]) for token in prompts.answers.tokens.tolist()} == set(kind().members[kind().length :])
    assert tokenizer.unk_token_id not in torch.cat([prompts.clean, prompts.corrupt])


# --- Prompts from a file ----------------------------------------------------------------------

LINE = {"clean": "one two three", "corrupt": "two one nine", "answer": " four", "wrong": " three"}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
        return path

    return write


def test_file_is_read_in_its_order(write):
    second = LINE | {"clean": "two three four", "answer": " five", "wrong": " four"}
    labels = {"group": "b", "labels": {"S1": [0, 3], "S3": [8, 13]}, "corrupt_labels": {"S1": [0, 3], "S3": [8, 12]}}
    other = labels | {"labels": {"S1": [0, 3], "S3": [10, 14]}}
    path = write(LINE | labels, "", second | other, LINE | labels | {"group": "a"})
    prompts = tasks.FromFile(path).prompts(GPT2)
    assert [item.clean for item in prompts.items] == ["one two three", "two three four", "one two three"]
    assert GPT2.convert_ids_to_tokens(prompts.answers.tokens.tolist()) == [" four", " five", " four"]
    assert (prompts.group_names, prompts.groups.tolist()) == (("b", "a"), [0, 0, 1])
    assert {label: places.tolist() for label, places in prompts.spans.items()} == {"S1": [0] * 3, "S3": [2] * 3, "last": [2] * 3}
    assert len(tasks.FromFile(path, n=1).prompts(GPT2)) == 2
    passed = tasks.FromFile(path, n=1).prompts(GPT2, accept=lambda each: torch.tensor([False, True, True]))
    assert [item.clean for item in passed.items] == ["two three four", "one two three"]
    with pytest.raises(PromptError, match=r"None of the 3 prompts in .* passed the filter"):
        tasks.FromFile(path).prompts(GPT2, accept=pass_some(0.0))
    assert len(tasks.FromFile(path, filter=False).prompts(GPT2, accept=pass_some(0.0))) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{clean: 1}", r"Line 3 of .* is not JSON \(.*\)\. Expected a JSON object with the texts clean, corrupt, answer, and optionally"),
        ("[1]", r"Line 3 of .* is a list\. Expected a JSON object"),
        ({"clean": "one two"}, r"Line 3 of .* has None as 'corrupt', which must be a text"),
        (LINE | {"answer": ""}, r"Line 3 of .* has '' as 'answer'"),
        (LINE | {"groups": "a"}, r"Line 3 of .* has the unknown keys groups\. Expected"),
        (LINE | {"group": 1}, r"Line 3 of .* has 1 as 'group'"),
        (LINE | {"labels": {"S1": [0, 99]}}, r"Line 3 of .*\[0, 99\].*Expected places within the 13 characters of the text"),
        (LINE | {"labels": [0, 3]}, r"Line 3 of .* has labels \[0, 3\]"),
    ],
)
def test_a_bad_line_is_named(bad, message, write):
    path = write(LINE, "", bad)
    with pytest.raises(PromptError, match=message):
        tasks.FromFile(path).prompts(GPT2)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"corrupt": "two one"}, r"as many tokens as its clean twin, but 'one two three' has 3 and 'two one' has 2\. Use words"),
        ({"wrong": " seven eight"}, r"must add exactly one token.*' seven eight' behind 'one two three'.*\. Give another answer"),
        ({"answer": " Xyz"}, r"must be in the tokenizer's vocabulary, but ' Xyz' is unknown"),
        ({"answer": " three"}, r"must be different tokens, but in both sets is \[' three'\] behind 'one two three'\. Give another"),
        ({"labels": {"S1": [0, 3]}}, r"must be in every prompt, clean and corrupt, but 'S1' is not"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(second, message, write):
    with pytest.raises(PromptError, match=message):
        tasks.FromFile(write(LINE, LINE, LINE | second)).prompts(GPT2)


def test_no_prompts_are_no_set():
    with pytest.raises(PromptError, match=r"No prompt is left\. Draw more"):
        encode([], Encoder(GPT2))


def test_labels_are_per_prompt_but_the_same_in_twins(write):
    lines = [LINE | {"labels": {"it": [0, 3]}}, LINE | {"labels": {"it": [4, 7]}}]
    prompts = tasks.FromFile(write(*lines)).prompts(GPT2)
    assert prompts.places("it").tolist() == [0, 1]
    with pytest.raises(PromptError, match=r"'it' on the same token in all prompts of group 'all', found it on \[0, 1\]\. Use groups"):
        prompts.position("it", 0)
    with pytest.raises(
        PromptError, match=r"^Line 2 of .*same position in a corrupt prompt as in its clean twin, but 'it' lies at 1 in 'one"
    ):
        tasks.FromFile(
            write(LINE | {"labels": {"it": [0, 3]}}, LINE | {"labels": {"it": [4, 7]}, "corrupt_labels": {"it": [0, 3]}})
        ).prompts(GPT2)


def test_a_label_within_a_token_is_refused(write):
    tokenizer = wrap(
        ["one", " two", "one two", " three", "two one", " nine", " four"], pre_tokenizers.Split(Regex(r"\w+ \w+(?= \w)| ?\w+"), "isolated")
    )
    path = write(LINE | {"labels": {"S2": [4, 7]}})
    with pytest.raises(PromptError, match=r"must end where a token ends, but 'one two', up to 'S2', has other tokens alone.*Put the label"):
        tasks.FromFile(path).prompts(tokenizer)


def test_a_file_without_prompts(write, tmp_path):
    with pytest.raises(PromptError, match=r"holds no prompts\. Expected a JSON object a line"):
        tasks.FromFile(write("")).prompts(GPT2)
    with pytest.raises(PromptError, match=r"must be a JSONL file in UTF-8, but .*missing.jsonl' cannot be read"):
        tasks.FromFile(tmp_path / "missing.jsonl").prompts(GPT2)
    with pytest.raises(ConfigError, match=r"must be 1 or more, or null for all; found 0"):
        tasks.FromFile(write(LINE), n=0).prompts(GPT2)
