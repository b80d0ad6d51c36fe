"""The parts of a model, found by value: against the table by hand, under other names, and on models that are not as they should be."""

import importlib.util
import inspect
import re
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from architecture_table import ARCHITECTURES
from models_for_tests import FAMILIES, tiny_hf
from torch import nn
from transformers.models.llama import modeling_llama

from circuitkit.core.errors import ModelError
from circuitkit.models.model_map import Addend, Block, Heads, Projection
from circuitkit.models.resolve import resolve, resolving
from circuitkit.models.resolve.probe import record
from circuitkit.models.resolve.thin import thin, widened
from circuitkit.models.tiny import tiny_masked_model, tiny_model


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setenv("CIRCUITKIT_CACHE", "off")


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_found_as_the_table_has_them(family):
    hf = tiny_hf(family)
    found, table = resolve(hf), ARCHITECTURES[family.removesuffix("_parallel")]
    config = hf.config
    assert (found.family, found.n_layers, found.causal, found.interface, found.caches) == (config.model_type, 3, True, True, True)
    assert found.final_norm == table.final_norm
    assert hf.get_submodule(found.unembed) is hf.get_output_embeddings() and hf.get_submodule(found.embed) is hf.get_input_embeddings()
    for layer, block in enumerate(found.blocks):
        root = f"{table.blocks}.{layer}"
        assert (block.module, block.item, block.parallel) == (root, None, family == "gpt_neox_parallel")
        assert (block.attention.module, block.attention.item, block.attention.n_items) == (f"{root}.{table.attention}", 0, 2)
        assert (block.mlp.module, block.mlp.item, block.neurons) == (f"{root}.{table.mlp}", None, f"{root}.{table.mlp_out_proj}")
        norms = (block.attention.norm, block.mlp.norm, block.attention.post_norm, block.mlp.post_norm)
        named = (table.attention_norm, table.mlp_norm, table.attention_post_norm, table.mlp_post_norm)
        assert norms == tuple(f"{root}.{path}" if path else None for path in named)
        heads = block.heads
        n_kv_heads = getattr(config, "num_key_value_heads", 2)
        assert (heads.out_proj, heads.n_heads, heads.n_kv_heads) == (f"{root}.{table.out_proj}", 2, n_kv_heads)
        d = heads.d_head
        assert d == heads.d_value == getattr(config, "head_dim", 4) or 4
        paths = tuple(dict.fromkeys(port.module for port in heads.ports))
        assert paths == tuple(f"{root}.{path}" for path in table.query_key_value)
        behind = (table.query_norm, table.key_norm, "")
        assert tuple(port.norm for port in heads.ports) == tuple(f"{root}.{path}" if path else None for path in behind)
        starts = tuple(port.starts for port in heads.ports)
        if table.fused_by_head:
            assert starts == ((0, 3 * d), (d, 4 * d), (2 * d, 5 * d))
        elif len(paths) == 1:
            assert starts == ((0, d), (2 * d, 3 * d), (4 * d, 5 * d))
        else:
            assert starts == ((0, d), *2 * (tuple(range(0, n_kv_heads * d, d)),))
    assert max(check.error for check in found.evidence) < 1e-5
    assert {check.name for check in found.evidence} >= {"addends sum to the layer", "heads sum to the attention", "the same twice"}


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_probe_computes_what_eager_computes_and_leaves_no_trace(family):
    hf = tiny_hf(family, attention="sdpa" if family == "gpt2" else "eager").train()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    resolve(hf)
    assert hf.config._attn_implementation == ("sdpa" if family == "gpt2" else "eager") and all(module.training for module in hf.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    hf.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]])
    seen = record(hf, ids)
    hf.set_attn_implementation("eager")
    assert torch.equal(seen.logits, hf(ids).logits)
    assert len(seen.attentions) == 3
    for attention in seen.attentions:
        values = attention.v.repeat_interleave(attention.q.shape[1] // attention.v.shape[1], 1)
        torch.testing.assert_close(attention.z, (attention.pattern @ values).transpose(1, 2))


def test_weights_of_zeros_hide_nothing():
    hf = tiny_hf("llama")
    expected = resolve(hf)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
    assert resolve(hf) == expected


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "olmo2"])
def test_half_precision_and_a_model_too_large_for_a_copy_give_the_same_map(family, monkeypatch):
    expected = resolve(tiny_hf(family))
    assert resolve(tiny_hf(family, dtype=torch.bfloat16)) == expected
    monkeypatch.setattr(resolving, "_TWIN", 0)
    assert resolve(tiny_hf(family)) == expected
    assert resolve(tiny_hf(family, dtype=torch.bfloat16)) == expected


def test_nan_weights_are_refused_by_name():
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        resolve(hf)


def test_another_name_for_every_module_changes_nothing_but_the_paths(tmp_path):
    """Llama's own file with every name in it replaced: nothing is left to recognise."""
    names = {
        "self_attn": "alpha", "mlp": "beta", "q_proj": "one", "k_proj": "two", "v_proj": "three", "o_proj": "four", "gate_proj": "five",
        "up_proj": "six", "down_proj": "seven", "input_layernorm": "eight", "post_attention_layernorm": "nine", "embed_tokens": "ten",
        "norm": "eleven", "layers": "twelve", "lm_head": "thirteen", "model": "fourteen",
    }  # fmt: skip
    renamed = tmp_path / "renamed.py"
    source = inspect.getsource(modeling_llama)
    for old, new in names.items():
        source = re.sub(rf"\bself\.{old}\b|(?<=[\"'.]){old}(?=[.\"'])", lambda found, old=old, new=new: found[0].replace(old, new), source)
    renamed.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("transformers.models.llama.renamed", renamed)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        plain = tiny_hf("llama", n_layers=2)
        hf = module.LlamaForCausalLM(plain.config).eval()
        hf.load_state_dict(dict(zip(hf.state_dict(), plain.state_dict().values(), strict=True)))
        expected = str(replace(resolve(plain), evidence=()))
        for old, new in names.items():
            expected = re.sub(rf"(?<=['.]){old}(?=[.'])", new, expected)
        assert str(replace(resolve(hf), evidence=())) == expected
        assert not re.search("_proj|layernorm|attn", expected.replace("out_proj=", ""))
    finally:
        del sys.modules[spec.name]


class Attend(nn.Module):
    """Attention as people write it: one projection for queries, keys and values, and plain matrices."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Think(nn.Module):
    def __init__(self, width, does=None):
        super().__init__()
        self.up, self.down, self.does = nn.Linear(width, 3 * width), nn.Linear(3 * width, width), does

    def forward(self, x):
        out = self.down(torch.relu(self.up(x)))
        if self.does == "sample":
            out = out + 0.01 * torch.randn(out.shape)
        if self.does == "learn":
            self.up.bias.data.add_(1e-3)
        return out


class Step(nn.Module):
    def __init__(self, width, heads, causal, does=None):
        super().__init__()
        self.look, self.think = Attend(width, heads, causal), Think(width, does)
        self.calm, self.quiet, self.does = nn.LayerNorm(width), nn.LayerNorm(width), does

    def forward(self, x):
        x = x + self.look(self.calm(x))
        x = x + self.think(self.quiet(x))
        return 0.7 * x if self.does == "shrink" else x


class Own(nn.Module):
    """A model out of a notebook."""

    def __init__(self, n_layers=2, width=12, heads=3, causal=True, does=None):
        super().__init__()
        self.words, self.places = nn.Embedding(17, width), nn.Embedding(16, width)
        self.steps = nn.ModuleList(Step(width, heads, causal, does) for _ in range(n_layers))
        if does == "tie":
            self.steps = nn.ModuleList([self.steps[0]] * n_layers)
        self.calm, self.out, self.does = nn.LayerNorm(width), nn.Linear(width, 17, bias=False), does

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for step in self.steps:
            x = step(x)
        logits = self.out(self.calm(x))
        return (logits, None) if self.does == "pair" else logits


def test_a_module_of_ones_own_is_found_with_its_heads():
    found = resolve(Own())
    assert (found.family, found.embed, found.final_norm, found.unembed) == ("Own", "words", "calm", "out")
    assert (found.causal, found.logits, found.caches, found.interface, found.forward) == (True, False, False, False, frozenset())
    ports = [Projection("steps.1.look.qkv", tuple(range(start, start + 12, 4)), 4) for start in (0, 12, 24)]
    heads = Heads("steps.1.look.back", 3, 3, 4, 4, *ports, pattern=False)
    looking, thinking = Addend("steps.1.look", norm="steps.1.calm"), Addend("steps.1.think", norm="steps.1.quiet")
    assert found.blocks[1] == Block("steps.1", looking, heads, thinking, "steps.1.think.down")


def test_a_model_that_looks_ahead_is_not_causal():
    assert resolve(Own()).causal and not resolve(Own(causal=False)).causal


@pytest.mark.parametrize(
    ("does", "sentence"),
    [
        ("sample", "samples inside of its forward"),
        ("learn", r"changes its weights steps\.0\.think\.up\.bias"),
        ("shrink", r"modules of steps\.0 give does not sum"),
        ("tie", r"steps\.0 to run once in a forward pass, found 2 times"),
        ("pair", "found a tuple without `logits`"),
    ],
)
def test_models_that_are_not_as_they_should_be_are_refused_with_the_place(does, sentence):
    with pytest.raises(ModelError, match=sentence):
        resolve(Own(does=does))


def test_a_model_without_layers_and_one_with_an_encoder_and_a_decoder_are_refused():
    with pytest.raises(ModelError, match="found none"):
        resolve(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)))
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(ModelError, match="an encoder and a decoder"):
        resolve(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))


def test_two_passes_on_a_large_model_and_none_on_the_second_start(monkeypatch, tmp_path):
    monkeypatch.setenv("CIRCUITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(resolving, "_TWIN", 0)
    hf = tiny_hf("llama")
    passes = []
    hf.model.register_forward_hook(lambda *_: passes.append(1))
    found = resolve(hf)
    assert len(passes) == 2
    again = resolve(hf)
    assert again == found and again.evidence == found.evidence and len(passes) == 2
    assert resolve(tiny_hf("llama", n_layers=2)).n_layers == 2  # another configuration is another entry
    assert len(passes) == 2
    (file,) = [file for file in tmp_path.rglob("*.json") if '"model.layers.2"' in file.read_text()]
    file.write_text(file.read_text().replace('"n_heads": 2', '"n_heads": 1'))
    assert resolve(hf) == found and len(passes) == 4  # what was changed by hand is not believed
    monkeypatch.setenv("CIRCUITKIT_CACHE", "off")
    resolve(hf)
    assert len(passes) == 6


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_a_model_without_weights_has_the_map_of_the_one_with(family):
    hf = tiny_hf(family, n_heads=4, d_head=16)
    with torch.device("meta"):
        empty = type(hf)(hf.config)
    assert resolve(empty) == resolve(hf)


@pytest.mark.parametrize("model_type", ["falcon", "mamba", "helium"])
def test_widths_that_must_fit_each_other_are_kept(model_type):
    hf = tiny_model(model_type)
    with torch.device("meta"):
        empty = type(hf)(hf.config)
    assert resolve(empty) == resolve(hf)


def test_a_narrow_model_that_has_other_heads_is_refused():
    """A width that the configuration leaves alone would be scaled twice, which no projection has."""
    hf = tiny_hf("gpt2", n_heads=4, d_head=16)
    made = thin(hf)
    found = resolve(made.hf)
    with pytest.raises(ModelError, match="should have 128 columns"):
        widened(found, replace(made, wide=32), hf)


def _kinds(found):
    """For each layer what it has: heads, mixer; MLP with neurons, routed experts."""
    looking = ["heads" if block.heads else "mixer" if block.attention else "none" for block in found.blocks]
    thinking = ["mlp" if block.neurons else "experts" if block.mlp else "none" for block in found.blocks]
    return list(dict.fromkeys(zip(looking, thinking, strict=True)))


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("bloom", [("heads", "mlp")]),  # fused by head, off the interface, adds the stream by itself, ALiBi
        ("gptj", [("heads", "mlp")]),  # off the interface, parallel
        ("falcon", [("heads", "mlp")]),  # one key/value head, fused
        ("granite", [("heads", "mlp")]),  # multipliers
        ("mixtral", [("heads", "experts")]),
        ("deepseek_v3", [("heads", "mlp"), ("heads", "experts")]),  # latent attention
        ("qwen3_next", [("mixer", "experts"), ("heads", "experts")]),  # gated heads, and linear attention
        ("nemotron_h", [("mixer", "none"), ("none", "mlp"), ("heads", "none"), ("none", "experts")]),
        ("gpt_oss", [("heads", "experts")]),  # sinks and windows
        ("phi3", [("heads", "mlp")]),  # fused, queries first
        ("mamba", [("mixer", "none")]),
        ("cohere", [("heads", "mlp")]),  # one norm for both parts
    ],
)
def test_quirks_of_families_are_found(model_type, kinds):
    hf = tiny_model(model_type)
    found = resolve(hf)
    assert sorted(_kinds(found)) == sorted(kinds)
    assert found.causal and found.additive and found.direct
    block = next((block for block in found.blocks if block.heads), found.blocks[0])
    heads, width = block.heads, hf.config.hidden_size
    assert block.parallel == (model_type in ("gptj", "falcon", "cohere"))
    assert (block.attention or block.mlp).scale == (0.7 if model_type == "granite" else 1.0)
    assert all(addend.whole for each in found.blocks for addend in each.addends) == (model_type != "bloom")
    assert found.in_place == (model_type == "falcon")
    if heads is None:
        return
    d = heads.d_head
    if model_type == "deepseek_v3":
        assert (heads.ports, heads.d_head, heads.d_value) == (None, 24, 16)
    elif model_type == "qwen3_next":  # beside the queries of each head is its gate
        assert (heads.queries.starts, heads.queries.width) == ((0, 48, 96, 144), 24)
    elif model_type == "bloom":
        assert [port.starts for port in heads.ports] == [tuple(range(place * d, 3 * width, 3 * d)) for place in range(3)]
    elif model_type == "falcon":
        assert [port.starts for port in heads.ports] == [tuple(range(0, width, d)), (width,), (width + d,)]
    elif model_type == "phi3":
        n, kv = heads.n_heads * d, heads.n_kv_heads * d
        firsts = ((0, n), (n, n + kv), (n + kv, n + 2 * kv))
        assert [port.starts for port in heads.ports] == [tuple(range(*first, d)) for first in firsts]
    else:
        assert [port.starts[:2] for port in heads.ports] == [(0, d)] * 3


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_encoders_look_ahead(model_type):
    found = resolve(tiny_masked_model(model_type))
    assert (found.causal, found.additive, found.direct) == (False, model_type == "modernbert", False)
    assert all(block.heads.ports is not None and block.neurons is not None for block in found.blocks)
    assert found.additive == (model_type != "bert")


@pytest.mark.parametrize(("model_type", "sentence"), [("bitnet", "mixes heads behind z"), ("mbart", ""), ("blt", "logits come from")])
def test_what_cannot_be_proved_is_refused_or_taken_off(model_type, sentence):
    """mBART counts positions without looking at the mask, so rows of different lengths cannot be padded."""
    if sentence:
        with pytest.raises(ModelError, match=sentence):
            resolve(tiny_model(model_type))
    else:
        assert "attention_mask" not in resolve(tiny_model(model_type)).forward
