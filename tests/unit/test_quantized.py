"""Weights in 4 and 8 bits: heads still sum up, no row depends on its neighbours, and what needs plain matrices refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from circuitkit.analysis.direct_attribution import direct_attribution
from circuitkit.analysis.ov_scores import ov_scores
from circuitkit.core.errors import ModelError
from circuitkit.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models import quantized
from circuitkit.models.linear import matrix_of
from circuitkit.models.loading import load_model
from circuitkit.models.slices import HeadSlices
from circuitkit.patchers import Resample, Zero

sys.path.insert(0, str(Path(__file__).parent))
from models_for_tests import planted_prompts  # noqa: E402
from test_loading import IDS, edit_config, save  # noqa: E402

KINDS = ("bnb_4bit", "bnb_8bit")


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "tiny", vocab_size=24, hidden_size=64, intermediate_size=128)
    return tmp_path / "tiny"


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return request.param


def test_a_quantised_model_is_near_the_whole_one(folder, kind):
    whole, model = load_model(path=folder, device_map="cpu"), load_model(path=folder, device_map="cpu", quantization=kind)
    assert type(model.module(0, "out_proj")).__name__ == {"bnb_4bit": "Linear4bit", "bnb_8bit": "Linear8bitLt"}[kind]
    logits, exact = model.run(IDS, keep=0), whole.run(IDS, keep=0)
    assert 0 < (logits - exact).abs().max() / exact.std() < {"bnb_4bit": 1.5, "bnb_8bit": 0.2}[kind]
    assert torch.equal(model.run(IDS, lambda layer: None, keep=0), logits)
    assert model.origin == {"quantization": kind} and model.fingerprint() != whole.fingerprint()


def test_no_row_depends_on_the_rows_beside_it(folder, kind):
    model = load_model(path=folder, device_map="cpu", quantization=kind)
    both, alone = model.run(IDS, keep=0), model.run(IDS[:1], keep=0)
    assert torch.allclose(both[:1], alone, atol=1e-6)


def test_the_engine_scores_what_the_oracle_scores(folder, kind):
    model, prompts = load_model(path=folder, device_map="cpu", quantization=kind), planted_prompts()
    engine = PackedEngine(model, prompts, Zero(), LogitDiff())
    full = engine.universe.full()
    masks = torch.stack([full, engine.universe.without(full, ["a1.h2"]), engine.universe.without(full, ["m0", "a0.h1"])])
    assert torch.allclose(engine.score(masks), engine.oracle.score(masks), atol=1e-4)


def test_what_needs_plain_matrices_refuses(folder, kind):
    model = load_model(path=folder, device_map="cpu", quantization=kind)
    with pytest.raises(ModelError, match="quantised"):
        matrix_of(model.module(0, "out_proj"))
    assert not HeadSlices.possible(model)


def test_in_eight_bits_what_needs_single_heads_refuses(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, prompts = load_model(path=folder, device_map="cpu", quantization="bnb_8bit"), planted_prompts()
    engine = PackedEngine(model, prompts, Zero(), LogitDiff())
    for asks in (engine.edges, lambda: direct_attribution(model, prompts), lambda: ov_scores(model, prompts)):
        with pytest.raises(ModelError, match="in 8 bits the output projection rounds all heads of a position together"):
            asks()


def test_in_four_bits_edges_are_those_of_the_oracle(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_model(path=folder, device_map="cpu", quantization="bnb_4bit")
    edges = PackedEngine(model, planted_prompts(), Zero(), LogitDiff()).edges(patcher=Resample())
    masks = edges.universe.full().repeat(2, 1)
    masks[1, ::7] = False
    assert torch.allclose(edges.score(masks), edges.oracle.score(masks), atol=1e-4)


def test_in_four_bits_heads_sum_up(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_model(path=folder, device_map="cpu", quantization="bnb_4bit")
    z = torch.randn(2, 5, model.n_heads, model.d_head, generator=torch.Generator().manual_seed(0))
    heads = torch.eye(model.n_heads)[:, None, None, :, None]
    parts = sum(model.project(0, z * head) for head in heads)
    assert torch.allclose(parts, model.project(0, z), atol=1e-5)


def test_refusals(folder, monkeypatch):
    with pytest.raises(ModelError, match="no quantization named 'bnb_3bit'. Did you mean"):
        load_model(path=folder, quantization="bnb_3bit")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes, which is not installed. .*circuitkit-nnsight\[quantized\]"):
        load_model(path=folder, quantization="bnb_4bit")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_whose_package_is_missing(folder, method):
    if any(map(quantized.importlib.util.find_spec, ("gptqmodel", "awq"))):
        pytest.skip("a package for such checkpoints is installed")
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 32})
    with pytest.raises(ModelError, match="transformers cannot load .*(gptqmodel|optimum|CUDA|GPU)"):
        load_model(path=folder)
    with pytest.raises(ModelError, match="quantised already"):
        load_model(path=folder, quantization="bnb_4bit")
