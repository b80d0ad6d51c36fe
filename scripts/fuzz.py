"""Broken and forged files of every kind that can come from elsewhere: each must end in a sentence or in a valid object.

    python scripts/fuzz.py                 # 20,000 files
    python scripts/fuzz.py --files 500 --kinds circuit journal --seed 3

A file is made from a valid one: some of its values are exchanged, dropped or moved, it is sealed anew (as somebody who means harm would),
and then the text itself may meet some accidents. Prints what came of the files by kind, the longest time that one took, and the memory.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import UserError
from circuitkit.core.findings import Finding
from circuitkit.jobs import collect
from circuitkit.models.files import settings_of
from circuitkit.models.zoo import zoo_path
from circuitkit.report import reading
from circuitkit.storage import journal, literature, load, read_table, run_folder
from circuitkit.storage.yaml_text import read_yaml
from circuitkit.tasks import FromFile

WORDS = ("<unk>", "a", "b", "c", "d")
NAMES = ("a0.h1", "m1", "a2.h0", "input->m0", "a0.h1->a2.h0<q>")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: Its name.
        body: Of a valid one.
        text: From a body to the text of a file.
        read: What opens it in the package; given the path.
    """

    file: str
    body: Any
    text: Callable[[Any], str | bytes]
    read: Callable[[Path], Any]


@dataclass
class Counts:
    """What came of the files."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: float = 0.0
    bugs: list[str] = field(default_factory=list)


def sealed(body: Any) -> str:
    """With a checksum that fits."""
    if not isinstance(body, dict):
        return json.dumps(body)
    content = {key: value for key, value in body.items() if key != "checksum"}
    return json.dumps({**content, "checksum": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()})


def chained(records: Any) -> str:
    """A journal, with checksums that fit."""
    lines, chain = [], ""
    for record in records if isinstance(records, list) else [records]:
        text = json.dumps(record)
        chain = hashlib.sha256(chain.encode() + text.encode()).hexdigest()[:16]
        lines.append(f'{{"chain": "{chain}", "record": {text}}}\n')
    return "".join(lines)


def lines(rows: Any) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))


def as_yaml(body: Any) -> str:
    """YAML, which also knows NaN and infinity; what stands twice in the body becomes an alias."""
    return yaml.safe_dump(body, sort_keys=False)


def table(rows: Any) -> bytes:
    """A parquet file; for what is no table its text."""
    try:
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    except Exception:  # whatever pyarrow says of what is no table
        return json.dumps(rows).encode("utf-8", "replace")


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def model_settings(path: Path) -> dict[str, Any]:
    """The settings of a model folder."""
    return settings_of(path.parent, "the model")


def kinds() -> dict[str, Kind]:
    """Every kind of file, by name."""
    of = json.loads
    circuit = Circuit.from_json(CIRCUIT)
    step = {"kind": "step", "sweep": 0, "order": 0, "node": "m1", "score": 91.5, "kept": True, "size": 3, "direction": "back", "total": 9}
    run = {"kind": "run", "format_version": 1, "time": "now", "name": "n", "content_hash": "abc", "provenance": {"n": 1}}
    pruned = {"task": "months", "model": "tiny", "nodes": ["a0.h1", "m1"], "level": "edge", "rule": "single", "mlps": None,
              "threshold": 80.0, "node_score": 91.5, "dropped_nodes": [], "score": 85, "edges": {"a0.h1->m1": 60.5},
              "kept": ["a0.h1->m1"]}  # fmt: skip
    finding = Finding("edges", "t", pruned, {"seed": 0})
    config = {"task": {"_target_": "x.Y", "n": 3}, "model": {"name": "tiny"}, "device_map": {0: "cpu"}, "list": [1, [2.5, None]], "b": True}
    job = {"number": 1, "overrides": ["task=months"], "status": "failed", "error": "Why.", "exit_code": 2, "started": 1.0, "ended": 2.5,
           "same_as": "../0", "content_hash": "abc"}  # fmt: skip
    status = {"name": "n", "status": "finished", "time": "now", "duration": 3.5, "files": ["circuit.json"]}
    metrics = [{"step": 0, "time": 1.0, "step/score": 91.5}, {"step": None, "time": 2.0, "circuit/score": 91.5, "circuit/size": 3}]
    prompt = {"clean": "a b c", "corrupt": "c a b", "answer": " d", "wrong": " a", "group": "g", "labels": {"S1": [0, 1]}}
    words = tokenizer()
    return {
        "circuit": Kind("circuit.json", of(circuit.to_json()), sealed, lambda path: load(Circuit, path)),
        "scores": Kind("scores.json", of(SCORES), sealed, lambda path: load(Scores, path)),
        "finding": Kind("edges.json", of(finding.to_json()), sealed, lambda path: load(Finding, path)),
        "published": Kind("list.json", {"heads": [[0, 1], [4, 4]], "mlps": [0, 9], "source": "s"}, json.dumps,
                          lambda path: literature.fitted(literature.read(path), "tiny", 12, 12)),
        "journal": Kind(journal.JOURNAL, [run, step, {**step, "order": 1, "kept": False}], chained, journal.read),
        "config": Kind(run_folder.CONFIG, config, as_yaml, lambda path: read_yaml(path, "settings")),
        "status": Kind(run_folder.STATUS, status, json.dumps, lambda path: run_folder.status(path.parent)),
        "job": Kind(run_folder.JOB, job, json.dumps, lambda path: collect.summary(collect.collect(path.parent.parent))),
        "metrics": Kind(run_folder.METRICS, metrics, lines, lambda path: list(run_folder.rows(path.parent))),
        "prompts": Kind("prompts.jsonl", [prompt, {**prompt, "group": "h"}], lines,
                        lambda path: FromFile(path, filter=False).prompts(words)),
        "table": Kind("scores.parquet", [{"node": "m1", "score": 1.5}, {"node": "m2", "score": None}], table, read_table),
        "model": Kind("config.json", of((zoo_path("tiny_gpt2") / "config.json").read_text()), json.dumps, model_settings),
        "report": Kind("circuit.json", of(circuit.to_json()), sealed, lambda path: reading.read(path.parent)),
    }  # fmt: skip


CIRCUIT = json.dumps(
    {"format_version": 1, "model": "tiny", "n_layers": 3, "n_heads": 2, "level": "edge_qkv", "score": 9.5,
     "nodes": ["a0.h1", "m1", "a2.h0"], "edges": ["input->m1", "a0.h1->a2.h0<q>", "m1->logits"],
     "provenance": {"seed": 0, "text": "é", "content_hash": "abc"}}
)  # fmt: skip
CIRCUIT = sealed(json.loads(CIRCUIT))
SCORES = Scores({"a0.h1": 91.5, "m1": 3.25, "a2.h0": -4.0}, "%", 3, 2, "tiny", {"seed": 0}).to_json()


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), 2**63, 2**70, -(2**70), 10**400, -1, 0, True, None, "", "\ud800", "\0", "a" * 5000,
    "9" * 5000,
    [], {}, [[]], _deep(70), _deep(300), 1e308, 5e-324, "../../x", "/dev/zero", "\u2028", "a0.h1", "a99999999999.h1", "m1@", ["m1"] * 3,
    {"a": {"a": 1}}, "${oc.env:HOME}", "2020-01-01", "1:1:1", "!!int",
)  # fmt: skip
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=5,
)
CHANGES = st.lists(st.tuples(st.sampled_from(["set", "set", "set", "drop", "add", "whole"]), st.integers(0, 10**6), VALUES), max_size=3)
_ACCIDENT = st.tuples(
    st.sampled_from(["cut", "delete", "insert", "replace", "double", "swap"]), st.integers(0, 10**6), st.text(max_size=6)
)
ACCIDENTS = st.just([]) | st.just([]) | st.lists(_ACCIDENT, min_size=1, max_size=2)


def changed(body: Any, changes: Sequence[tuple[str, int, Any]]) -> Any:
    """A body with values exchanged, dropped and added, at any depth."""
    body = copy.deepcopy(body)
    for what, where, instead in changes:
        value = copy.deepcopy(instead)  # it may be put into itself
        if what == "whole" and where % 5 == 0:
            return value
        places = list(_places(body))
        if not places:
            return value
        holder, key = places[where % len(places)]
        if what == "drop":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[f"{key}2"] = value
        else:
            holder[key] = value
    return body


def _places(value: Any, depth: int = 0):  # noqa: ANN202
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, each in inner:
        yield value, key
        if depth < 5:
            yield from _places(each, depth + 1)


def mangled(content: str | bytes, accidents: Sequence[tuple[str, int, str]]) -> bytes:
    """The bytes of a file after some accidents."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    for kind, where, text in accidents:
        place, new = where % (len(data) + 1), text.encode("utf-8", "surrogatepass")
        end = min(len(data), place + 1 + where % 7)
        data = {
            "cut": data[:place],
            "delete": data[:place] + data[end:],
            "insert": data[:place] + new + data[place:],
            "replace": data[:place] + new + data[end:],
            "double": data[:place] + data[place:end] + data[place:],
            "swap": data[end:] + data[:place],
        }[kind]
    return data


def is_sentence(error: UserError) -> bool:
    """Whether an error can be shown as it is."""
    text = str(error).strip()
    return 20 < len(text) < 10_000 and text[-1] in ".!?'})\"" and "Traceback" not in text


def outcome(kind: Kind, path: Path, counts: Counts, name: str) -> str:
    """What comes of a file: ``read``, ``sentence``, or ``bug`` with its trace kept."""
    began = time.perf_counter()
    try:
        kind.read(path)
        found = "read"
    except UserError as error:
        found = "sentence" if is_sentence(error) else "bug"
        if found == "bug":
            counts.bugs.append(f"{name}: no sentence: {str(error)[:300]!r} from {_start(path)!r}")
    except Exception:  # noqa: BLE001  whatever it is, it is what is looked for
        found = "bug"
        counts.bugs.append(f"{name}: {traceback.format_exc(limit=-3)} from {_start(path)!r}")
    counts.slowest = max(counts.slowest, time.perf_counter() - began)
    counts.outcomes[name, found] += 1
    return found


def _start(path: Path) -> bytes:
    """The first bytes of a file; of what is none, such as a named pipe, nothing is read."""
    return path.read_bytes()[:500] if path.is_file() else b""


def fuzz(name: str, kind: Kind, files: int, seed: int, folder: Path) -> Counts:
    """Makes and opens so many files of a kind."""
    counts = Counts()
    place = folder / name / "run"
    place.mkdir(parents=True)

    @hypothesis.seed(seed)
    @settings(max_examples=files, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[hypothesis.Phase.generate])
    @given(changes=CHANGES, accidents=ACCIDENTS)
    def one(changes, accidents):  # noqa: ANN001, ANN202
        body = changed(kind.body, changes)
        (place / kind.file).write_bytes(mangled(kind.text(body), accidents))
        outcome(kind, place / kind.file, counts, name)

    one()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = {name: kind for name, kind in kinds().items() if options.kinds is None or name in options.kinds}
    each, bugs = math.ceil(options.files / len(chosen)), []
    print(f"{'kind':<10} {'files':>6} {'read':>6} {'sentence':>9} {'bug':>4} {'slowest s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in chosen.items():
            counts = fuzz(name, kind, each, options.seed, Path(folder))
            numbers = [counts.outcomes[name, what] for what in ("read", "sentence", "bug")]
            print(f"{name:<10} {sum(numbers):>6} {numbers[0]:>6} {numbers[1]:>9} {numbers[2]:>4} {counts.slowest:>10.3f}", flush=True)
            bugs += counts.bugs
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    for bug in bugs[:20]:
        print(bug)
    sys.exit(1 if bugs else 0)


if __name__ == "__main__":
    main()
