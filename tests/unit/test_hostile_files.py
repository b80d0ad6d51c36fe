"""What a stranger may put in the place of a file: each reader ends in a sentence or in a valid object, none waits or fills the memory."""

import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from circuitkit.core import plain
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import CircuitError, ConfigError, ModelError, UserError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.models.loading import load_model
from circuitkit.storage import load, read_table, run_folder, save
from circuitkit.storage.folder_lock import LOCK, FolderLock
from circuitkit.storage.reading import LIMIT, open_file, read_lines, read_text
from circuitkit.storage.yaml_text import parse

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import fuzz  # noqa: E402

KINDS = fuzz.kinds()


def bomb(levels: int = 12) -> str:
    """YAML whose aliases stand for 9 ** levels values."""
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    return "\n".join(rows)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 * 2**30)


def table(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"node": f"m{row}", "score": 1.0} for row in range(999)]), path)
    path.write_bytes(path.read_bytes()[:-100])


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def text(content: str):
    return lambda path: path.write_bytes(content.encode("utf-8", "surrogatepass"))


NO_FILES = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "links in a circle": loop,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "8 GB of nothing": sparse,
}
CONTENTS = {
    "not readable": unreadable,
    "a bomb of aliases": text(bomb()),
    "100,000 brackets": text("[" * 100_000 + "]" * 100_000),
    "100,000 open brackets": text("[" * 100_000),
    "100,000 mappings": text('{"a":' * 100_000),
    "NaN": text("NaN"),
    "1e400": text('{"format_version": 1e400}'),
    "2 ** 70": text(f'{{"format_version": {2**70}, "a": 1}}'),
    "a long number": text("9" * 5000),
    "half a surrogate": text('{"format_version": 1, "a": "\\ud800"}'),
    "a bare surrogate": text("\ud800"),
    "NUL": text("\0" * 100),
    "NUL in a text": text('{"format_version": 1, "a\\u0000": 1}'),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00a" * 10),
    "nothing": text(""),
    "newlines": text("\n" * 1000),
    "a table that was cut off": table,
    "a list": text("[]"),
    "null": text("null"),
    "a number to the base 60": text("a: " + "1:" * 300_000 + "1"),
    "code": text("!!python/object/apply:os.system [ls]"),
}


@pytest.fixture(autouse=True)
def alarm():
    """A reader that waits fails, instead of holding up the tests."""

    def ring(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


LENIENT = ("status", "job", "metrics", "report")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_a_sentence(what, kind, tmp_path):
    path = tmp_path / "above" / "run" / KINDS[kind].file
    path.parent.mkdir(parents=True)
    NO_FILES[what](path)
    counts = fuzz.Counts()
    found = fuzz.outcome(KINDS[kind], path, counts, kind) if not path.is_dir() else _outcome_of_folder(kind, path)
    assert found == ("read" if kind in LENIENT else "sentence"), counts.bugs or what


def _outcome_of_folder(kind: str, path: Path) -> str:
    try:
        KINDS[kind].read(path)
    except UserError as error:
        assert fuzz.is_sentence(error) and "found a folder" in str(error)
        return "sentence"
    return "read"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", CONTENTS)
def test_what_is_no_such_content_is_a_sentence_or_a_valid_object(what, kind, tmp_path):
    path = tmp_path / "above" / "run" / KINDS[kind].file
    path.parent.mkdir(parents=True)
    CONTENTS[what](path)
    counts = fuzz.Counts()
    found = fuzz.outcome(KINDS[kind], path, counts, kind)
    assert found != "bug", counts.bugs
    if kind in ("circuit", "scores", "finding", "published", "table", "prompts"):
        assert found == "sentence"


@pytest.mark.parametrize("kind", KINDS)
def test_the_unbroken_file_is_read(kind, tmp_path):
    path = tmp_path / "above" / "run" / KINDS[kind].file
    path.parent.mkdir(parents=True)
    path.write_bytes(fuzz.mangled(KINDS[kind].text(KINDS[kind].body), []))
    assert KINDS[kind].read(path) is not None


# Wrong types


@pytest.mark.parametrize("kind", ["status", "job", "circuit", "scores", "finding", "journal", "config", "model", "published"])
@pytest.mark.parametrize("value", [None, True, -1, 1.5, "x", [], [[]], {}, {"a": 1}, [None], 10**400], ids=repr)
def test_a_value_of_another_type_in_every_entry(kind, value, tmp_path):
    path = tmp_path / "above" / "run" / KINDS[kind].file
    path.parent.mkdir(parents=True)
    counts = fuzz.Counts()
    for place in range(len(list(fuzz._places(KINDS[kind].body)))):
        body = fuzz.changed(KINDS[kind].body, [("set", place, value)])
        path.write_bytes(fuzz.mangled(KINDS[kind].text(body), []))
        assert fuzz.outcome(KINDS[kind], path, counts, kind) != "bug", counts.bugs


def test_a_wrong_entry_of_a_status_is_left_out(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"status": 3, "name": "n", "files": ["a", 1], "duration": "x", "more": 1}))
    assert run_folder.status(tmp_path) == {"name": "n"}
    (tmp_path / "job.json").write_text(json.dumps({"number": "x", "overrides": ["a=b"], "same_as": ["x"], "started": 1}))
    assert run_folder.job(tmp_path) == {"overrides": ["a=b"], "started": 1}


@pytest.mark.parametrize("key", ["n_layers", "n_heads"])
def test_a_model_of_a_billion_layers_is_none(key):
    body = json.loads(Circuit((), 2, 2).to_json()) | {key: 10**9}
    with pytest.raises(CircuitError, match=f"{key} is 1000000000, expected at most 4096"):
        Circuit.from_json(fuzz.sealed(body))


# Bounds


def test_the_bound_can_be_raised(tmp_path, monkeypatch):
    path = save(Circuit((), 2, 2, provenance={"text": "a" * 2**20}), tmp_path / "circuit.json")
    monkeypatch.setenv(LIMIT, "1")
    with pytest.raises(CircuitError, match=rf"has 1 MB, expected at most 1 MB\. .* {LIMIT}.* to more than 1\."):
        load(Circuit, path)
    monkeypatch.setenv(LIMIT, "2")
    assert load(Circuit, path).n_layers == 2


def test_a_text_of_brackets_alone_does_not_fill_the_memory(tmp_path, monkeypatch):
    (tmp_path / "circuit.json").write_text("[" + "{}," * 300_000 + "{}]")
    monkeypatch.setenv(LIMIT, "1")
    tracemalloc.start()
    with pytest.raises(CircuitError, match="holds more than 65,536 values"):
        load(Circuit, tmp_path / "circuit.json")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * 2**20


@pytest.mark.parametrize("given", ["x", "0", "-1", "1.5", "²", "9" * 40])
def test_a_bound_that_is_no_number(given, monkeypatch, tmp_path):
    monkeypatch.setenv(LIMIT, given)
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=f"{LIMIT} must be a whole number of megabytes, such as 512; found"):
        read_text(tmp_path / "a", "circuit")


def test_a_name_with_nul_is_no_path():
    with pytest.raises(CircuitError, match="null"):
        open_file("a\0b", "circuit")


def test_only_a_newline_ends_a_line(tmp_path):
    (tmp_path / "a").write_text("a\u2028b\r\nc\x0bd\n", newline="")
    assert read_lines(tmp_path / "a", "prompt") == ["a\u2028b", "c\x0bd"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a").write_text("a", encoding="utf-8-sig")
    assert read_text(tmp_path / "a", "circuit") == "a"


# Plain values


@pytest.mark.parametrize("value", [2**63, -(2**63), 2**64 - 1, 1e308, -0.0, "é\n", [[]], {"a": {"b": None}}, True])
def test_plain_values_are_read_as_they_were_written(value):
    assert plain.parse(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [("NaN", "NaN"), ("[-Infinity]", "-Infinity"), ("1e400", "beyond what a float"), (str(2**64), "beyond 64 bits"),
     ('"\\udc00"', "surrogate"), ('{"\\u0000": 1}', "NUL"), ("[" * 65 + "]" * 65, "deeper than 64"),
     ("[" * 10**5, "deeper|Expecting"), ("", "Expecting value")],
)  # fmt: skip
def test_other_texts_are_refused_with_their_reason(content, reason):
    with pytest.raises(ValueError, match=reason):
        plain.parse(content)


def test_what_was_written_can_be_read():
    odd = {"nan": float("nan"), "list": [float("inf"), 2**70, "\ud800\0"], "\0": 1}
    assert plain.parse(json.dumps(plain.writable(odd))) == {"nan": None, "list": [None, str(2**70), "\ufffd\ufffd"], "\ufffd": 1}
    again = Finding.from_json(Finding("odd", "t", odd).to_json())
    assert again.body["list"] == [None, str(2**70), "\ufffd\ufffd"]
    assert Circuit.from_json(Circuit((Node.parse("m0"),), 2, 2, score=float("nan")).to_json()).score is None


def test_an_alias_counts_as_what_it_stands_for():
    assert parse("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    with pytest.raises(ValueError, match="more than 100,000 values, an alias counted as all"):
        parse(bomb(6))
    assert parse(bomb(4))["a3"][0][0][0][0] == 1
    with pytest.raises(ValueError, match="a part of"):
        parse("a: &a [*a]")


# Folders


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="Expected to be able to write into the run folder"):
        FolderLock(run).take()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_lock_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(UserError, match="found something else"):
        FolderLock(tmp_path).take()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt",
                                  "model.safetensors"])  # fmt: skip
def test_a_model_folder_with_a_pipe(file, tmp_path):
    whole_model(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(ModelError, match=f"{file} cannot be read: expected a regular file, found a named pipe"):
        load_model(path=tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1]", "holds a list, expected a mapping"), ("[" * 10**5 + "]" * 10**5, "is not valid JSON"), ('{"model_type": []}', "is no text"),
     ('{"model_type": "gpt2", "n_layer": 1000000000}', "says '1000000000' layers"), ('{"n_layer": "x"}', "says 'x' layers")],
)  # fmt: skip
def test_a_model_folder_with_other_settings(content, reason, tmp_path):
    whole_model(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=reason):
        load_model(path=tmp_path)


def test_an_index_of_weights_stays_in_its_folder(tmp_path):
    whole_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../model.safetensors"}}))
    with pytest.raises(ModelError, match="must say for each weight in which file beside it"):
        load_model(path=tmp_path)


def whole_model(folder: Path) -> None:
    for file in fuzz.zoo_path("tiny_gpt2").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())


# Fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_forty_files_of_each_kind(kind, tmp_path):
    """500 in all; scripts/fuzz.py makes 20,000."""
    counts = fuzz.fuzz(kind, KINDS[kind], 40, 0, tmp_path)
    assert counts.bugs == []
    assert sum(counts.outcomes.values()) == 40


def test_the_fuzzer_sees_a_bug(tmp_path):
    def careless(path):
        return json.loads(path.read_text())["nodes"][0].lower()

    counts = fuzz.fuzz("circuit", fuzz.Kind("circuit.json", KINDS["circuit"].body, fuzz.sealed, careless), 60, 0, tmp_path)
    assert counts.outcomes["circuit", "bug"] and counts.outcomes["circuit", "read"]


def test_a_table_is_read(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([{"node": "m1", "score": 1.5}]), tmp_path / "scores.parquet")
    assert read_table(tmp_path / "scores.parquet") == [{"node": "m1", "score": 1.5}]
    assert Scores.from_json(fuzz.SCORES).values["m1"] == 3.25
