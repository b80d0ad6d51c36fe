"""A model is handed to the next job only if the last one left nothing behind in it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from models_for_tests import tiny_model

from circuitkit.core.errors import ConfigError
from circuitkit.jobs.finished import Finished
from circuitkit.jobs.model_shelf import ModelShelf
from circuitkit.jobs.objectives import Number, SizeAbove


@pytest.fixture
def shelf():
    return ModelShelf()


def load():
    return tiny_model("gpt2")


def leave_hook(hf):
    hf.register_forward_hook(lambda *_: None)


def leave_training(hf):
    hf.get_submodule("transformer.h.1.mlp").train()


def leave_gradient(hf):
    hf.lm_head.weight.grad = torch.zeros_like(hf.lm_head.weight)


def leave_requires_grad(hf):
    next(hf.parameters()).requires_grad_(not next(hf.parameters()).requires_grad)


def leave_weight(hf):
    hf.transformer.h[0].mlp.c_fc.weight.data[3, 1] += 1e-3  # past autograd's own counter


def leave_buffer(hf):
    hf.register_buffer("left_over", torch.zeros(2))


LEAKS = {
    leave_hook: "hooks of the model",
    leave_training: "training flag of transformer.h.1.mlp",
    leave_gradient: "gradients of",
    leave_requires_grad: "gradients of",
    leave_weight: "values of transformer.h.0.mlp.c_fc.weight",
    leave_buffer: "left_over",
}


def test_a_clean_model_is_used_again(shelf):
    first = shelf.take("a", load)
    first.run(torch.zeros(1, 3, dtype=torch.long), lambda layer: layer.z)
    assert shelf.take("a", load) is first


def test_another_model_takes_its_place(shelf):
    first = shelf.take("a", load)
    second = shelf.take("b", load)
    assert second is not first
    assert shelf.take("a", load) is not first


@pytest.mark.parametrize(("leak", "told"), LEAKS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_model_with_something_left_behind_is_loaded_again(shelf, leak, told, caplog):
    first = shelf.take("a", load)
    leak(first.hf)
    with caplog.at_level(logging.WARNING):
        again = shelf.take("a", load)
    assert again is not first
    assert told in caplog.text
    assert shelf.take("a", load) is again


def run_folder(root, name, content_hash, status="finished"):
    folder = root / name
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"status": status}))
    (folder / "circuit.json").write_text(json.dumps({"provenance": {"content_hash": content_hash}}))
    return folder


def test_the_index_only_says_where_to_look(tmp_path):
    finished = Finished(tmp_path / "root")
    assert finished.find("abc") is None
    folder = run_folder(tmp_path, "run", "abc")
    finished.add("abc", folder)
    assert finished.find("abc") == folder
    assert finished.find("ab") is None
    (folder / "circuit.json").write_text(json.dumps({"provenance": {"content_hash": "other"}}))
    assert finished.find("abc") is None, "the circuit file decides"
    run_folder(tmp_path, "stopped", "abc", status="interrupted")
    finished.add("abc", tmp_path / "stopped")
    assert finished.find("abc") is None, "a run that was stopped is none that finished"


def test_an_index_with_torn_lines_and_lost_runs_still_serves(tmp_path):
    finished = Finished(tmp_path)
    finished.add("abc", run_folder(tmp_path, "run", "abc"))
    with (tmp_path / "finished.jsonl").open("a") as file:
        file.write('{"content_hash": "abc", "fol\n["abc"]\n{"content_hash": "abc", "folder": "gone"}\n')
    assert finished.find("abc") == tmp_path / "run"
    (tmp_path / "finished.jsonl").write_bytes(b"\xff\xfe")
    assert finished.find("abc") is None


def test_objectives():
    numbers = {"circuit/score": 82.0, "circuit/size": 7, "model": "tiny"}
    assert Number("circuit/size").value(numbers) == 7.0
    assert SizeAbove(82).value(numbers) == 7.0
    far, near = SizeAbove(95).value(numbers), SizeAbove(83).value(numbers)
    assert far > near > 1000
    with pytest.raises(ConfigError, match=r"named 'circuit/sise'. Did you mean 'circuit/size'"):
        Number("circuit/sise").value(numbers)
