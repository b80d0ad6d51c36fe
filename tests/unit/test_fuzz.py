"""2,000 broken files: each ends in a clear error or in a valid object, and what was changed is never taken for what was written."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError, PromptError, UserError
from circuitkit.core.node import Node
from circuitkit.core.prompts import PromptSet
from circuitkit.storage import load
from circuitkit.tasks import FromFile

NAMES = ("a0.h1", "m1", "a2.h0")
CIRCUIT = Circuit(tuple(map(Node.parse, NAMES)), 3, 2, "tiny", 91.5, provenance={"seed": 0, "text": "é"}).to_json()
SCORES = Scores({"a0.h1": 91.5, "m1": 3.25, "a2.h0": -4.0}, "%", 3, 2, "tiny", {"seed": 0}).to_json()
LINE = {"clean": "a b c", "corrupt": "c a b", "answer": " d", "wrong": " a", "group": "g", "labels": {"S1": [0, 1]}}
JSONL = "\n".join(json.dumps({**LINE, "group": group}) for group in "ggh") + "\n"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
KINDS = st.sampled_from(["cut", "delete", "insert", "replace", "double", "swap"])
EDITS = st.lists(st.tuples(KINDS, st.integers(0, 10**6), st.text(max_size=6)), min_size=1, max_size=4)
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MANY = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)


def mangled(text: str, edits: list[tuple[str, int, str]]) -> str:
    """A text after some accidents."""
    for kind, where, new in edits:
        place = where % (len(text) + 1)
        end = min(len(text), place + 1 + where % 7)
        text = {
            "cut": text[:place],
            "delete": text[:place] + text[end:],
            "insert": text[:place] + new + text[place:],
            "replace": text[:place] + new + text[end:],
            "double": text[:place] + text[place:end] + text[place:],
            "swap": text[end:] + text[:place],
        }[kind]
    return text


def is_sentence(error: UserError) -> bool:
    text = str(error).strip()
    return len(text) > 20 and text[-1] in ".!?'}\"" and "Traceback" not in text


def signed(body: object) -> str:
    """With a checksum that fits, as somebody who means harm would write it."""
    if not isinstance(body, dict):
        return json.dumps(body)
    return json.dumps({**body, "checksum": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()})


@MANY
@given(edits=EDITS, which=st.sampled_from([(Circuit, CIRCUIT), (Scores, SCORES)]))
def test_an_accident_to_a_file_is_never_taken_for_what_was_written(edits, which, tmp_path):
    kind, text = which
    path = tmp_path / "file.json"
    path.write_bytes(mangled(text, edits).encode("utf-8", "surrogatepass"))
    try:
        found = load(kind, path)
    except CircuitError as error:
        assert is_sentence(error)
    else:
        # Whitespace may differ, or a key may be there twice with the same value; the content may not.
        assert found == kind.from_json(text)


@MANY
@given(key=st.sampled_from(sorted(json.loads(CIRCUIT).keys() | json.loads(SCORES).keys())), value=JSON, drop=st.booleans(),
       which=st.sampled_from([(Circuit, CIRCUIT), (Scores, SCORES)]))  # fmt: skip
def test_a_forged_file_gives_an_error_or_a_valid_object(key, value, drop, which):
    kind, text = which
    body = json.loads(text)
    del body["checksum"]
    body[key] = value
    if drop:
        del body[key]
    try:
        found = kind.from_json(signed(body))
    except CircuitError as error:
        assert is_sentence(error)
    else:
        again = kind.from_json(found.to_json())
        assert again.to_json() == found.to_json()
        for name, expected in json.loads(text).items() if kind is Circuit else ():
            assert name in body or name == "checksum", f"{name} was made up, not {expected}"
        written = json.loads(found.to_json())
        for name in ("format_version", "model", "n_layers", "n_heads", "level", "unit", "provenance", "values"):
            if name in written:
                assert json.dumps(written[name], sort_keys=True) == json.dumps(_floats(name, body[name]), sort_keys=True), name
        if kind is Circuit:
            assert set(written["nodes"]) == set(body["nodes"])


def _floats(name: str, value):
    """Scores are floats, also where a file has a whole number."""
    return {node: float(score) for node, score in value.items()} if name == "values" else value


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layers", 3.7), ("n_layers", True), ("n_layers", "3"), ("n_heads", -2), ("model", 3), ("score", "91"), ("score", True),
     ("nodes", {"m1": 1}), ("nodes", "m1"), ("provenance", [["a", 1]]), ("level", "nodes")],
)  # fmt: skip
def test_what_is_only_like_the_right_kind_is_refused(key, value):
    body = {**json.loads(CIRCUIT), key: value}
    del body["checksum"]
    with pytest.raises(CircuitError, match="is not a circuit file|is no name|Node"):
        Circuit.from_json(signed(body))


@pytest.fixture(scope="module")
def tokenizer():
    words = ("<unk>", "a", "b", "c", "d")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def is_error_or_whole(path, tokenizer) -> bool:
    """Whether what comes of a file is a sentence, or prompts that can be used."""
    try:
        prompts = FromFile(path, filter=False).prompts(tokenizer)
    except UserError as error:
        return isinstance(error, PromptError) and is_sentence(error)
    whole = isinstance(prompts, PromptSet) and prompts.clean.shape == prompts.corrupt.shape and len(prompts) > 0
    return whole and all(0 <= place < prompts.n_pos for label in prompts.spans for place in prompts.places(label).tolist())


def test_the_unbroken_file_is_read(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(JSONL)
    assert len(FromFile(path, filter=False).prompts(tokenizer)) == 3


@MANY
@given(edits=EDITS)
def test_prompts_after_an_accident(edits, tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(mangled(JSONL, edits).encode("utf-8", "surrogatepass"))
    assert is_error_or_whole(path, tokenizer)


@MANY
@given(key=st.sampled_from([*LINE, "corrupt_labels", "other"]), value=JSON, whole=st.none() | JSON)
def test_prompts_with_any_value_anywhere(key, value, whole, tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**LINE, key: value} if whole is None else whole), encoding="utf-8")
    assert is_error_or_whole(path, tokenizer)
