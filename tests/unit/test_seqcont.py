"""The study in experiments/seqcont: its commands, its tables, and how it is held against the paper. Nothing here runs a model."""

from __future__ import annotations

import csv
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from study_for_tests import whole

from circuitkit.config import build, conf_dir, function
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.errors import UserError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.engine import Engine
from circuitkit.methods import Method
from circuitkit.metrics import Metric
from circuitkit.patchers import Patcher
from circuitkit.storage import save, save_finding
from circuitkit.storage.literature import fitted, read
from circuitkit.tasks import Task

SEQCONT = Path(__file__).parents[2] / "experiments" / "seqcont"
sys.path.insert(0, str(SEQCONT))

import compare_to_paper as paper  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402

RESULTS = SEQCONT / "results"
PARTS = {"task": Task, "patcher": Patcher, "metric": Metric, "method": Method, "engine": Engine}
SHAPES = {"gpt2": (12, 12), "llama2_7b_chat": (32, 32)}
SENTENCES = ("numerals", "numwords", "months")
BARE = ("bare_numerals", "bare_numwords", "bare_months", "bare_es_numwords", "bare_es_months")
FOLDER = Path("/study")


# Commands


def settings(experiment):
    return OmegaConf.load(study.CONF / "experiment" / f"{experiment}.yaml").study


def commands(experiment, prompts=()):
    return {command.folder: command for command in study.commands(settings(experiment), FOLDER, prompts)}


def every_command():
    """All of them, and they are many: those that differ from another in the task's or model's name alone are slow."""
    for experiment in sorted(path.stem for path in (study.CONF / "experiment").glob("*.yaml")):
        first = settings(experiment).tasks[0]
        for folder, command in commands(experiment).items():
            quick = experiment in ("gpt2", "llama2_7b") and folder.partition("/")[2] in ("", first)
            yield pytest.param(experiment, command, id=f"{experiment}-{folder or 'report'}", marks=() if quick else pytest.mark.slow)


@lru_cache
def composed(experiment, command):
    overrides = [f"hydra.searchpath=[{study.CONF}]", f"+experiment={experiment}", *command.overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=overrides)


@pytest.mark.parametrize(("experiment", "command"), every_command())
def test_every_command_composes_and_its_parts_can_be_built(experiment, command):
    whole = composed(experiment, command)
    assert callable(function(whole.job))
    built = {name: build(whole[name], kind) for name, kind in PARTS.items() if whole.get(name) is not None}
    assert set(built) == (set(PARTS) if command.folder != "transfer" else {"patcher", "engine"})


def test_the_commands_are_those_of_the_whole_study():
    each = ["knockout", "edges", "evaluation", "roles", "stability"]
    expected = [f"nodes/{task}" for task in (*SENTENCES, "ioi")] + ["compare"]
    expected += [f"{kind}/{task}" for task in SENTENCES for kind in each] + ["cross_task", "transfer", ""]
    assert list(commands("tiny_gpt2")) == list(commands("tiny_llama")) == expected
    assert [folder for folder in commands("gpt2") if folder.startswith("nodes/")] == [f"nodes/{task}" for task in SENTENCES]
    assert [folder for folder in commands("llama2_7b") if folder.startswith("nodes/")] == [f"nodes/{task}" for task in BARE]


ZERO, CONDITIONAL = {"patcher._target_": "circuitkit.patchers.Zero"}, {"patcher.means": "conditional"}
LLAMA = {"model.name": "llama2_7b_chat", "model.dtype": "bfloat16", "model.device_map": "auto", "task.filter": False}
GPT2 = {"model.name": "gpt2", "task.bos": False, **CONDITIONAL}
CORRUPTIONS = ["random", "repeat_last", "repeat_all", "shuffled", "other_kind"]


@pytest.mark.parametrize(
    ("experiment", "folder", "prompts", "arrive"),
    [
        ("gpt2", "nodes/numerals", (), {**GPT2, "task.n": 512, "method.threshold": 0.8, "method.max_sweeps": None}),
        ("gpt2", "edges/numerals", (), {**GPT2, "task.n": 512, "method.circuit": f"{FOLDER}/nodes/numerals/circuit.json"}),
        ("gpt2", "evaluation/numerals", (), {**GPT2, "task.n": 512, "draws": 50, "circuit": f"{FOLDER}/nodes/numerals/circuit.json"}),
        ("gpt2", "stability/numerals", (), {**GPT2, "task.n": 128, "corruptions": CORRUPTIONS, "thresholds": [0.8, 0.7, 0.9]}),
        ("gpt2", "cross_task", (), {**GPT2, "tasks": list(SENTENCES), "controls": [str(SEQCONT / "circuits/ioi_gpt2.json")]}),
        ("gpt2", "transfer", (), {"model.name": "gpt2", "draws": 10, **ZERO}),
        ("llama2_7b", "nodes/bare_numerals", (), {**LLAMA, "task.n": 5, "method.max_sweeps": 1, "patcher.means": "plain"}),
        ("llama2_7b", "stability/bare_numerals", (), {**LLAMA, "orders": ["backward"], "thresholds": [0.8], "method.max_sweeps": 1}),
        ("llama2_7b", "cross_task", (), {**LLAMA, "tasks": list(BARE), "controls": []}),
        ("tiny_gpt2", "edges/months", (), {"model.name": "tiny_gpt2", "task.n": 64}),
        ("tiny_llama", "cross_task", (), {"model.name": "tiny_llama", "task.n": 64, "controls": [f"{FOLDER}/nodes/ioi/circuit.json"]}),
        ("gpt2", "edges/months", ("task.n=5",), {**GPT2, "task.n": 5}),
        ("gpt2", "stability/months", ("task.n=5",), {**GPT2, "task.n": 5}),
        ("gpt2", "roles/months", ("task.n=5",), {**GPT2, "task.n": 5}),
    ],
)
def test_settings_arrive(experiment, folder, prompts, arrive):
    whole = composed(experiment, commands(experiment, prompts)[folder])
    assert {key: OmegaConf.select(whole, key) for key in arrive} == arrive
    assert not whole.logger, "the folder is the only logger"


def test_the_transfer_removes_the_paper_s_sets_and_asks_its_questions():
    whole = composed("llama2_7b", commands("llama2_7b")["transfer"])
    assert list(whole.sets) == list(BARE[:3])
    assert set(paper.QUESTIONS) <= set(whole.question)


class Recorded:
    """Stands in for circuitkit: notes the commands, and leaves the files that they would; fails at a given one."""

    def __init__(self, fails_at=""):
        self.fails_at, self.folders = fails_at, []

    def __call__(self, arguments):
        place = next((Path(each.removeprefix("dir=")) for each in arguments if each.startswith("dir=")), None)
        self.folders.append("" if place is None else "/".join(place.parts[place.parts.index("out") + 1 :]))
        if place is None:
            return
        assert ("overwrite=true" in arguments) is (place.name != "compare")
        if self.folders[-1] == self.fails_at:
            sys.exit(2)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("circuit", "scores", "edges", "evaluation", "roles", "stability", "compare", "shared", "cross_task", "transfer"):
            (place / f"{name}.json").touch()


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "read", lambda folder: {"circuits": [{"task": "months", "score": 81}]})

    def run(fails_at="", prompts=()):
        recorded = Recorded(fails_at)
        monkeypatch.setattr(study, "circuitkit", recorded)
        try:
            study.run("tiny_gpt2", tmp_path / "out", prompts)
        except SystemExit as stop:
            return recorded.folders, stop.code
        return recorded.folders, None

    return run


def test_a_study_goes_on_where_it_stopped(run, tmp_path, capsys):
    whole = list(commands("tiny_gpt2"))
    stopped_at = whole.index("edges/numwords")
    assert run(fails_at="edges/numwords") == (whole[: stopped_at + 1], 2)
    assert not (tmp_path / "out/tables").exists()
    assert run() == (whole[stopped_at:], None)
    assert tables.load(tmp_path / "out/tables") == {"circuits": [{"task": "months", "score": "81"}]}
    assert run() == ([""], None), "only the report is made again"
    evaluations = [line for line in capsys.readouterr().out.splitlines() if "job=evaluate" in line]
    assert len(evaluations) == 3
    assert all(f"shared={tmp_path}/out/compare/shared.json" in line for line in evaluations)


def test_results_of_other_settings_are_not_taken_for_finished(run, tmp_path, monkeypatch):
    assert run(fails_at="nodes/numerals", prompts=["task.n=0"])[1] == 2, "which leaves no result that could be taken for another's"
    assert run(prompts=["task.n=8"])[1] is None
    folders, code = run(prompts=["task.n=4"])
    assert folders == []
    assert code.startswith(f"{tmp_path}/out holds a study with other settings, see study.yaml there.")
    assert run(prompts=["task.n=8"]) == ([""], None)
    shutil.copytree(study.CONF, tmp_path / "conf")
    changed = tmp_path / "conf/experiment/tiny_gpt2.yaml"
    changed.write_text(changed.read_text().replace("method.threshold=0.8", "method.threshold=0.7"))
    monkeypatch.setattr(study, "CONF", tmp_path / "conf")
    assert run(prompts=["task.n=8"])[0] == []


def test_a_folder_that_cannot_be_used_is_a_sentence(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    folders, code = run()
    assert folders == []
    assert code.startswith(f"Expected to be able to write into {tmp_path}/out, but:")


# Published circuits and the reference values


@pytest.mark.parametrize("family", SHAPES)
def test_published_circuits_are_read_and_fit(family):
    named = {path.stem.removeprefix(f"paper_{family}_"): path for path in (SEQCONT / "circuits").glob(f"paper_{family}_*.json")}
    reference = paper.REFERENCE["circuits"][family]
    assert named.keys() == reference.keys()
    for name, path in named.items():
        circuit = fitted(read(path), family, *SHAPES[family])
        assert [[node.layer, node.head] for node in circuit.heads] == sorted(reference[name]["heads"])
        assert [node.layer for node in circuit.mlps] == reference[name]["mlps"]


def test_the_control_is_the_published_ioi_circuit():
    circuit = fitted(read(SEQCONT / "circuits/ioi_gpt2.json"), "gpt2", 12, 12)
    assert sorted([node.layer, node.head] for node in circuit.heads) == sorted(paper.REFERENCE["circuits"]["ioi_heads_control"])
    assert (len(circuit.heads), len(circuit.mlps)) == (26, 12)


def test_reference_maps_have_gpt2_s_shape():
    for task in SENTENCES:
        assert [len(row) for row in paper.REFERENCE["full_knockout_head_pct"][task]] == [12] * 12
        assert len(paper.REFERENCE["full_knockout_mlp_pct"][task]) == 12


# Beside the paper


def published(task, family):
    name = task.removeprefix("bare_")
    entry = paper.REFERENCE["circuits"][family][name]
    nodes = [*(Node.of_head(*place) for place in entry["heads"]), *map(Node.of_mlp, entry["mlps"])]
    return Circuit(tuple(nodes), *SHAPES[family], family, paper.REFERENCE["circuit_score_pct"].get(name) if family == "gpt2" else 81.0)


def knocked_out(task):
    heads, mlps = (paper.REFERENCE[f"full_knockout_{kind}_pct"][task] for kind in ("head", "mlp"))
    values = {f"a{layer}.h{head}": value for layer, row in enumerate(heads) for head, value in enumerate(row)}
    return values | {f"m{layer}": value for layer, value in enumerate(mlps)}


def save_knockout(folder, task, values):
    (folder / "knockout" / task).mkdir(parents=True, exist_ok=True)
    (folder / "knockout" / task / "scores.json").write_text(Scores(values, "%", 12, 12, "gpt2").to_json())


def save_cross_task(folder, **cells):
    labels = {"numerals": "numerals", "numwords": "numwords", "months": "months", "ioi_gpt2": "ioi_heads_all_mlps"}
    rows = [[{"value": cells.get(f"{ours}_{task}", paper.REFERENCE["cross_task_pct"][name][task]), "low": 0.0, "high": 0.0}
             for task in SENTENCES] for ours, name in labels.items()]  # fmt: skip
    rows.append([{"value": 3.0, "low": 0.0, "high": 0.0}] * 3)
    body = {"model": "gpt2", "circuits": [*labels, "random like numerals"], "tasks": list(SENTENCES), "percent": rows}
    save_finding(Finding("cross_task", "", whole("cross_task", body)), folder / "cross_task")


def save_roles(folder, task, *, a9=0, m9=None):
    m9 = round(1000 * paper.REFERENCE["logit_lens_mlp9_switch_fraction"][task]) - a9 if m9 is None else m9
    best = paper.REFERENCE["ov_scores_head_9_1"].get(task, {})
    scores = {kind: {"a9.h1": best.get(kind, 1.0), "a0.h0": 99.0} for kind in ("copy", "next")}
    body = {"logit_lens": {"switch": {"a8": 2, "a9": a9, "m9": m9}, "n": 1000}, "ov": scores, "roles": {}}
    save_finding(Finding("roles", "", whole("roles", body)), folder / "roles" / task)


def save_transfer(folder, sets, change=0.0):
    table = paper.REFERENCE["llama2_7b_chat_zero_ablation_accuracy"]
    columns = [paper.SETS.get(column, "random like intersection") for column in table["columns"]]
    rows = {ours: zip(columns, table[theirs], strict=True) for ours, theirs in paper.QUESTIONS.items()}
    accuracy = {name: {label: {"mean": value + change} for label, value in row} for name, row in rows.items()}
    accuracy["month_problem"] = {"intersection": {"mean": 0.5}}
    listed = [{"label": label, "control": control} for label in [*sets, "intersection"] for control in (False, True)]
    listed = [each | {"label": f"random like {each['label']}"} if each["control"] else each for each in listed]
    body = {"model": "llama2_7b_chat", "accuracy": accuracy, "sets": listed}
    save_finding(Finding("transfer", "", whole("transfer", body)), folder / "transfer")


@pytest.fixture
def gpt2_study(tmp_path):
    """A finished study of gpt2 that found just what the paper has."""
    for task in SENTENCES:
        save(published(task, "gpt2"), tmp_path / "nodes" / task / "circuit.json")
        save_knockout(tmp_path, task, knocked_out(task))
        save_roles(tmp_path, task, a9=100)
    save_cross_task(tmp_path)
    return tmp_path


@pytest.fixture
def llama_study(tmp_path):
    """The same of llama2_7b."""
    for task in BARE:
        save(published(task, "llama2_7b_chat"), tmp_path / "nodes" / task / "circuit.json")
    save_transfer(tmp_path, BARE[:3])
    return tmp_path


def lines_of(folder):
    return {f"{line.table}: {line.what}": line for line in paper.compare(folder)}


def counted(lines):
    tables_of = [line.table for line in lines.values()]
    return {name: tables_of.count(name) for name in dict.fromkeys(tables_of)}


def check_agreement(lines):
    for line in lines.values():
        if line.paper is None:
            assert line.ours == pytest.approx(0.0 if "gap" in line.what else 1.0), line
        else:
            assert line.gap == pytest.approx(0.0), line


def test_what_equals_the_paper_has_no_gaps(gpt2_study):
    lines = lines_of(gpt2_study)
    check_agreement(lines)
    assert counted(lines) == {"knockout": 3 * (156 + 4), "circuit": 3 * 5, "cross_task": 4 * 3, "parts": 3 + 3}


def test_what_equals_the_paper_s_llama_has_no_gaps(llama_study):
    lines = lines_of(llama_study)
    check_agreement(lines)
    assert counted(lines) == {"circuit": 5 * 4, "transfer": 8 * 4}
    assert lines["transfer: numerals_plus_2 without intersection"].paper == 0.34


def test_gaps_of_gpt2(gpt2_study):
    """By hand: 13 heads of which 12 are found, and 2 others; a map of MLPs upside down; single cells."""
    months = published("months", "gpt2")
    nodes = {*months.nodes, Node.of_head(1, 5), Node.of_head(2, 2)} - {Node.of_head(10, 7)}
    save(Circuit(tuple(nodes), 12, 12, "gpt2", 79.0), gpt2_study / "nodes/months/circuit.json")
    values = knocked_out("numerals") | {f"m{layer}": 200 - knocked_out("numerals")[f"m{layer}"] for layer in range(12)}
    save_knockout(gpt2_study, "numerals", values | {"a7.h11": 62.9})
    save_cross_task(gpt2_study, numerals_months=100.0)
    save_roles(gpt2_study, "numerals", a9=100, m9=500)
    lines = lines_of(gpt2_study)
    assert lines["circuit: months, number of heads"].gap == 1
    assert lines["circuit: months, Jaccard of heads"].ours == pytest.approx(12 / 15)
    assert lines["circuit: months, Jaccard of MLPs"].ours == 1.0
    assert lines["circuit: months, score in %"].gap == pytest.approx(-1.3)
    assert lines["knockout: numerals, correlation over 12 MLPs"].ours == pytest.approx(-1.0)
    assert lines["knockout: numerals, largest gap of MLPs in points"].ours == pytest.approx(200 - 2 * 28.7)
    assert lines["knockout: numerals, largest gap of heads in points"].ours == pytest.approx(10.0)
    assert lines["knockout: numerals, a7.h11"].gap == pytest.approx(10.0)
    assert 0.9 < lines["knockout: numerals, correlation over 144 heads"].ours < 0.9999
    assert lines["cross_task: numerals on months"].gap == pytest.approx(100 - 113.53)
    assert lines["cross_task: months on numerals"].gap == pytest.approx(0.0)
    assert lines["parts: numerals, share that switches at a9 or m9"].gap == pytest.approx(0.6 - 0.997)


def test_gaps_of_llama(llama_study):
    save_transfer(llama_study, BARE[:3], change=0.25)
    lines = lines_of(llama_study)
    assert lines["transfer: addition_1_digit without bare_months"].ours == pytest.approx(0.33)
    assert {round(line.gap, 9) for line in lines.values() if line.table == "transfer"} == {0.25}


def test_another_intersection_is_not_held_against_the_paper_s(llama_study):
    save_transfer(llama_study, BARE)
    lines = lines_of(llama_study)
    assert counted(lines) == {"circuit": 20, "transfer": 8 * 3}
    assert not any("intersection" in name for name in lines)


def test_a_task_with_other_prompts_is_not_held_against_the_paper_s(gpt2_study):
    shutil.move(gpt2_study / "nodes/months", gpt2_study / "nodes/bare_months")
    assert not any(name.startswith("circuit") and "months" in name for name in lines_of(gpt2_study))


def test_parts_that_a_study_lacks_are_left_out(gpt2_study):
    for name in ("knockout", "cross_task", "roles/months"):
        shutil.rmtree(gpt2_study / name)
    assert counted(lines_of(gpt2_study)) == {"circuit": 15, "parts": 5}


@pytest.mark.parametrize(
    ("node", "sentence"), [("a3.h4", "all 144 heads of the paper, found 143"), ("m9", "all 12 MLPs of the paper, found 11")]
)
def test_an_incomplete_map_is_refused(gpt2_study, node, sentence):
    values = knocked_out("months")
    del values[node]
    save_knockout(gpt2_study, "months", values)
    with pytest.raises(UserError, match=sentence):
        paper.compare(gpt2_study)


def refused(folder):
    with pytest.raises(SystemExit) as stop:
        paper.main([str(folder)])
    assert isinstance(stop.value.code, str), "a sentence, which makes the exit code 1"
    assert "\n" not in stop.value.code
    assert not (folder / "compare_to_paper.csv").exists()
    return stop.value.code


def test_nothing_to_compare_is_a_sentence(tmp_path, capsys):
    assert "Run study.py first" in refused(tmp_path)
    assert "Run study.py first" in refused(tmp_path / "none")
    save(Circuit((Node.of_mlp(0),), 4, 8, "tiny_gpt2", 81.0), tmp_path / "nodes/months/circuit.json")
    assert "numbers for gpt2, llama2_7b_chat, and this study is of 'tiny_gpt2'" in refused(tmp_path)
    path = save(published("months", "gpt2"), tmp_path / "nodes/months/circuit.json")
    path.write_text(path.read_text()[:99])
    assert "is not a whole JSON file" in refused(tmp_path)
    assert capsys.readouterr().out == ""


def test_the_comparison_is_shown_and_written(gpt2_study, capsys):
    paper.main([str(gpt2_study)])
    shown = capsys.readouterr().out
    assert f"written: {gpt2_study}/compare_to_paper.csv" in shown
    assert "correlation over 144 heads" in shown
    assert "a7.h11" not in shown, "single heads are in the file alone"
    with (gpt2_study / "compare_to_paper.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == len(lines_of(gpt2_study))
    row = next(row for row in rows if row["what"] == "numerals, a7.h11")
    assert (row["table"], float(row["paper"]), float(row["ours"]), float(row["gap"])) == ("knockout", 52.9, 52.9, 0.0)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([(1, 2), (2, 4), (3, 6)], 1.0), ([(1, 3), (2, 2), (3, 1)], -1.0), ([(1, 1), (2, 3), (3, 2)], 0.5), ([(1, 5), (2, 5)], 0.0)],
)
def test_correlation(pairs, expected):
    assert paper.correlation(pairs) == pytest.approx(expected)


# Tables


FOUND = {
    "circuits": [
        {"task": "months", "score": 81.3, "members": "a0.h1 a0.h10 m0", "note": "x"},
        {"task": "numerals", "score": None, "members": ""},
    ],
    "empty": [],
    "transfer": [{"questions": "+1", "random like months": 0.5}, {"questions": "+2, or more", "solved": 3}],
}


@pytest.mark.parametrize(
    ("line", "stray"),
    [
        ("circuits,months,score,80,82", None),
        ("circuits,months,score,81.3,81.3", None),
        ("circuits,months,score,82,90", "circuits, months, score: found 81.3, expected 82 to 90."),
        ("circuits,months,score,70,81.2", "circuits, months, score: found 81.3, expected 70 to 81.2."),
        ("circuits,months,note,1,2", "circuits, months, note: found x, expected 1 to 2."),
        ("circuits,months,none,1,2", "circuits, months, none: nothing was found, expected 1 to 2."),
        ("circuits,days,score,1,2", "circuits, days, score: nothing was found, expected 1 to 2."),
        ("none,months,score,1,2", "none, months, score: nothing was found, expected 1 to 2."),
        ("circuits,numerals,score,-1,1", "circuits, numerals, score: nothing was found, expected -1 to 1."),
        ("circuits,months,members,a0.h1,", None),
        ("circuits,months,members,a0.h,", "circuits, months, members: a0.h is not in a0.h1 a0.h10 m0."),
        ("circuits,months,members,m1,", "circuits, months, members: m1 is not in a0.h1 a0.h10 m0."),
        ("circuits,numerals,members,m0,", "circuits, numerals, members: nothing was found, expected m0."),
        ("transfer,+1,random like months,0.4,0.6", None),
    ],
)
def test_strays(tmp_path, line, stray):
    (tmp_path / "expected.csv").write_text(f"table,row,column,low,high\ncircuits,months,members,m0,\n{line}\n")
    tables.write(FOUND, tmp_path / "tables")
    for found in (FOUND, tables.load(tmp_path / "tables")):
        assert tables.strays(found, tmp_path / "expected.csv") == ([] if stray is None else [stray])


def test_tables_are_written_and_read(tmp_path):
    paths = tables.write(FOUND, tmp_path / "tables")
    assert [path.name for path in paths] == ["circuits.csv", "transfer.csv"], "a table without rows is no file"
    assert tables.load(tmp_path / "tables") == {
        "circuits": [
            {"task": "months", "score": "81.3", "members": "a0.h1 a0.h10 m0", "note": "x"},
            {"task": "numerals", "score": "", "members": "", "note": ""},
        ],
        "transfer": [
            {"questions": "+1", "random like months": "0.5", "solved": ""},
            {"questions": "+2, or more", "random like months": "", "solved": "3"},
        ],
    }
    before = {path: path.read_bytes() for path in paths}
    tables.write(tables.load(tmp_path / "tables"), tmp_path / "tables")
    assert {path: path.read_bytes() for path in paths} == before


def entry(label, value, control_of=None):
    return {"label": label, "score": {"value": value, "low": 0.0, "high": 1.0}, "control_of": control_of}


def test_tables_say_what_the_findings_say(tmp_path):
    save(Circuit(tuple(map(Node.parse, ("a0.h1", "m0", "m1"))), 2, 2, "tiny", 81.0), tmp_path / "nodes/months/circuit.json")
    drops = {"m0": 60.04, "a0.h1": 70.06, "m1": -1.0}
    removed = [entry("months", 1.111), entry("random like months", 50.0, "months")]
    removed += [entry("the shared set", 2.0), entry("months, heads only", 3.0), entry("random heads", 60.0, "months, heads only")]
    evaluation = {
        "circuit": {"label": "months"},
        "score": {"value": 81.006, "low": 75.0, "high": 86.0},
        "random_circuits": {"mean": 1.0, "share_as_good": 1 / 21},
        "random_head": {"mean_drop": 8.5},
        "removed_from_circuit": {name: {"drop": drop} for name, drop in drops.items()},
        "sets_removed_from_model": removed,
    }
    edges = {"edges": {"m0->m1": 50.0, "a0.h1->m0": 20.0, "m0->logits": 99.0}, "kept": ["m0->m1"], "dropped_nodes": ["m1"]}
    roles = {
        "roles": {"induction": {"scores": {"a0.h0": 0.1, "a0.h1": 0.9}, "found": ["a0.h1"]}},
        "logit_lens": {"switch": {"m0": 3, "m1": 5}, "switch_site": "m1", "n": 10},
        "ov": {"copy": {"a0.h0": 1.0, "a0.h1": 2.0}, "next": {"a0.h0": 4.0, "a0.h1": 3.0}, "mean_copy": 1.5, "mean_next": 3.5},
        "attribution": {"nodes": {"m0": -3.0, "m1": 2.0}, "total": -1.0},
    }
    stability = {"runs": [{}, {}], "mean_jaccard": {"all": 2 / 3, "seed": None}, "survive_corruptions": ["m0", "m1"], "survive_all": ["m0"]}
    pair = {"a": "months", "b": "days", "shared": 2, "jaccard": 2 / 3, "containment": None, "p_value": 1.234e-9}
    percent = [[{"value": 81.0}, {"value": 5.0}], [{"value": -2.0}, {"value": 1.0}]]
    accuracy = {"+1": {"months": {"mean": 0.25}, "random like months": {"mean": 1 / 3}}}
    of_task = {"evaluation": evaluation, "edges": edges | {"node_score": 81.0, "score": 78.0}, "roles": roles, "stability": stability}
    of_all = {
        "compare": {"pairs": [pair], "shared_by_all": ["m0", "m1"]},
        "cross_task": {"circuits": ["months", "ioi"], "tasks": ["months", "days"], "percent": percent},
        "transfer": {"tasks": [{"name": "+1", "asked": 5, "solved": 4}], "accuracy": accuracy},
    }
    for kind, body in of_task.items():
        save_finding(Finding(kind, "", whole(kind, body)), tmp_path / kind / "months")
    for kind, body in of_all.items():
        save_finding(Finding(kind, "", whole(kind, body)), tmp_path / kind)
    assert tables.read(tmp_path) == {
        "circuits": [{
            "task": "months", "heads": 1, "mlps": 2, "score": 81.01, "low": 75.0, "high": 86.0,
            "random_circuits": 1.0, "share_as_good": 0.048, "random_head_drop": 8.5,
            "model_without_circuit": 1.11, "model_without_shared": 2.0, "model_without_circuit_heads_only": 3.0,
            "dearest": "a0.h1:70.1 m0:60.0 m1:-1.0", "members": "a0.h1 m0 m1",
        }],
        "edges": [{
            "task": "months", "edges": 3, "kept": 1, "dropped_nodes": "m1", "node_score": 81.0, "pruned_score": 78.0,
            "dearest": "a0.h1->m0:20.0 m0->m1:50.0 m0->logits:99.0",
        }],
        "parts": [{
            "task": "months", "switch_site": "m1", "switched_there": 0.5, "logit_difference": -1.0, "attribution": "m0:-3.00 m1:2.00",
            "ov_copy": "a0.h1:2 a0.h0:1", "ov_copy_mean": 1.5, "ov_next": "a0.h0:4 a0.h1:3", "ov_next_mean": 3.5,
        }],
        "roles": [{"row": "months/induction", "best_score": 0.9, "best": "a0.h1:0.90 a0.h0:0.10", "found": "a0.h1"}],
        "stability": [{
            "task": "months", "runs": 2, "jaccard_all": 0.667, "jaccard_seed": None, "survive_corruptions": "m0 m1", "survive_all": "m0",
        }],
        "compare": [
            {"pair": "months&days", "shared": 2, "jaccard": 0.6667, "containment": None, "p_value": "1.2e-09"},
            {"pair": "all", "shared": 2, "members": "m0 m1"},
        ],
        "cross_task": [{"circuit": "months", "months": 81.0, "days": 5.0}, {"circuit": "ioi", "months": -2.0, "days": 1.0}],
        "transfer": [{"questions": "+1", "solved": 4, "asked": 5, "months": 0.25, "random like months": 0.333}],
    }  # fmt: skip


def test_tables_of_a_study_that_has_not_begun(tmp_path):
    assert not any(tables.read(tmp_path).values())


# Committed results


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_RESULTS_ARE_COMMITTED(model):
    """The tables of the two studies that anybody can run are kept in experiments/seqcont/results/<model>, with the ranges expected."""
    assert (RESULTS / model / "expected.csv").is_file()
    assert {"circuits", "edges", "compare", "cross_task", "stability", "transfer"} <= set(tables.load(RESULTS / model))


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/expected.csv")), ids=lambda path: path.name)
def test_committed_results_lie_within_the_expected_ranges(folder):
    lines = tables.load(folder)["expected"]
    assert {line["table"] for line in lines} >= {"circuits", "cross_task"}, "ranges that say nothing of the circuits say nothing"
    assert tables.strays(tables.load(folder), folder / "expected.csv") == []


def test_a_search_that_was_stopped_is_gone_on_with(tmp_path):
    command = study.Command("nodes/months", ("task=months",), "circuit.json")
    anew = ["--config-dir", str(study.CONF), "+experiment=tiny_gpt2", "task=months", f"dir={tmp_path}", "overwrite=true"]
    assert study._arguments(command, tmp_path, "tiny_gpt2") == anew
    (tmp_path / "config.yaml").write_text("task: {}")
    assert study._arguments(command, tmp_path, "tiny_gpt2") == anew, "stopped before its first decision"
    (tmp_path / "journal.jsonl").write_text("{}")
    assert study._arguments(command, tmp_path, "tiny_gpt2") == [f"resume={tmp_path}"]
