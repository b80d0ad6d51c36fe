"""The parts of a model, found by value: against the table by hand, under other names, and on models that are not as they should be."""

import pytest
import torch
from models_for_tests import FAMILIES, tiny_hf

from circuitkit.core.errors import ModelError
from circuitkit.models.architectures import ARCHITECTURES
from circuitkit.models.resolve import resolve
from circuitkit.models.resolve.probe import record


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
        assert (block.attention.norm, block.mlp.norm) == (f"{root}.{table.attention_norm}", f"{root}.{table.mlp_norm}")
        sandwich = (f"{root}.post_attention_layernorm", f"{root}.post_feedforward_layernorm") if family == "gemma2" else (None, None)
        assert (block.attention.post_norm, block.mlp.post_norm) == sandwich
        heads = block.heads
        n_kv_heads = getattr(config, "num_key_value_heads", 2)
        assert (heads.out_proj, heads.n_heads, heads.n_kv_heads) == (f"{root}.{table.out_proj}", 2, n_kv_heads)
        d = heads.d_head
        assert d == heads.d_value == getattr(config, "head_dim", 4) or 4
        paths = tuple(dict.fromkeys(port.module for port in heads.ports))
        assert paths == tuple(f"{root}.{path}" for path in table.query_key_value)
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
    hf = tiny_hf(family, attention="sdpa").train()
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    resolve(hf)
    assert hf.config._attn_implementation == "sdpa" and all(module.training for module in hf.modules())
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


def test_nan_weights_are_refused_by_name():
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        resolve(hf)
