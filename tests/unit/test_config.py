"""The YAML files, and how they become objects."""

import inspect
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from circuitkit import config as ckconfig
from circuitkit.config import build, build_each, conf_dir, function, in_words
from circuitkit.core.errors import ConfigError, UserError
from circuitkit.engine import Engine, PackedEngine
from circuitkit.engine.units import Units
from circuitkit.methods import IterativePruning, Method
from circuitkit.metrics import LogitDiff, Metric
from circuitkit.patchers import Mean, Patcher, Zero
from circuitkit.tasks import Task

CONF = Path(__file__).parents[2] / "conf"
BASES = {"task": Task, "patcher": Patcher, "metric": Metric, "method": Method, "engine": Engine, "units": Units}

# What a file cannot be built without.
NEEDS = {
    "method/edge_pruning": ["method.circuit=a.json"],
    "method/random_circuit": ["method.n_heads=3", "method.n_mlps=1"],
    "task/from_file": ["task.path={tmp}/prompts.jsonl"],
    "model/local": ["model.path={tmp}"],
    "job/compare": ["circuits=[a.json,b.json]"],
    "job/cross_task": ["circuits=[a.json]"],
    "job/evaluate": ["circuit=a.json"],
    "job/report": ["run=runs/demo"],
    "job/transfer": ["sets={{a: a.json}}"],
    "units/features": ["units.dictionaries=[layer_0.safetensors]"],
}
PROMPT = '{"clean": "a b", "corrupt": "a c", "answer": " c", "wrong": " d"}\n'


def choices():
    files = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
    return [name for name in files if not name.startswith("hydra/")]


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        whole = compose("config", overrides=["hydra.job.num=0", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(whole)
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    OmegaConf.set_struct(whole, True)
    return whole


def overrides_for(name, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(PROMPT)
    group, _, choice = name.partition("/")
    if group == "question":  # no other job asks any
        return [*overrides_for("job/transfer", tmp_path), f"question={choice}"]
    return [f"{group}={choice}", *(need.format(tmp=tmp_path) for need in NEEDS.get(name, ()))]


def test_the_checkout_s_own_conf_is_found():
    assert conf_dir() == CONF


def test_missing_conf_names_both_places(monkeypatch, tmp_path):
    monkeypatch.setattr(ckconfig, "__file__", str(tmp_path / "pkg" / "config.py"))
    with pytest.raises(ConfigError, match="configuration files are missing") as caught:
        conf_dir()
    assert str(tmp_path / "conf") in str(caught.value)
    assert str(tmp_path / "pkg" / "conf") in str(caught.value)


@pytest.mark.parametrize("name", choices())
def test_every_file_says_what_it_is(name):
    lines = [line for line in (CONF / f"{name}.yaml").read_text().splitlines() if "@package" not in line]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 12


@pytest.mark.parametrize("name", choices())
def test_every_file_composes_and_can_be_built(name, tmp_path):
    whole = composed(*overrides_for(name, tmp_path))
    assert OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)["name"]
    assert callable(function(whole.job))
    group = name.partition("/")[0]
    if group in BASES:
        made = build(whole[group], BASES[group])
        kind = made.func if isinstance(made, partial) else type(made)
        assert issubclass(kind, BASES[group])
        check_defaults(name, OmegaConf.to_container(whole[group], resolve=True), kind)


def check_defaults(name, settings, kind):
    """A default is written twice, in the YAML for the reader and in the code; they must not drift apart."""
    parameters = inspect.signature(kind).parameters
    given = {need.partition("=")[0].partition(".")[2] for need in NEEDS.get(name, ())}
    for key, value in settings.items():
        if key in parameters and key not in given:
            default = parameters[key].default
            if isinstance(value, dict) and "_target_" in value:
                default, value = default, build(OmegaConf.create(value), object)
            assert (list(default) if isinstance(default, tuple) else default) == value, f"{name}: {key}"


def node(**settings):
    return OmegaConf.create({"patcher": settings, "allow_targets": []}).patcher


def test_build_makes_what_the_settings_say():
    made = build(node(_target_="circuitkit.patchers.Mean", pool="group"), Patcher)
    assert isinstance(made, Mean)
    assert made.pool == "group"
    assert build({"_target_": "circuitkit.methods.IterativePruning"}, Method, threshold=0.5).threshold == 0.5


def test_build_makes_factories():
    made = build(node(_target_="circuitkit.engine.PackedEngine", _partial_=True, max_rows=7), Engine)
    assert made.func is PackedEngine
    assert made.keywords == {"max_rows": 7}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, r"patcher needs a _target_, the dotted name of a Patcher"),
        ({"_target_": "circuitkit.metrics.LogitDiff"}, r"patcher\._target_ .* makes a LogitDiff\. Expected a Patcher"),
        ({"_target_": "circuitkit.patchers.Nope"}, r"patcher\._target_ is 'circuitkit\.patchers\.Nope', which cannot be loaded"),
        ({"_target_": "os.system", "command": "true"}, r"outside of circuitkit\. .* allow_targets=\[os\]"),
        ({"_target_": "circuitkitten.Patcher"}, r"outside of circuitkit"),
        ({"_target_": "circuitkit.patchers.Mean", "inner": {"_target_": "os.getcwd"}}, r"patcher\.inner\._target_ is 'os\.getcwd'"),
        ({"_target_": "circuitkit.patchers.Mean", "inner": [{"_target_": "os.getcwd"}]}, r"patcher\.inner\[0\]\._target_"),
        ({"_target_": "circuitkit.patchers.Mean", "pol": "all"}, r"no field of patcher \(Mean\) named 'pol'\. Did you mean 'pool'\?"),
        ({"_target_": "circuitkit.patchers.Mean", "pool": 3}, r"patcher\.pool is 3, a int\. Expected one of group, all"),
        ({"_target_": "circuitkit.patchers.Mean", "pool": "some"}, r"patcher\.pool is 'some', a str. Expected one of group, all"),
        ({"_target_": "circuitkit.patchers.Mean", "pool": "???"}, r"patcher\.pool must be given"),
        ({"_target_": "circuitkit.core.universe.NodeUniverse", "n_heads": 3}, r"makes a NodeUniverse\. Expected a Patcher"),
        ({"_target_": "circuitkit.tasks.FromFile"}, r"makes a FromFile\. Expected a Patcher"),
    ],
)
def test_build_refuses_in_a_sentence(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(node(**settings), Patcher)


@pytest.mark.parametrize(("value", "fits"), [(1, True), (0.5, True), ("0.5", False), (True, False), (None, False)])
def test_numbers_are_numbers(value, fits):
    settings = {"_target_": "circuitkit.methods.IterativePruning", "threshold": value}
    if fits:
        assert isinstance(build(settings, Method), IterativePruning)
    else:
        with pytest.raises(ConfigError, match=r"threshold is .* Expected a number"):
            build(settings, Method)


def test_other_packages_must_be_allowed():
    assert build({"_target_": "collections.Counter"}, dict, allow_targets=["collections"]) == {}
    with pytest.raises(ConfigError, match=r"allow_targets=\[collections\]"):
        build({"_target_": "collections.Counter"}, dict)


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match=r"\(FromFile\) needs path\. Set it with"):
        build({"_target_": "circuitkit.tasks.FromFile"}, Task)


def test_build_each_takes_one_or_several_or_none():
    zero, mean = {"_target_": "circuitkit.patchers.Zero"}, {"_target_": "circuitkit.patchers.Mean"}
    both = build_each(OmegaConf.create({"a": zero, "b": None, "c": mean}), Patcher)
    assert [type(each) for each in both] == [Zero, Mean]
    assert [type(each) for each in build_each(OmegaConf.create(zero), Patcher)] == [Zero]
    assert build_each(OmegaConf.create({}), Patcher) == []
    assert build_each(None, Patcher) == []


def test_a_bug_in_a_constructor_stays_a_bug(monkeypatch):
    monkeypatch.setattr(LogitDiff, "__init__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build({"_target_": "circuitkit.metrics.LogitDiff"}, Metric)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task=montsh", r"There is no task named 'montsh'\. Did you mean 'months'\? Choices: .*numerals"),
        ("tsk=months", r"There is no setting named 'tsk'\. Did you mean 'task'\?"),
        ("method.treshold=1", r"There is no setting of method named 'treshold'\. Did you mean 'threshold'\?"),
        ("method.threshold", r"The setting 'method\.threshold' cannot be read"),
        ("method.keep=[a", r"cannot be read"),
        ("task.n=1,2", r"task\.n=1,2 has several values, and this is no sweep\. Add -m"),
        ("~nothing", r"nothing"),
        ("foo/bar=1", r"no setting named 'foo/bar'"),
    ],
)
def test_hydra_s_errors_become_sentences(override, sentence):
    with pytest.raises(HydraException) as caught:
        composed(override)
    known = in_words(caught.value)
    assert isinstance(known, ConfigError)
    assert "\n" not in str(known)
    with pytest.raises(ConfigError, match=sentence):
        raise known


def test_only_their_errors_are_put_in_words():
    assert in_words(ZeroDivisionError("x")) is None
    error = UserError("x")
    assert in_words(error) is error
