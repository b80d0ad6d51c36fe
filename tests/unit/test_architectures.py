"""The table of module paths, held against what plain torch hooks see and against arithmetic done here, for small random models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from architecture_table import ARCHITECTURES, architecture_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from circuitkit.core.errors import ModelError
from circuitkit.models.blocks import joint_norms, norm_before, norm_behind
from circuitkit.models.hooked import HookedModel, Layer

SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": None}
VARIANTS = {
    "gpt2": {},
    "gpt_neox parallel": {"intermediate_size": 48, "use_parallel_residual": True},
    "gpt_neox serial": {"intermediate_size": 48, "use_parallel_residual": False},
    "llama grouped": GATED,
    "llama": {**GATED, "num_key_value_heads": 4},
    "llama biased": {**GATED, "attention_bias": True},
    "mistral grouped": GATED,
    "mistral window": {**GATED, "sliding_window": 3},
    "qwen2 grouped": GATED,
    "qwen2": {**GATED, "num_key_value_heads": 4},
    "qwen3 grouped": {**GATED, "head_dim": 12},
    "qwen3": {**GATED, "num_key_value_heads": 4, "head_dim": 8},
    "gemma2 grouped": {**GATED, "head_dim": 12, "sliding_window": 3},
    "gemma2 single": {**GATED, "num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text grouped": {
        **GATED,
        "head_dim": 12,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2 grouped": GATED,
    "olmo2": {**GATED, "num_key_value_heads": 4},
    "olmo3 grouped": {**GATED, "sliding_window": 3},
    "exaone4 grouped": {**GATED, "sliding_window": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "glm4 grouped": {**GATED, "head_dim": 8},
}


NORMS = {
    "attention_norm": partial(norm_before, part="attention"),
    "mlp_norm": partial(norm_before, part="mlp"),
    "attention_post_norm": partial(norm_behind, part="attention"),
    "mlp_post_norm": partial(norm_behind, part="mlp"),
}


def make(variant: str) -> HookedModel:
    """A model with random weights, biases and norms, large enough that every part matters."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(variant.split()[0], **SIZE, **VARIANTS[variant])
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.ndim > 1 else 0.3))
    return HookedModel(hf.requires_grad_(False), name=variant)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return make(request.param)


@pytest.fixture
def ids():
    return torch.randint(0, SIZE["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(2))


def see(model: HookedModel, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """What plain torch hooks see in one pass: inputs and outputs of every part, by layer and name, and the attention patterns."""
    seen: dict[tuple[int, str], Tensor] = {}

    def watch(layer: int, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            seen[layer, f"{part} in"] = args[0] if args else kwargs["hidden_states"]
            seen[layer, f"{part} out"] = output[0] if isinstance(output, tuple) else output
            if part == "attention":
                seen[layer, "pattern"] = output[1]

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for layer in range(model.n_layers):
            modules = {part: model.module(layer, part) for part in ("attention", "out_proj", "mlp")}
            modules |= {part: norm(model, layer) for part, norm in NORMS.items()}
            for part, module in modules.items():
                if module is not None:
                    hooks.callback(module.register_forward_hook(watch(layer, part), with_kwargs=True).remove)
            block = model.module(layer, "block")
            hooks.callback(block.register_forward_hook(watch(layer, "block"), with_kwargs=True).remove)
        seen[-1, "logits"] = model.hf(ids, use_cache=False, output_attentions=True).logits
    return seen


def with_hook(model: HookedModel, ids: Tensor, register: Callable[[], torch.utils.hooks.RemovableHandle]) -> Tensor:
    """Logits of a plain pass under one plain torch hook."""
    handle = register()
    try:
        with torch.no_grad():
            return model.hf(ids, use_cache=False).logits
    finally:
        handle.remove()


def values(model: HookedModel, layer: int, attention_in: Tensor) -> Tensor:
    """Value vectors, one a query head: row, pos, head, d_head. Written out from the papers, apart from the fused layouts."""
    paths = dict.fromkeys(port.module for port in model.map.ports(layer))
    projections = [model.hf.get_submodule(path)(attention_in) for path in paths]
    family = model.map.family
    if family == "gpt2":
        v = projections[0].chunk(3, dim=-1)[2].unflatten(-1, (model.n_heads, model.d_head))
    elif family == "gpt_neox":
        v = projections[0].unflatten(-1, (model.n_heads, 3, model.d_head))[..., 2, :]
    else:
        v = projections[2].unflatten(-1, (model.n_kv_heads, model.d_head))
    return v.repeat_interleave(model.n_heads // model.n_kv_heads, dim=2)


def test_table_has_a_variant_of_every_family():
    assert {variant.split()[0] for variant in VARIANTS} == set(ARCHITECTURES)


def test_shape_and_paths(model):
    config = model.hf.config
    table = architecture_of(config)
    assert table is ARCHITECTURES[config.model_type] and table.family == model.map.family
    assert (model.n_layers, model.n_heads, model.d_model, model.d_vocab) == (3, 4, 32, 40)
    assert (model.n_kv_heads, model.d_head) == (VARIANTS[model.name].get("num_key_value_heads", 4), VARIANTS[model.name].get("head_dim", 8))
    assert model.map.is_parallel == ("parallel" in model.name)
    assert len(model.hf.get_submodule(table.blocks)) == 3 and len(model.universe) == 3 * (4 + 1)
    assert "Norm" in type(model.final_norm).__name__
    norms = [*(norm(model, 0) for norm in NORMS.values()), *joint_norms(model, 0)[:2]]
    assert all("Norm" in type(norm).__name__ for norm in norms if norm is not None)
    family = config.model_type
    before, joint = not family.startswith(("olmo", "exaone")), family.startswith("olmo")
    behind = family.startswith(("gemma", "glm")) or not before
    assert [norm is not None for norm in norms] == [before, before, behind, behind, joint, joint]


def test_reading_is_what_plain_hooks_see(model, ids):
    seen, read = see(model, ids), {}

    def visit(layer: Layer) -> None:
        read[layer.index, "block in"] = layer.resid
        read[layer.index, "out_proj in"] = layer.z.flatten(-2)
        read[layer.index, "attention out"] = layer.attention_out
        read[layer.index, "mlp in"] = layer.mlp_in
        read[layer.index, "mlp out"] = layer.mlp_out

    assert torch.equal(model.run(ids, visit, keep=0), seen[-1, "logits"])
    assert len(read) == 5 * model.n_layers
    for site, value in read.items():
        assert torch.equal(value, seen[site]), site


def test_z_projected_is_the_attention_output(model, ids):
    seen = see(model, ids)
    for layer in range(model.n_layers):
        z = seen[layer, "out_proj in"].unflatten(-1, (model.n_heads, model.d_head))
        assert torch.equal(model.project(layer, z), seen[layer, "attention out"])
        bias = model.project(layer, torch.zeros_like(z))
        alone = torch.eye(model.n_heads)[:, None, None, :, None] * z  # head, row, pos, head, d_head
        parts = sum(model.project(layer, one) - bias for one in alone)
        torch.testing.assert_close(parts + bias, seen[layer, "attention out"])


def test_slice_h_of_z_is_head_h(model, ids):
    """Each head's z is its own attention pattern times the values of its group, computed here."""
    seen = see(model, ids)
    for layer in range(model.n_layers):
        v = values(model, layer, seen[layer, "attention in"])
        z = torch.einsum("rhqk,rkhd->rqhd", seen[layer, "pattern"], v)
        torch.testing.assert_close(z.flatten(-2), seen[layer, "out_proj in"])


def test_residual_stream_is_summed_as_the_table_says(model, ids):
    """Attention and MLP read the stream through the norm before them, and what they give is added through the norm behind, if any."""
    seen = see(model, ids)
    for layer in range(model.n_layers):
        resid = seen[layer, "block in"]
        attention, mlp = (seen.get((layer, f"{part}_post_norm out"), seen[layer, f"{part} out"]) for part in ("attention", "mlp"))
        middle = resid + attention
        for part, stream in (("attention", resid), ("mlp", resid if model.map.is_parallel else middle)):
            torch.testing.assert_close(seen.get((layer, f"{part}_norm in"), seen[layer, f"{part} in"]), stream)
            assert torch.equal(seen[layer, f"{part} in"], seen.get((layer, f"{part}_norm out"), seen[layer, f"{part} in"]))
            assert torch.equal(seen.get((layer, f"{part}_post_norm in"), seen[layer, f"{part} out"]), seen[layer, f"{part} out"])
        torch.testing.assert_close(seen[layer, "block out"], middle + mlp)


@pytest.mark.parametrize(("at", "head"), [(0, 3), (2, 1)])
def test_head_set_to_zero(model, ids, at, head):
    def zeroed(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    def visit(layer: Layer) -> None:
        if layer.index == at:
            layer.z = zeroed(layer.z)

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (zeroed(args[0].unflatten(-1, (model.n_heads, model.d_head))).flatten(-2),)

    plain = with_hook(model, ids, lambda: model.module(at, "out_proj").register_forward_pre_hook(hook))
    assert torch.equal(model.run(ids, visit, keep=0), plain)
    assert not torch.equal(plain, see(model, ids)[-1, "logits"])


def test_mlp_and_attention_replaced_or_skipped(model, ids):
    at = 1
    value = torch.randn(3, 7, model.d_model, generator=torch.Generator().manual_seed(3))
    plain = {
        "mlp": with_hook(model, ids, lambda: model.module(at, "mlp").register_forward_hook(lambda *_: value)),
        "mlp in": with_hook(model, ids, lambda: model.module(at, "mlp").register_forward_pre_hook(lambda *_: (value,))),
        "attention": with_hook(model, ids, lambda: model.module(at, "attention").register_forward_hook(lambda *_: (value, None))),
    }

    def run(edit: Callable[[Layer], None]) -> Tensor:
        return model.run(ids, lambda layer: edit(layer) if layer.index == at else None, keep=0)

    assert torch.equal(run(lambda layer: setattr(layer, "mlp_out", value)), plain["mlp"])
    assert torch.equal(run(lambda layer: layer.skip_mlp(value)), plain["mlp"])
    assert torch.equal(run(lambda layer: setattr(layer, "mlp_in", value)), plain["mlp in"])
    assert torch.equal(run(lambda layer: layer.skip_attention(value)), plain["attention"])
    assert not any(torch.equal(logits, see(model, ids)[-1, "logits"]) for logits in plain.values())


def test_starting_and_ending_inside(model, ids):
    seen = see(model, ids)
    for start in range(model.n_layers):
        logits = model.run(ids, start=start, resid=seen[start, "block in"], keep=0)
        assert torch.equal(logits, seen[-1, "logits"])
    visited = []
    assert model.run(ids, lambda layer: visited.append((layer.index, layer.resid)), start=1, resid=seen[1, "block in"], stop=1) is None
    assert [index for index, _ in visited] == [1] and torch.equal(visited[0][1], seen[1, "block in"])


def test_nothing_stays_behind(model, ids):
    def fails(layer: Layer) -> None:
        layer.z = layer.z * 0
        raise KeyError("half-way")

    before = model.run(ids)
    with pytest.raises(KeyError, match="half-way"):
        model.run(ids, fails)
    assert torch.equal(model.run(ids), before)
    assert torch.equal(model.run(ids, lambda layer: layer.z), before)


def test_unknown_family():
    known = "exaone4, gemma2, gemma3_text, glm4, gpt2, gpt_neox, llama, mistral, olmo2, olmo3, qwen2, qwen3"
    with pytest.raises(ModelError, match=f"type 'opt' are not in .* Known: {known}"):
        architecture_of(AutoConfig.for_model("opt"))
