"""The models with a short name: their shapes add up to the published sizes, each has a file, and a plan needs none of their own files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM

from circuitkit.config import conf_dir
from circuitkit.core.errors import ModelError, ModelNotAtHand
from circuitkit.jobs import plan
from circuitkit.models import known_shape
from circuitkit.models.named import HUB_MODELS, NamedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from model_configs import text_of  # noqa: E402


def parameters(model: NamedModel, n_layers: int) -> int:
    """How many a model of that shape has, with fewer layers."""
    settings = {**model.config, "num_hidden_layers": n_layers}
    if model.family == "gpt_neo":
        settings["attention_types"] = [[["global", "local"], n_layers // 2]]
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.family, **settings))
    hf.tie_weights()
    return sum(weight.numel() for weight in hf.parameters())


@pytest.mark.parametrize("name", HUB_MODELS)
def test_a_shape_has_as_many_parameters_as_its_authors_published(name):
    model = HUB_MODELS[name]
    two, four = parameters(model, 2), parameters(model, 4)
    whole = two + (model.n_layers - 2) * (four - two) // 2
    assert whole / 1e6 == pytest.approx(model.parameters, abs=0.1)


@pytest.mark.parametrize("name", HUB_MODELS)
def test_a_shape_says_what_transformers_makes_of_it(name):
    model = HUB_MODELS[name]
    config = AutoConfig.for_model(model.family, **model.config)
    assert config.num_hidden_layers == model.n_layers and config.num_attention_heads == model.n_heads
    assert (config.hidden_size, config.vocab_size) == (model.d_model, model.d_vocab)
    assert (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) == model.d_head
    assert model.n_heads % model.n_kv_heads == 0


def test_there_are_many_of_all_sizes():
    sizes = [model.parameters for model in HUB_MODELS.values()]
    assert len(sizes) >= 90 and min(sizes) < 71 and max(sizes) > 70_000
    assert Counter(model.repo for model in HUB_MODELS.values()).most_common(1)[0][1] == 1
    assert len({model.family for model in HUB_MODELS.values()}) >= 30


@pytest.mark.parametrize("name", HUB_MODELS)
def test_files_of_the_configuration_are_those_that_the_script_writes(name):
    assert (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8") == text_of(HUB_MODELS[name])


def test_large_models_are_bfloat16():
    assert {name: HUB_MODELS[name].dtype for name in ("gpt2_xl", "tinyllama", "gemma2_2b", "llama3_2_3b")} == {
        "gpt2_xl": "float32", "tinyllama": "float32", "gemma2_2b": "bfloat16", "llama3_2_3b": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "pythia_1b", "smollm2_135m", "qwen3_0_6b", "gemma2_2b", "mistral_7b"])
def test_a_known_shape_is_a_model_without_weights(name):
    model, known = known_shape(name), HUB_MODELS[name]
    assert (model.name, model.n_layers, model.n_heads, model.n_kv_heads) == (name, known.n_layers, known.n_heads, known.n_kv_heads)
    assert (model.d_model, model.d_head, model.d_mlp, model.d_vocab) == (known.d_model, known.d_head, known.d_mlp, known.d_vocab)
    assert model.device.type == "meta" and str(model.dtype) == f"torch.{known.dtype}"
    with pytest.raises(ModelError, match="no model of known shape named 'gtp2'. Did you mean 'gpt2'"):
        known_shape("gtp2")


def composed(*overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["name=it", *overrides])


def test_a_plan_needs_no_file_of_the_model_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "measured_rates", lambda device, dtype: (1e9, 1e9))
    folder = tmp_path / "plan"
    plan.run(composed("model=pythia_70m", "task.n=4", "method=knockout", f"dir={folder}"))
    sentence = "takes the shape of pythia_70m from circuitkit's own table"
    assert sentence in capsys.readouterr().out
    body = json.loads((folder / "plan.json").read_text())
    assert sentence in body.pop("told")
    assert [each["evaluations"] for each in body.values()] == [6 * 9]
    assert [each["memory"]["weights"] for each in body.values()] == [4 * 70_426_624]
    for overrides in (["model=pythia_70m", "model.revision=step1000"], ["model=local", "model.path=lab/tiny"]):
        with pytest.raises(ModelNotAtHand, match="is not .* in the cache"):
            plan.planned(composed(*overrides))


def test_a_plan_of_files_at_hand_says_nothing_of_a_table():
    config = composed("model=tiny_llama")
    model, told = plan.planned(config)
    assert (model.name, told) == ("tiny_llama", "")
    assert "leaves model.quantization aside" in plan.planned(composed("model=tiny_llama", "model.quantization=bnb_4bit"))[1]
