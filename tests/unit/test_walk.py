"""The walk of one value from a setting to a tensor, as the engine room tells it: at most nine files, and these are they."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch
from models_for_tests import MICRO_PROMPTS, micro_model

import circuitkit
from circuitkit import engine
from circuitkit.config import build, conf_dir
from circuitkit.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Patcher

PACKAGE = Path(circuitkit.__file__).parent
STEPS = re.findall(r"^(\d)\. ``([^`]+)``(?: ``(\w+)``)?", engine.__doc__, re.M)
# Named behind the list: it hands the value on as it is.
BESIDE = {"patchers/base.py"}


def names_in(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_step_is_there():
    assert [int(number) for number, _, _ in STEPS] == list(range(1, len(STEPS) + 1)) and 5 < len(STEPS) <= 9
    (_, setting, _), *code = STEPS
    assert "circuitkit.patchers.Mean" in (conf_dir() / setting.removeprefix("conf/")).read_text()
    for _, file, name in code:
        assert name in names_in(PACKAGE / file), f"{file} has no {name}"


def test_the_value_passes_these_files_and_no_others():
    """Every function of the package that is given the values of a layer's heads, or gives them, lies in a file of the walk."""
    patcher = build({"_target_": "circuitkit.patchers.Mean", "means": "plain", "pool": "all"}, Patcher)
    engine_here = PackedEngine(micro_model(), MICRO_PROMPTS, patcher, LogitDiff())
    engine_here.prepare()
    value = engine_here.plain.heads(0, None, slice(0, 1))
    assert value[0, -1].amax(-1).tolist() == [2.0, 2.0], "the mean of 1 and 3, for both heads"
    held, seen = value.untyped_storage().data_ptr(), set()

    def told(frame, event, given):
        path = Path(frame.f_code.co_filename)
        if event in ("call", "return") and path.is_relative_to(PACKAGE):
            values = [given] if event == "return" else [*frame.f_locals.values()]
            if any(isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() == held for each in values):
                seen.add(path.relative_to(PACKAGE).as_posix())

    mask = engine_here.universe.without(engine_here.universe.full(), ["a0.h0"])
    sys.setprofile(told)
    try:
        engine_here.score(mask[None])
    finally:
        sys.setprofile(None)
    assert seen and seen <= {file for _, file, _ in STEPS} | BESIDE
