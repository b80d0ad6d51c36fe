"""The journal: what is written is read back, damage is seen, and a method goes on from it as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import planted_model, planted_prompts
from omegaconf import OmegaConf
from test_runner import Toy, run

from circuitkit.callbacks import Callback, Journal
from circuitkit.config import conf_dir, file_name
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError, UserError
from circuitkit.core.records import RunInfo, Step
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.jobs.saved import literal
from circuitkit.loggers import JsonlLogger
from circuitkit.methods import IterativePruning, Knockout, RandomCircuit
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Zero
from circuitkit.storage import journal
from circuitkit.storage.folder_lock import LOCK, FolderLock
from circuitkit.storage.journal import JOURNAL, JournalFile, Recorded, Replay, read
from circuitkit.testing import CallbackConformance

INFO = RunInfo("toy", {}, {"settings": {"method": {"threshold": 0.8}}, "versions": {"torch": "2.8"}, "content_hash": "a"}, "a", 4, 12)
STEPS = [
    Step(0, 0, "m3", 0.1 + 0.2, True, 12, "backward", 12),
    Step(0, 1, "a3.h1", 1e300 / 3, False, 11, "backward", 12),
    Step(0, 2, "é\u2028", float("inf"), True, 11, "", 0),
    Step(1, 3, "a0.h0", -5e-324, True, 11, "forward", 11),
]


def written(folder: Path, steps=STEPS, info=INFO) -> Path:
    callback = Journal(folder)
    callback.on_run_start(info)
    for step in steps:
        callback.on_step(step)
    return folder / JOURNAL


# The file


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path):
    path = written(tmp_path)
    recorded = read(path)
    assert recorded.steps == tuple(STEPS)
    assert recorded.header["content_hash"] == "a" and recorded.size == path.stat().st_size
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_not_a_number_is_read_back(tmp_path):
    (step,) = read(written(tmp_path, [replace(STEPS[0], score=float("nan"))])).steps
    assert step.score != step.score


def test_each_record_is_on_disk_at_once(tmp_path):
    callback = Journal(tmp_path)
    callback.on_run_start(INFO)
    for number, step in enumerate(STEPS, start=1):
        callback.on_step(step)
        assert len(read(tmp_path / JOURNAL).steps) == number


def test_cut_anywhere_it_holds_the_whole_records_before(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        recorded = read(path)
        if whole == 0:
            assert recorded is None
        else:
            assert recorded.steps == tuple(STEPS[: whole - 1]) and recorded.size == ends[whole - 1]
    assert read(tmp_path / "none.jsonl") is None


def test_a_byte_changed_in_the_middle_is_an_error_and_in_the_last_line_drops_it(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    last = data[:-1].rindex(b"\n") + 1
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if place < last:
            with pytest.raises(CircuitError, match=r"is damaged: line \d of \d"):
                read(path)
        else:
            assert read(path).steps == tuple(STEPS[:-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    ],
    ids=["no header", "lost", "doubled", "swapped"],
)
def test_lines_that_are_not_where_they_were(tmp_path, change):
    path = written(tmp_path)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(CircuitError, match="its checksum does not match.*Restore it, or start a new run"):
        read(path)


def test_a_journal_of_a_later_version(tmp_path, monkeypatch):
    monkeypatch.setattr("circuitkit.callbacks.journal.FORMAT_VERSION", 2)
    path = written(tmp_path)
    with pytest.raises(CircuitError, match="has journal format 2; this version reads format 1"):
        read(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A journal, and what is in it."""
    path = written(tmp_path_factory.mktemp("fuzz"))
    return path, path.read_bytes()


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_happens_to_a_journal_it_is_an_error_or_a_prefix(whole, data):
    """2,000 journals cut, spliced, overwritten and doubled at random."""
    path, content = whole
    for _ in range(data.draw(st.integers(1, 4))):
        place, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        kind = data.draw(st.sampled_from(["insert", "overwrite", "delete", "double", "cut", "lines"]))
        noise = data.draw(st.binary(max_size=40) | st.sampled_from([b"\n", b"}\n", b"\0" * 64, b'{"chain": "', b"\r\n"]))
        lines = content.splitlines(keepends=True)
        content = {
            "insert": content[:place] + noise + content[place:],
            "overwrite": content[:place] + noise + content[place + len(noise) :],
            "delete": content[:place] + content[end:],
            "double": content[:end] + content[place:],
            "cut": content[:place],
            "lines": b"".join(data.draw(st.permutations(lines))) if lines else b"",
        }[kind]
    path.write_bytes(content)
    try:
        recorded = read(path)
    except CircuitError as error:
        assert str(path) in str(error)
    else:
        assert recorded is None or recorded.steps == tuple(STEPS[: len(recorded.steps)])


# Writing


def test_a_full_disk_leaves_whole_records_and_a_sentence(tmp_path, monkeypatch):
    path = written(tmp_path, STEPS[:2])
    file = JournalFile(path, after=read(path))
    real = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content[: len(content) - 90])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.*go on with resume="):
        file.step(STEPS[2])
    monkeypatch.undo()
    assert path.stat().st_size == read(path).size and read(path).steps == tuple(STEPS[:2])
    file.step(STEPS[2])
    assert read(path).steps == tuple(STEPS[:3])


def test_going_on_cuts_a_torn_record_off(tmp_path):
    path = written(tmp_path, STEPS[:2])
    with path.open("ab") as file:
        file.write(b'{"chain": "0123456789abcdef", "record": {"kind"' + b" " * 400)
    callback = Journal(tmp_path, read(path))
    callback.on_run_start(INFO)
    for step in STEPS[2:]:
        callback.on_step(step)
    callback.on_exception(KeyboardInterrupt())
    assert read(path).steps == tuple(STEPS)
    kinds = [json.loads(line)["record"]["kind"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert kinds == ["run", "step", "step", "resumed", "step", "step", "stopped"]


def test_a_journal_is_never_written_over(tmp_path):
    before = written(tmp_path).read_bytes()
    with pytest.raises(UserError, match="Expected no journal of another run"):
        Journal(tmp_path).on_run_start(INFO)
    assert (tmp_path / JOURNAL).read_bytes() == before


class TestJournal(CallbackConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory):
        self.folder = tmp_path_factory.mktemp("journal")

    def make(self):
        return Journal(self.folder)


# Whether it may be gone on with


def test_another_hash_is_refused_with_what_differs(tmp_path):
    recorded = read(written(tmp_path))
    recorded.check(INFO)
    now = {"settings": {"method": {"threshold": 0.9}}, "versions": {"torch": "2.8", "nnsight": "0.8"}, "content_hash": "b"}
    with pytest.raises(ConfigError) as caught:
        recorded.check(replace(INFO, provenance=now, content_hash="b"))
    text = str(caught.value)
    assert "settings.method.threshold was 0.8, is 0.9; versions.nnsight was None, is '0.8'." in text
    assert "content_hash" not in text and "versions.torch" not in text


@pytest.mark.parametrize("change", [{"node": "m9"}, {"kept": False}, {"sweep": 1}, {"direction": "forward"}, {"size": 5}, {"order": 7}])
def test_another_decision_is_refused(tmp_path, change):
    replay = Replay(read(written(tmp_path)))
    with pytest.raises(MeasurementError, match="Expected decision 0 of .*m3 kept at 0.3 % in sweep 0 backward; found "):
        replay.is_new(replace(STEPS[0], **change))


def test_the_recorded_score_is_taken_for_a_decision_that_is_made_again(tmp_path):
    replay = Replay(read(written(tmp_path, STEPS[:1])))
    assert not replay.is_new(replace(STEPS[0], score=0.30001)) and replay.is_new(STEPS[1])
    assert replay.steps == STEPS[:2]
    short = Replay(read(tmp_path / JOURNAL))
    with pytest.raises(MeasurementError, match="at least the 1 decisions"):
        short.check_complete()


# Methods


class Wide(PackedEngine):
    """Lets a search guess far ahead, and counts the masks that it is asked for."""

    batch = 6
    asked = 0

    def passes(self, masks, base=None):
        self.asked += len(masks)
        return super().passes(masks, base)


METHODS = [IterativePruning(0.8), IterativePruning(0.6, order="forward"), Knockout(), RandomCircuit(n_heads=4, n_mlps=2, draws=14)]


@pytest.mark.parametrize("patcher", [Zero(), Mean("conditional")], ids=["zero", "conditional"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_from_every_step_a_method_goes_on_to_the_same(method, patcher):
    def discovered(history=()):
        engine, steps = Wide(planted_model(), planted_prompts(), patcher, LogitDiff()), []
        engine.baseline()
        engine.asked = 0
        return method.discover(engine, on_step=steps.append, history=history), steps, engine.asked

    found, steps, asked = discovered()
    assert asked >= len(steps)
    for done in range(len(steps) + 1):
        again, after, asked_again = discovered(steps[:done])
        assert after == steps and again == found
        assert asked_again <= asked - done + 6 and (done < len(steps) or asked_again == 0)


class Stop(Callback):
    """Interrupts a run after some steps."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.left, self.error = after, error

    def on_step(self, step):
        self.left -= 1
        if self.left == 0:
            raise self.error


def run_in(folder: Path, *callbacks: Callback, recorded: Recorded | None = None, method=None):
    logger = JsonlLogger(folder, resume=recorded is not None)
    return run(loggers=[logger], callbacks=[Journal(folder, recorded), *callbacks], method=method or IterativePruning(0.8), resume=recorded)


class Plain(Knockout):
    """A method that scores everything again."""

    def discover(self, engine, *, on_step, history=()):
        return super().discover(engine, on_step=on_step)


@pytest.mark.parametrize("method", [IterativePruning(0.8), Knockout(), Plain()], ids=["pruning", "knockout", "no history"])
@pytest.mark.parametrize("after", [1, 9])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, after, method, monkeypatch):
    run_in(tmp_path / "whole", method=method)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "broken", Stop(after, KeyboardInterrupt()), method=method)
    assert json.loads((tmp_path / "broken/status.json").read_text())["status"] == "interrupted"
    recorded = read(tmp_path / "broken" / JOURNAL)
    assert len(recorded.steps) == after
    run_in(tmp_path / "broken", recorded=recorded, method=method)
    for name in ("scores.parquet", "circuit.json" if method.name == "iterative_pruning" else "scores.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    broken, whole = ([row["step/node"] for row in each if "step/node" in row] for each in rows)
    assert broken == whole and len(rows[0]) == len(rows[1])
    assert json.loads((tmp_path / "broken/status.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "broken").glob("previous-*")) and not (tmp_path / "broken" / LOCK).exists()


def test_a_run_of_something_else_is_left_as_it_was(tmp_path):
    with pytest.raises(RuntimeError):
        run_in(tmp_path, Stop(5, RuntimeError("broke")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    recorded = read(tmp_path / JOURNAL)
    with pytest.raises(ConfigError, match="settings.task.seed was 0, is 3"):
        run(loggers=[JsonlLogger(tmp_path, resume=True)], callbacks=[Journal(tmp_path, recorded)], task=Toy(seed=3), resume=recorded)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_run_puts_the_old_journal_aside(tmp_path):
    with pytest.raises(RuntimeError):
        run_in(tmp_path, Stop(5, RuntimeError("broke")))
    run_in(tmp_path)
    assert len(read(tmp_path / "previous-1" / JOURNAL).steps) == 5
    assert len(read(tmp_path / JOURNAL).steps) > 5


# One process in a folder


HOLD = """
    import sys, time
    from pathlib import Path
    from circuitkit.storage.folder_lock import FolderLock
    FolderLock(Path(sys.argv[1])).take()
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_process_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {first.pid} on "):
            JsonlLogger(tmp_path).log_config("toy", {})
        assert {path.name for path in tmp_path.iterdir()} == {LOCK}
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    logger = JsonlLogger(tmp_path)
    logger.log_config("toy", {})
    assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
    logger.finalize("finished")
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_given_back(tmp_path):
    one, other = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    one.take()
    one.take()
    with pytest.raises(UserError, match="Wait for it"):
        other.take()
    assert one.held and not other.held
    one.release()
    other.take()
    one.release()
    assert (tmp_path / "run" / LOCK).exists() and other.held
    other.release()


def test_a_file_system_without_locks_is_only_a_warning(tmp_path, monkeypatch, caplog):
    def cannot(file: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("circuitkit.storage.folder_lock._lock_file", cannot)
    lock = FolderLock(tmp_path)
    lock.take()
    assert lock.held and "cannot be locked (" in caplog.text
    lock.release()


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("months-gpt2", "months-gpt2"),
        ("../../x", "x"),
        ("a/../../b", "a-..-..-b"),
        ("/etc/passwd", "etc-passwd"),
        ("..\\..\\x", "x"),
        ("a\0b\nc", "a-b-c"),
        ("..", "run"),
        ("x" * 400, "x" * 150),
        ("task=é,n=3", "task=é,n=3"),
    ],
)
def test_a_name_leads_to_no_other_folder(name, expected):
    assert file_name(name) == expected


@pytest.mark.parametrize(("key", "depth"), [("hydra.run.dir", 2), ("hydra.sweep.subdir", 1)])
def test_a_run_folder_stays_where_runs_are(key, depth):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=["name=x/../../../../out", "hydra.job.num=3"], return_hydra_config=True)
        folder = OmegaConf.select(config, key)
    assert folder.endswith("_x-..-..-..-..-out") and len(Path(folder).parts) == depth


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${b} ${c}", "\\${d}", "\\\\${d}", "$", "plain\\"])
def test_settings_of_a_run_folder_are_not_looked_up(text):
    """A folder may come from elsewhere, and its text goes to trackers."""
    made = OmegaConf.create(literal({"one": text, "b": "B", "many": [text, {"inner": text}]}))
    assert OmegaConf.to_container(made, resolve=True) == {"one": text, "b": "B", "many": [text, {"inner": text}]}


def test_the_journal_uses_no_pickle():
    assert not {"pickle", "torch", "marshal", "shelve"} & set(vars(journal))
