"""Adapters: merged weights give PEFT's own logits, all of a run sees them, and one of another model is refused."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitkit.core.errors import ModelError
from circuitkit.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models import adapters
from circuitkit.models.adapters import SETTINGS, WEIGHTS
from circuitkit.models.loading import load_model
from circuitkit.patchers import Zero

sys.path.insert(0, str(Path(__file__).parent))
from models_for_tests import planted_prompts  # noqa: E402
from test_loading import IDS, save  # noqa: E402

peft = pytest.importorskip("peft")

WHERE = ["q_proj", "v_proj", "o_proj", "down_proj"]


def save_adapter(base, folder, **settings):
    """Writes a random adapter of a model as PEFT does, and returns PEFT's own model."""
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": WHERE, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    beside = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**chosen)).eval()
    beside.save_pretrained(folder)
    return beside


@pytest.fixture
def base(tmp_path):
    """A llama in a folder."""
    return save(tmp_path / "base", vocab_size=24)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"use_dora": True}, {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}],
    ids=["plain", "rank-stabilised", "dora", "whole-modules"],
)
def test_logits_are_those_of_peft(base, tmp_path, settings):
    beside = save_adapter(base, tmp_path / "lora", **settings)
    model, plain = load_model(path=tmp_path / "base", adapter=tmp_path / "lora"), load_model(path=tmp_path / "base")
    with torch.no_grad():
        wanted = beside(IDS).logits
    assert (model.run(IDS, keep=0) - wanted).abs().max() < 1e-6
    assert (model.run(IDS, lambda layer: None, keep=0) - wanted).abs().max() < 1e-6
    assert (plain.run(IDS, keep=0) - wanted).abs().max() > 1e-2
    assert type(model.module(0, "out_proj")) is torch.nn.Linear and not any(weight.requires_grad for weight in model.hf.parameters())
    assert model.fingerprint() != plain.fingerprint()


def test_knock_outs_are_those_of_peft(base, tmp_path):
    """A head of the adapted model is cut as one cuts it by hand in PEFT's: z before its o_proj, whatever adapter is in there."""
    beside = save_adapter(base, tmp_path / "lora")
    model = load_model(path=tmp_path / "base", adapter=tmp_path / "lora")
    prompts = planted_prompts()
    engine = PackedEngine(model, prompts, Zero(), LogitDiff())
    mask = engine.universe.without(engine.universe.full(), ["a1.h2"])
    scored = engine.score(mask[None])[0]

    def cut(module, args):
        z = args[0].clone()
        z[..., 2 * model.d_head : 3 * model.d_head] = 0
        return (z,)

    projection = beside.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    with torch.no_grad(), _hooked(projection, cut):
        logits = beside(prompts.clean).logits[:, -1]
    assert torch.allclose(scored, LogitDiff().score(logits[None], prompts)[0], atol=1e-5)


class _hooked:
    def __init__(self, module, hook):
        self.handle = module.register_forward_pre_hook(hook)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_what_it_was_made_of_is_told(base, tmp_path, caplog):
    save_adapter(base, tmp_path / "lora")
    with caplog.at_level(logging.INFO, "circuitkit"):
        model = load_model(path=tmp_path / "base", adapter=tmp_path / "lora")
    told = model.origin["adapter"]
    assert (told["name"], told["revision"], set(told["files"])) == ("lora", None, {SETTINGS, WEIGHTS})
    assert "LoRA of rank 4) is merged" in caplog.text
    settings = json.loads((tmp_path / "lora" / SETTINGS).read_text())
    (tmp_path / "lora" / SETTINGS).write_text(json.dumps({**settings, "lora_alpha": 9}))
    other = load_model(path=tmp_path / "base", adapter=tmp_path / "lora")
    assert other.origin["adapter"]["files"][WEIGHTS] == told["files"][WEIGHTS] and other.origin != model.origin
    assert other.fingerprint() != model.fingerprint()


def settings_with(folder, **changes):
    file = folder / SETTINGS
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_weight(folder):
    weights = load_file(folder / WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, folder / WEIGHTS)


BREAK = {
    "holds no adapter_model.safetensors": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "holds no adapter_config.json": lambda folder: (folder / SETTINGS).unlink(),
    "adapter_config.json of .* is not valid JSON": lambda folder: (folder / SETTINGS).write_text("{"),
    "is of type 'IA3'. Expected LORA": lambda folder: settings_with(folder, peft_type="IA3"),
    r"for Megatron \(megatron_config\)": lambda folder: settings_with(folder, megatron_config={"a": 1}, megatron_core="antigravity"),
    "does not fit .*1 of its weights are missing": without_weight,
    "does not fit .*Target modules": lambda folder: settings_with(folder, target_modules=["c_attn"]),
    "does not fit .*: size mismatch for .*lora_A": lambda folder: settings_with(folder, r=3),
    "damaged": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50]),
}


@pytest.mark.parametrize("sentence", BREAK)
def test_broken_adapter(base, tmp_path, sentence):
    save_adapter(base, tmp_path / "lora")
    BREAK[sentence](tmp_path / "lora")
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(path=tmp_path / "base", adapter=tmp_path / "lora")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"hidden_size": 64}), ("llama", {"num_hidden_layers": 2}), ("llama", {"num_hidden_layers": 4}), ("gpt2", {})],
    ids=["wider", "fewer layers", "more layers", "another family"],
)
def test_wrong_base(base, tmp_path, family, changes):
    """PEFT itself loads an adapter of more layers without a word."""
    save_adapter(base, tmp_path / "lora")
    save(tmp_path / "other", family, vocab_size=24, **changes)
    with pytest.raises(ModelError, match="lora does not fit .*other: .* Expected an adapter of this very model"):
        load_model(path=tmp_path / "other", adapter=tmp_path / "lora")


def test_a_base_of_another_name_on_the_hub(base, tmp_path):
    save_adapter(base, tmp_path / "lora")
    settings_with(tmp_path / "lora", base_model_name_or_path="lab/chat")
    hf = load_model(path=tmp_path / "base").hf
    with pytest.raises(ModelError, match="was made for lab/chat, and the model is lab/base. Take model=local model.path=lab/chat"):
        adapters.adapted(hf, tmp_path / "lora", "lab/base")
    assert load_model(path=tmp_path / "base", adapter=tmp_path / "lora").origin  # a folder may hold either


def test_an_adapter_that_is_no_part_of_the_weights(base, tmp_path, monkeypatch):
    """Should PEFT ever merge something else than it computes, the logits say so."""
    save_adapter(base, tmp_path / "lora")
    merge = peft.PeftModel.merge_and_unload if hasattr(peft.PeftModel, "merge_and_unload") else peft.LoraModel.merge_and_unload

    def wrong(self, *args, **kwargs):
        merged = merge(self, *args, **kwargs)
        merged.lm_head.weight.data[0] += 1
        return merged

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", wrong)
    with pytest.raises(ModelError, match="moved logits by .* of their spread"):
        load_model(path=tmp_path / "base", adapter=tmp_path / "lora")


def test_adapters_that_are_nowhere_or_in_the_wrong_place(base, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="There is no folder nowhere, and it is not a hub id"):
        load_model(path=tmp_path / "base", adapter="nowhere")
    with pytest.raises(ModelError, match="lab/lora is not .* in the cache"):
        load_model(path=tmp_path / "base", adapter="lab/lora", local_files_only=True)
    save_adapter(base, tmp_path / "lora")
    with pytest.raises(ModelError, match="holds an adapter .* this as model.adapter="):
        load_model(path=tmp_path / "lora")
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"need PEFT, .*circuitkit-nnsight\[adapters\]"):
        load_model(path=tmp_path / "base", adapter=tmp_path / "lora")


def test_weights_that_are_not_at_hand(base, tmp_path):
    save_adapter(base, tmp_path / "lora")
    with pytest.raises(ModelError, match="some of them are offloaded or quantised"):
        load_model(path=tmp_path / "base", adapter=tmp_path / "lora", device_map="auto", max_memory={"cpu": 20_000},
                   offload_folder=tmp_path / "offload")  # fmt: skip
