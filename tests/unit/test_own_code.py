"""A model's own Python code: refused unasked, left aside or run as asked, told, and part of what a result depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from models_for_tests import planted_prompts
from transformers import dynamic_module_utils

from circuitkit.core.errors import ModelError
from circuitkit.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models.loading import load_model, load_shape
from circuitkit.patchers import Mean
from circuitkit.results import run_info
from circuitkit.tasks import Days

sys.path.insert(0, str(Path(__file__).parent))
from test_loading import IDS, edit_config, save  # noqa: E402

DOUBLED = """
from transformers import LlamaForCausalLM
from .factor import FACTOR


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = FACTOR * out.logits
        return out
"""
FILES = {"modeling_own.py": DOUBLED, "factor.py": "FACTOR = 2.0\n"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A llama whose own code doubles its logits."""
    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:  # of another test's folder
        monkeypatch.delitem(sys.modules, name)
    save(tmp_path / "own", vocab_size=24)
    for name, text in FILES.items():
        (tmp_path / "own" / name).write_text(text)
    edit_config(tmp_path / "own", auto_map={"AutoModelForCausalLM": "modeling_own.Doubled"})
    return tmp_path / "own"


def test_it_is_not_run_unasked(folder):
    for load in (load_model, load_shape):
        with pytest.raises(ModelError, match=r"Python code .* say model\.trust_remote_code=true\. .*trust_remote_code=false takes"):
            load(path=folder)


def test_it_is_run_or_left_aside_as_asked(folder, caplog):
    with caplog.at_level(logging.INFO, "circuitkit"):
        plain = load_model(path=folder, trust_remote_code=False)
    assert "left aside" in caplog.text and plain.origin == {} and type(plain.hf).__name__ == "LlamaForCausalLM"
    caplog.clear()
    own = load_model(path=folder, trust_remote_code=True)
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    assert own.origin == {"own_code": digests}
    assert caplog.records[0].levelname == "WARNING" and digests["modeling_own.py"][:12] in caplog.text
    assert torch.equal(own.run(IDS, lambda layer: None, keep=0), 2 * plain.run(IDS, keep=0))


def provenance(model):
    parts = {"task": Days(), "patcher": Mean(), "metric": LogitDiff()}
    return run_info("it", PackedEngine(model, planted_prompts(), *list(parts.values())[1:]), parts, None).provenance


def test_another_code_is_another_result(folder):
    plain, own = (provenance(load_model(path=folder, trust_remote_code=trust)) for trust in (False, True))
    assert plain["model"]["fingerprint"] == own["model"]["fingerprint"] and "own_code" not in plain["model"]
    assert set(own["model"]["own_code"]) == set(FILES)
    (folder / "factor.py").write_text("FACTOR = 3.0\n")
    other = provenance(load_model(path=folder, trust_remote_code=True))
    assert len({each["content_hash"] for each in (plain, own, other)}) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: edit_config(folder, auto_map={"AutoModelForCausalLM": "lab/else--modeling_own.Doubled"}), "in another repository"),
        (lambda folder: [(folder / name).unlink() for name in FILES], "and holds none"),
        (lambda folder: (folder / "factor.py").write_text("raise ZeroDivisionError('there')"), "ZeroDivisionError: there"),
        (lambda folder: edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Tripled"}), "cannot load .*Tripled"),
    ],
)
def test_code_that_cannot_be_run(folder, change, sentence):
    change(folder)
    with pytest.raises(ModelError, match=sentence):
        load_model(path=folder, trust_remote_code=True)


def test_code_of_the_tokenizer_alone_counts_too(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": [None, "lab/else--tokens.Own"]}}))
    edit_config(folder, auto_map=None)
    with pytest.raises(ModelError, match="in another repository"):
        load_model(path=folder, trust_remote_code=True)
