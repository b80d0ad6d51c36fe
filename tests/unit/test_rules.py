"""Backward rules: the forward pass is bit for bit what it was, and the backward pass is what the papers say."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import FAMILIES, same_state, state_of, tiny_model, tiny_prompts
from torch import nn

from circuitkit.core.errors import ConfigError, ModelError
from circuitkit.core.node import Site
from circuitkit.models import blocks
from circuitkit.models.attention import eager_attention
from circuitkit.models.differentiable import edited, frozen, logits
from circuitkit.models.hooked import HookedModel
from circuitkit.models.mlp_parts import mlp_parts
from circuitkit.models.norms import HeldNorm, Slope, back_through, norms
from circuitkit.models.rules import RULES, Rules

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"}


def logits_and_gradient(model: HookedModel, rules: Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of token 0's by what enters layer 0."""
    entered = []

    def leaf(value):
        entered.append(value.detach().requires_grad_())
        return entered[0]

    with frozen(model), rules.applied(model), edited(model, {(Site.EMBED, 0): leaf}):
        out = logits(model, tiny_prompts().clean)
        return out.detach(), torch.autograd.grad(out[:, 0].sum(), entered)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_bit_identical_and_backward_is_not(family):
    model = tiny_model(family)
    before = state_of(model)
    plain, gradient = logits_and_gradient(model, Rules())
    for name in set(RULES) - {"plain"}:
        found, other = logits_and_gradient(model, Rules.named(name, model))
        assert torch.equal(found, plain), name
        assert (other - gradient).norm() > 0.05 * gradient.norm(), name
    assert same_state(before, state_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_and_gate_is_found(family):
    model = tiny_model(family)
    a_layer = {"gemma2": 4, "qwen3": 4, "olmo2": 4}.get(family, 2)
    assert len(norms(model)) == 3 * a_layer + 1
    assert (mlp_parts(model, 1).up is not None) == (family in GATED)
    assert Rules.named("relp", model).gate == (family in GATED)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox_parallel"])
def test_constant_norm_scale(family):
    """The derivative is that of the norm with its scale held at what it was: written out here for each kind of norm."""
    model = tiny_model(family, dtype=torch.float64)
    norm = norms(model)[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, model.d_model, generator=generator, dtype=torch.float64).requires_grad_()
    back = torch.randn(2, 3, model.d_model, generator=generator, dtype=torch.float64)
    if isinstance(norm, nn.LayerNorm):
        scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt().detach() * norm.weight
        expected = (x - x.mean(-1, keepdim=True)) * scale
    else:
        weight = 1 + norm.weight if family == "gemma2" else norm.weight
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        expected = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * weight
    wanted = torch.autograd.grad(expected, x, back)[0]
    with frozen(model), Rules(norm=True).applied(model):
        found = torch.autograd.grad(norm(x), x, back)[0]
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rules", [Rules(), Rules(norm=True)], ids=["plain", "constant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_gradients_through_a_norm_at_once(family, rules):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    x, grads = torch.randn(4, model.d_model, generator=generator), torch.randn(5, 4, model.d_model, generator=generator)
    x[0] *= 1e-3
    norm = blocks.norm_before(model, 1, "attention") or model.module(1, "attention_post_norm")
    with frozen(model), rules.applied(model):
        leaf = x.clone().requires_grad_()
        expected = torch.stack([torch.autograd.grad(norm(leaf), leaf, grad)[0] for grad in grads])
        found = back_through(norm, x, grads.clone())
        ahead = Slope.of(norm, x, x.dtype).forward_(grads.clone())
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # Forwards is the transpose of backwards.
    inner = torch.einsum("itd,jtd->ijt", grads, found), torch.einsum("itd,jtd->ijt", ahead, grads)
    assert torch.allclose(*inner, rtol=1e-3, atol=1e-4 * float(inner[0].abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_a_norm_with_its_scale_held_takes_a_sum_term_by_term(family):
    model = tiny_model(family, dtype=torch.float64)
    norm = norms(model)[-1]
    terms = torch.randn(3, 2, 4, model.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, direction = terms.sum(0), torch.randn(2, 4, model.d_model, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(whole)
    held = HeldNorm.at(norm, whole)
    assert torch.allclose(held.through(terms).sum(0) + held.offset, expected, atol=1e-5)
    assert torch.allclose((held.through(terms) * direction).sum(-1), (terms * held.back(direction)).sum(-1))
    assert bool(held.offset.any()) == (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_constant_activation_ratio(family):
    model = tiny_model(family, dtype=torch.float64)
    act = mlp_parts(model, 0).act
    x = torch.tensor([-2.0, -0.5, 0.0, 0.3, 4.0], dtype=torch.float64).requires_grad_()
    with frozen(model), Rules(activation=True).applied(model):
        found = torch.autograd.grad(act(x).sum(), x)[0]
    expected = torch.where(x == 0, torch.full_like(x, 0.5), act(x) / x).detach()  # gelu and silu have slope 1/2 at 0
    assert torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(found[x.detach() != 0], expected[x.detach() != 0])


def test_halved_gates():
    """down(act(gate(x)) * up(x)): half of the plain gradient to each branch, so half of it in all."""
    model = tiny_model("llama")
    mlp = model.module(1, "mlp")
    x = torch.randn(1, 2, model.d_model, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with frozen(model):
        plain = torch.autograd.grad(mlp(x).sum(), x)[0]
        with Rules(gate=True).applied(model):
            halved = torch.autograd.grad(mlp(x).sum(), x)[0]
    assert torch.allclose(halved, plain / 2, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_constant_pattern(family):
    """With the pattern constant an attention is linear in what its values read: its output is its own derivative along its input."""
    model = tiny_model(family, dtype=torch.float64, n_layers=1)
    found = {}

    def see(name):
        def edit(z):
            found[name] = z
            return z

        return edit

    ids = tiny_prompts().clean
    with frozen(model), Rules(pattern=True).applied(model):
        with edited(model, {(Site.EMBED, 0): lambda x: found.setdefault("x", x.detach().requires_grad_()), (Site.Z, 0): see("z")}):
            logits(model, ids)
        back = torch.autograd.grad(found["z"].sum(), found["x"])[0]
    z = found["z"].detach()
    with eager_attention(model), torch.no_grad():
        normed = model.module(0, "attention_norm")(found["x"])
        patterns = model.hf.base_model(ids, output_attentions=True, use_cache=False).attentions[0]
    values = model.queries_keys_values(0, found["x"].detach())[2]
    group = model.n_heads // model.n_kv_heads
    by_hand = torch.einsum("bhqk,bkhd->bqhd", patterns, values.repeat_interleave(group, 2))
    assert torch.allclose(by_hand, z, atol=1e-6)
    # The same sum with the pattern as a number, and the norm as it is.
    with frozen(model):
        x = found["x"].detach().requires_grad_()
        projections = projected(model, x)
        wanted = torch.autograd.grad(torch.einsum("bhqk,bkhd->bqhd", patterns, projections.repeat_interleave(group, 2)).sum(), x)[0]
    assert normed.shape == x.shape and torch.allclose(back, wanted, atol=1e-6)


def projected(model: HookedModel, x: torch.Tensor) -> torch.Tensor:
    """Values of layer 0, differentiable."""
    read = model.module(0, "attention_norm")(x)
    outs = [model.hf.get_submodule(path)(read) for path in dict.fromkeys(port.module for port in model.map.ports(0))]
    if model.map.family == "gpt_neox":
        return outs[0].unflatten(-1, (model.n_heads, 3, -1))[..., 2, :]
    return (outs[0].chunk(3, -1)[2] if len(outs) == 1 else outs[2]).unflatten(-1, (model.n_kv_heads, -1))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_halved_attention_products(family):
    """A quarter of the gradient at queries and keys, half at values."""
    model = tiny_model(family, n_layers=1)
    grads = {}
    for name, rules in (("plain", Rules()), ("halved", Rules(attention_halves=True))):
        outs = []
        handles = [
            model.hf.get_submodule(path).register_forward_hook(
                lambda module, args, out, outs=outs: outs.append(out.detach().requires_grad_()) or outs[-1]
            )
            for path in dict.fromkeys(port.module for port in model.map.ports(0))
        ]
        try:
            with frozen(model), rules.applied(model):
                grads[name] = torch.autograd.grad(logits(model, tiny_prompts().clean)[:, 0].sum(), outs)
        finally:
            for handle in handles:
                handle.remove()
    if family == "llama":
        ratios = [halved / plain for halved, plain in zip(grads["halved"], grads["plain"], strict=True)]
    elif family == "gpt2":
        ratios = list((grads["halved"][0] / grads["plain"][0]).chunk(3, -1))
    else:
        ratios = list((grads["halved"][0] / grads["plain"][0]).unflatten(-1, (model.n_heads, 3, -1)).unbind(-2))
    for ratio, expected in zip(ratios, (0.25, 0.25, 0.5), strict=True):
        ratio = ratio[ratio.isfinite()]  # where nothing flows it is 0 / 0
        assert len(ratio) and torch.allclose(ratio, torch.full_like(ratio, expected), rtol=1e-4)


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_softmax_at_a_temperature(temperature):
    """Backward p_T * (g - sum(g * p_T)) with p_T = softmax(x / T), without 1 / T; by hand from queries, keys and values."""
    model, outs, z = tiny_model("gpt2", dtype=torch.float64, n_layers=1), [], []
    project = model.hf.get_submodule("transformer.h.0.attn.c_attn")
    handle = project.register_forward_hook(lambda module, args, out: outs.append(out.detach().requires_grad_()) or outs[-1])
    try:
        with frozen(model), Rules(temperature=temperature).applied(model), edited(model, {(Site.Z, 0): lambda act: z.append(act) or act}):
            logits(model, tiny_prompts().clean)
    finally:
        handle.remove()
    back = torch.randn(z[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(z[0], outs, back)[0]
    q, k, v = (part.unflatten(-1, (model.n_heads, -1)).transpose(1, 2) for part in outs[0].detach().chunk(3, -1))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT / model.d_head**0.5).masked_fill(hidden, -torch.inf)
    pattern, softer, back = scores.softmax(-1), (scores / temperature).softmax(-1), back.transpose(1, 2)
    at_pattern = back @ v.mT
    at_scores = softer * (at_pattern - (at_pattern * softer).sum(-1, keepdim=True)) / model.d_head**0.5
    expected = torch.cat([part.transpose(1, 2).flatten(-2) for part in (at_scores @ k, at_scores.mT @ q, pattern.mT @ back)], -1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_rule_that_meets_no_gradient():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="rule 'norm' did not fire anywhere"), Rules(norm=True).applied(model), torch.no_grad():
        logits(model, tiny_prompts().clean)
    with pytest.raises(ModelError, match="rule 'gate' did not fire"), Rules(gate=True).applied(model):
        pass


def test_an_error_inside_is_the_one_that_comes_out():
    model = tiny_model("gpt2")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), RULES["gim"].applied(tiny_model("llama")):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), frozen(model), Rules.named("gim", model).applied(model):
        raise ZeroDivisionError
    assert same_state(before, state_of(model))


def test_what_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ModelError, match="have no gate"), Rules(gate=True).applied(model):
        pass
    with pytest.raises(ConfigError, match="no set of backward rules named 'relpp'. Did you mean 'relp'"):
        Rules.named("relpp", model)
    with pytest.raises(ConfigError, match="above 0"):
        Rules(temperature=0.0)
