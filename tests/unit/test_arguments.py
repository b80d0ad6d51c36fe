"""What is typed, in any order and any script."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from circuitkit.arguments import arranged, readable
from circuitkit.core.errors import ConfigError
from circuitkit.jobs.folders import leave_no_log_alone, not_writable


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("patcher=half --config-dir ./myconf allow_targets=[x]", "patcher=half allow_targets=[x] --config-dir ./myconf"),
        ("task=months -m method=a,b", "task=months method=a,b -m"),
        ("-m task=a", "task=a -m"),
        ("--config-dir=x ~callback.progress +a=1", "~callback.progress +a=1 --config-dir=x"),
        ("--info a=b", "a=b --info"),
        ("--info config a=b", "a=b --info config"),
        ("--cfg job a=b --resolve", "a=b --cfg job --resolve"),
        ("a=-1 -cd x b=--y", "a=-1 b=--y -cd x"),
        ("~logger a=b", "logger=jsonl a=b"),
        ("~logger.wandb", "~logger.wandb"),
        ("--config-dir", "--config-dir"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_overrides_come_first(typed, read):
    assert arranged(typed.split()) == read.split()


@pytest.mark.parametrize("typed", ["--experimental-rerun x.pickle", "a=b --experimental-rerun=x.pickle"])
def test_a_pickle_is_not_opened(typed):
    with pytest.raises(ConfigError, match="opens a pickle, which can run code"):
        arranged(typed.split())


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=日本", "日本"),
        ("name=日本 語", "日本 語"),
        ("+name=é=b", "é=b"),
        ("name=${task}é", "${task}é"),
        ("dir=/home/josé/x:y", "/home/josé/x:y"),
        ("name='é'", "é"),
        ("tags=[é, b]", ["é", "b"]),
        ("tags=[\"é,b\",c d,ü x]", ["é,b", "c d", "ü x"]),
        ("sets={a: é, b: [1, ü]}", {"a": "é", "b": [1, "ü"]}),
        ("method.threshold=0.8", 0.8),
        ("a=[1,2]", [1, 2]),
        ("a=", ""),
    ],
)  # fmt: skip
def test_text_in_any_script_is_read_as_it_is_written(override, value):
    assert OverridesParser.create().parse_override(readable(override)).value() == value


def test_several_values_stay_several():
    read = OverridesParser.create().parse_override(readable("name=é,b"))
    assert [OverridesParser.create().parse_override(f"name={each}").value() for each in read.sweep_string_iterator()] == ["é", "b"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\'\",[](){}$\n", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_text_that_is_not_ascii_arrives(text):
    text = f"é{text.strip()}é"
    assert OverridesParser.create().parse_override(readable(f"name={text}")).value() == text


# Folders of commands that were refused


def test_only_a_folder_that_holds_nothing_but_its_log_goes(tmp_path):
    for name, files in {"runs/a": ["run.log"], "runs/b": ["run.log", "status.json"], "runs/c": []}.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            (tmp_path / name / file).write_text("x")
        leave_no_log_alone(tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["b", "c"]


def test_an_empty_folder_of_runs_goes_too(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.log").write_text("x")
    leave_no_log_alone(tmp_path / "runs/a")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        (tmp_path / "file/run").mkdir()
    assert "file/run cannot be made (Not a directory). Choose another one with dir=" in str(not_writable(caught.value))
    wrapped = ValueError("Unable to configure handler 'file'")
    wrapped.__cause__ = caught.value
    assert isinstance(not_writable(wrapped), ConfigError)
    assert not_writable(ValueError("x")) is None and not_writable(OSError("no name")) is None
