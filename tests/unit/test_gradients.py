"""Gradients over nodes and edges: against finite differences, against the oracle at the corners, by hand where the model is linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    FAMILIES,
    PATCHERS,
    failing,
    linear_llama,
    random_masks,
    same_state,
    shared_model,
    state_of,
    tiny_model,
    tiny_prompts,
    wire_head,
    wire_mlp,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Level, Site
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.dense import chunks
from circuitkit.engine.dense.gradients import Gradients
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.metrics import KL, Accuracy, AnswerRank, LogitDiff, ProbDiff
from circuitkit.models.differentiable import edited, frozen, logits
from circuitkit.patchers import Mean, Patcher, Resample, Zero

SOME = ("a0.h1", "m0", "a1.h0", "a1.h1", "a2.h0", "m2")


class InFloat64(TorchFunctionMode):
    """transformers takes norms and softmax in float32 whatever the model's dtype; here it asks for that and gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if each is torch.float32 else each for each in args]
        return func(*args, **{key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()})


def universes(model) -> dict[str, Universe]:
    shape = (model.n_layers, model.n_heads)
    return {
        "nodes": model.universe,
        "spans": Universe.of_nodes(*shape, ("S1", "last")),
        "attentions": Universe.of_attentions(*shape),
        "neurons": Universe.of_neurons(*shape, model.d_mlp, [0, 2]) | Universe.of_nodes(*shape),
    }


def edges_of(model, members=None, level=Level.EDGE_QKV) -> EdgeUniverse:
    nodes = tuple(node for node in model.universe.nodes if members is None or str(node) in members)
    return EdgeUniverse(nodes, level, model.map.is_parallel)


def gradients(model, universe, patcher="resample", metric=None, prompts=None, **settings) -> Gradients:
    return Gradients(model, prompts or tiny_prompts(4), PATCHERS[patcher], metric or LogitDiff(), universe, **settings)


def agrees_with_finite_differences(found: Gradients, size: int, tolerance: float, seed: int = 0) -> None:
    """At a soft mask by central differences along a random direction, and at the full mask by one-sided ones of second order."""
    generator = torch.Generator().manual_seed(seed)
    mask = 0.1 + 0.8 * torch.rand(size, generator=generator, dtype=torch.float64)
    along = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    step, full = 1e-5, torch.ones(size, dtype=torch.float64)
    central = (found.loss(mask + step * along) - found.loss(mask - step * along)) / (2 * step)
    assert abs(central - (found.grad(mask) * along).sum()) < tolerance * max(1, abs(central))
    down, step = -along.abs(), 1e-4
    onesided = (4 * found.loss(full + step * down) - found.loss(full + 2 * step * down) - 3 * found.loss(full)) / (2 * step)
    assert abs(onesided - (found.grad() * down).sum()) < 10 * tolerance * max(1, abs(onesided))


# Nodes


@pytest.mark.parametrize("patcher", ["zero", "resample", "mean_group", "halfway", "flipped"])
@pytest.mark.parametrize("kind", ["nodes", "spans", "attentions", "neurons"])
def test_nodes_against_finite_differences(kind, patcher):
    model = shared_model("gpt2", dtype=torch.float64)
    universe = universes(model)[kind]
    agrees_with_finite_differences(gradients(model, universe, patcher, max_rows=3), len(universe), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_of_every_family_against_finite_differences(family):
    model = shared_model(family, dtype=torch.float64)
    with InFloat64():
        for universe in universes(model).values():
            agrees_with_finite_differences(gradients(model, universe, "resample"), len(universe), 1e-6)


@pytest.mark.parametrize("patcher", ["zero", "resample", "mean_all", "mean_group", "halfway", "flipped"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_nodes_at_the_corners_are_what_the_oracle_says(family, patcher):
    model, prompts = shared_model(family), tiny_prompts()
    for universe in universes(model).values():
        naive = ReferenceEngine(model, prompts, PATCHERS[patcher], LogitDiff(), universe)
        masks = torch.cat([random_masks(4, len(universe)), universe.full()[None], universe.empty()[None]])
        found = gradients(model, universe, patcher, prompts=prompts).loss(masks.float())
        assert torch.allclose(found, naive.score(masks).mean(-1), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_corners_of_nodes_and_of_edges_property(seed):
    model, prompts = shared_model("qwen2"), tiny_prompts(3, seed=seed)
    naive = ReferenceEngine(model, prompts, Resample(), LogitDiff())
    masks = random_masks(2, len(model.universe), seed, keep=0.7)
    assert torch.allclose(gradients(model, model.universe, prompts=prompts).loss(masks.float()), naive.score(masks).mean(-1), atol=1e-4)
    edges = edges_of(model)
    by_definition = ReferenceEdges(naive, Circuit.of(model.universe, model.universe.full()))
    masks = random_masks(1, len(edges), seed, keep=0.8)
    assert torch.allclose(gradients(model, edges, prompts=prompts).loss(masks.float()), by_definition.score(masks).mean(-1), atol=1e-4)


def test_whole_attentions_and_neurons_are_sums_of_what_they_hold():
    """A whole attention's derivative is the sum of its heads', and an MLP's under Zero that of its neurons (its bias aside)."""
    model = shared_model("llama", dtype=torch.float64)
    shape = (model.n_layers, model.n_heads)
    heads = gradients(model, model.universe, "resample").grad()
    attentions = gradients(model, Universe.of_attentions(*shape), "resample").grad()
    neurons = gradients(model, Universe.of_neurons(*shape, model.d_mlp), "zero").grad()
    mlps = gradients(model, model.universe, "zero").grad()
    for layer in range(model.n_layers):
        of_heads = model.universe.places([f"a{layer}.h{head}" for head in range(model.n_heads)])
        assert torch.allclose(attentions[2 * layer], heads[of_heads].sum())
        assert torch.allclose(neurons[layer * model.d_mlp :][: model.d_mlp].sum(), mlps[model.universe.index(f"m{layer}")])


def test_by_hand():
    """A linear model: token values 2, 3 (clean) and 1, 1 (corrupt); a0.h0 writes twice their mean, m0 thrice that into the logit of 1."""
    model = linear_llama(1, 1, 6, 8)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        model.hf.lm_head.weight[1, 3] = 1.0
        wire_head(model, 0, 0, read=1, write=2, weight=2.0)
        wire_mlp(model, 0, read=2, write=3, weight=3.0)
    one = torch.tensor([1])
    prompts = PromptSet(torch.tensor([[2, 3]]), torch.tensor([[1, 1]]), one, 2 * one, 0 * one)
    found = gradients(model, model.universe, prompts=prompts)
    # Head: 2 x 2.5 = 5 against 2 x 1 = 2; MLP: 3 x 5 = 15 against 6. By the head's mask the MLP's output moves by 3 x (5 - 2).
    assert found.grad().tolist() == [9.0, 9.0]
    # Both masks at 1/2: the head gives 3.5, so the MLP computes 10.5 and its mask moves the logit by 10.5 - 6; half of 9 for the head.
    assert found.grad(torch.tensor([0.5, 0.5])).tolist() == [4.5, 4.5]
    assert found.loss(torch.tensor([0.5, 0.5])).item() == 0.5 * 10.5 + 0.5 * 6
    edges = edges_of(model)
    scores = dict(zip(map(str, edges.edges), gradients(model, edges, prompts=prompts).grad().tolist(), strict=True))
    # All of it takes one path: input, values, MLP, logit.
    expected = {"input->a0.h0<v>": 9.0, "a0.h0->m0": 9.0, "m0->logits": 9.0}
    assert scores == {name: pytest.approx(expected.get(name, 0.0), abs=1e-6) for name in scores}


# Edges


@pytest.mark.parametrize("members", [None, SOME], ids=["whole", "circuit"])
@pytest.mark.parametrize("level", [Level.EDGE_QKV, Level.EDGE])
@pytest.mark.parametrize("patcher", ["resample", "zero", "mean_group", "halfway"])
def test_edges_against_finite_differences(patcher, level, members):
    model = shared_model("gpt2", dtype=torch.float64)
    universe = edges_of(model, members, level)
    agrees_with_finite_differences(gradients(model, universe, patcher, max_rows=3), len(universe), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_of_every_family(family):
    """Soft masks against finite differences; and the two ways to the full mask, by streams of their own and by contraction, agree."""
    model = shared_model(family, dtype=torch.float64)
    for members in (None, SOME):
        universe = edges_of(model, members)
        with InFloat64():
            found = gradients(model, universe, "resample", prompts=tiny_prompts(3))
            agrees_with_finite_differences(found, len(universe), 1e-5)  # on the way back norms are in float32 all the same
            full = torch.ones(len(universe), dtype=torch.float64, requires_grad=True)
            assert torch.allclose(torch.autograd.grad(found.loss(full), full)[0], found.grad(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [Level.EDGE_QKV, Level.EDGE])
@pytest.mark.parametrize("members", [None, SOME], ids=["whole", "circuit"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_parallel", "qwen3", "gemma2", "olmo2"])
def test_edges_at_the_corners_are_what_the_oracle_says(family, members, level):
    model, prompts = shared_model(family), tiny_prompts(4)
    universe = edges_of(model, members, level)
    circuit = Circuit.of(model.universe, model.universe.mask(universe.nodes))
    naive = ReferenceEdges(ReferenceEngine(model, prompts, Resample(), LogitDiff()), circuit, level=level)
    masks = torch.cat([random_masks(2, len(universe)), universe.full()[None], universe.empty()[None]])
    found = gradients(model, universe, prompts=prompts).loss(masks.float())
    assert torch.allclose(found, naive.score(masks).mean(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_all_edges_out_of_an_attention_or_mlp_with_a_norm_behind_it(family):
    """Under zero the norm is given zeros, and not what rounding leaves of a sum from which everything is subtracted again."""
    model, prompts = shared_model(family), tiny_prompts(4)
    edges = edges_of(model)
    masks, nodes = [], []
    for names in (["a1.h0", "a1.h1"], ["m1"]):
        masks.append([str(edge.src) not in names for edge in edges.edges])
        nodes.append(model.universe.without(model.universe.full(), names))
    found = gradients(model, edges, "zero", prompts=prompts).loss(torch.tensor(masks).float())
    naive = ReferenceEngine(model, prompts, Zero(), LogitDiff())
    assert torch.allclose(found, naive.score(torch.stack(nodes)).mean(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attribution_patching_of_edges_by_plain_autograd(family):
    """At the clean end an edge's derivative is the gradient at its receiver times the sender's difference; here for MLPs and the logits."""
    model, prompts = shared_model(family, dtype=torch.float64), tiny_prompts(4)
    outs, reads = {}, {}

    def collect(table, leaf):
        def hook(key):
            def edit(act):
                table[key] = act.view_as(act) if leaf else act.detach()
                return table[key] if leaf else act

            return edit

        return hook

    runs = {}
    for name, ids in (("clean", prompts.clean), ("corrupt", prompts.corrupt)):
        outs = {}
        see = collect(outs, leaf=False)
        with torch.no_grad(), edited(model, {(Site.MLP_OUT, layer): see(layer) for layer in range(3)} | {(Site.EMBED, 0): see("input")}):
            logits(model, ids)
        runs[name] = outs
    handles = []
    for layer in range(3):

        def hook(module, args, layer=layer):
            reads[f"m{layer}"] = args[0].view_as(args[0])
            return (reads[f"m{layer}"],)

        handles.append(model.module(layer, "mlp_norm").register_forward_pre_hook(hook))
    try:
        with frozen(model), edited(model, {(Site.EMBED, 0): lambda x: x.detach().requires_grad_()}):
            out = logits(model, prompts.clean)
            values = LogitDiff().score(out, prompts).mean()
            grads = dict(zip(reads, torch.autograd.grad(values, list(reads.values())), strict=True))
    finally:
        for handle in handles:
            handle.remove()
    universe = edges_of(model)
    found = gradients(model, universe, prompts=prompts).grad()
    for src, dst in (("input", "m0"), ("input", "m2"), ("m0", "m1"), ("m0", "m2"), ("m1", "m2")):
        key = "input" if src == "input" else int(src[1:])
        apart = runs["clean"][key] - runs["corrupt"][key]
        assert torch.allclose(found[universe.index(f"{src}->{dst}")], (apart * grads[dst]).sum(), atol=1e-9)


def test_edges_into_a_node_sum_to_the_edge_of_the_level_above():
    """An edge into a head is its three edges into queries, keys and values together."""
    model = shared_model("qwen2", dtype=torch.float64)
    fine, coarse = edges_of(model), edges_of(model, level=Level.EDGE)
    by_port, by_head = gradients(model, fine).grad(), gradients(model, coarse).grad()
    for edge, value in zip(coarse.edges, by_head, strict=True):
        names = [f"{edge}<{port}>" for port in "qkv"] if edge.dst.head is not None else [str(edge)]
        assert torch.allclose(by_port[fine.places(names)].sum(), value, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_all_edges_out_of_a_node_are_the_node(family):
    """Its mask and those of all edges from it do the same at the full mask."""
    model = shared_model(family, dtype=torch.float64)
    edges = edges_of(model)
    by_node, by_edge = gradients(model, model.universe).grad(), gradients(model, edges).grad()
    total = torch.zeros(len(edges.senders), dtype=torch.float64).index_add(0, edges.src.long(), by_edge)
    assert torch.allclose(total[1:], by_node, atol=1e-6)


# Both


@pytest.mark.parametrize("universe", ["nodes", "spans", "edges", "circuit"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_per_prompt_is_what_each_prompt_gives_alone(family, universe):
    model, prompts = shared_model(family, dtype=torch.float64), tiny_prompts(4)
    units = {"edges": edges_of(model), "circuit": edges_of(model, SOME), **universes(model)}[universe]
    mask = torch.rand(len(units), generator=torch.Generator().manual_seed(0))
    for at in (None, mask):
        each = gradients(model, units, prompts=prompts, max_rows=3).per_prompt(at)
        alone = [gradients(model, units, prompts=prompts.take([row])).grad(at) for row in range(4)]
        assert torch.allclose(each, torch.stack(alone), atol=1e-9)
        assert torch.allclose(each.mean(0), gradients(model, units, prompts=prompts).grad(at), atol=1e-9)


@pytest.mark.parametrize("units", ["nodes", "spans", "edges"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "olmo2"])
def test_padding_counts_for_nothing(family, units):
    """Prompts of different lengths in one set give what each gives alone."""
    model, drawn = shared_model(family), tiny_prompts(4, n_pos=6)
    pads = torch.tensor([0, 2, 1, 0])
    clean, corrupt = drawn.clean.clone(), drawn.corrupt.clone()
    for row, pad in enumerate(pads.tolist()):
        clean[row, :pad] = corrupt[row, :pad] = 0
    spans = {"S1": torch.tensor([1, 2, 0, 3])}
    prompts = PromptSet(clean, corrupt, drawn.answers, drawn.wrongs, drawn.groups, drawn.group_names, spans, pads=pads)
    universe = edges_of(model) if units == "edges" else universes(model)[units]
    for at in (None, torch.rand(len(universe), generator=torch.Generator().manual_seed(0))):
        together = gradients(model, universe, prompts=prompts).per_prompt(at)
        alone = [gradients(model, universe, prompts=prompts.take([row])).grad(at) for row in range(4)]
        assert torch.allclose(together, torch.stack(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", [ProbDiff(), KL()], ids=["prob_diff", "kl"])
def test_other_metrics(metric):
    model = shared_model("gpt2", dtype=torch.float64)
    for universe in (model.universe, edges_of(model), edges_of(model, SOME)):
        agrees_with_finite_differences(gradients(model, universe, metric=metric), len(universe), 1e-6)


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
def test_small_chunks_change_nothing(family, monkeypatch):
    model = shared_model(family, dtype=torch.float64)
    universe = edges_of(model, SOME)
    mask = torch.rand(len(universe), generator=torch.Generator().manual_seed(0))
    expected = [gradients(model, universe).grad(at) for at in (None, mask)]
    monkeypatch.setattr(chunks, "BYTES", 1)
    for at, wanted in zip((None, mask), expected, strict=True):
        assert torch.allclose(gradients(model, universe).grad(at), wanted, atol=1e-9)


def test_nothing_is_as_large_as_batch_times_senders_times_width():
    """Of no tensor that is made in a gradient the size exceeds the chunk's, nor what the model itself makes."""
    model, prompts = tiny_model("llama", n_layers=4, n_heads=4), tiny_prompts(8, n_pos=12)
    universe = edges_of(model)
    forbidden = prompts.clean.numel() * len(universe.senders) * model.d_model
    sizes = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    before, chunks.BYTES = chunks.BYTES, 4 * forbidden // 8
    try:
        with Watch():
            gradients(model, universe, prompts=prompts).grad()
    finally:
        chunks.BYTES = before
    assert max(sizes) < forbidden / 3


@pytest.mark.parametrize("rules", ["relp", "attnlrp", "gim"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "olmo2"])
def test_rules_reach_every_edge(family, rules):
    """All edges out of a node are the node under rules too, and both ways to the full mask still agree."""
    model = shared_model(family, dtype=torch.float64)
    edges = edges_of(model)
    by_node, by_edge = (gradients(model, units).grad(rules=rules) for units in (model.universe, edges))
    total = torch.zeros(len(edges.senders), dtype=torch.float64).index_add(0, edges.src.long(), by_edge)
    assert torch.allclose(total[1:], by_node, atol=1e-5)
    nearly = torch.ones(len(edges), dtype=torch.float64)
    nearly[0] -= 1e-9  # so that streams are made
    assert torch.allclose(gradients(model, edges).grad(nearly, rules), by_edge, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_half_precision(family):
    """bfloat16: sums in float32, and the same numbers to its precision."""
    half, single = tiny_model(family, dtype=torch.bfloat16), tiny_model(family)
    for units in (single.universe, edges_of(single)):
        found, expected = (gradients(model, units).grad() for model in (half, single))
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_soft_masks_learn():
    """A few steps down the loss lower it: the graph reaches the parameters behind the mask."""
    model = shared_model("gpt2")
    for units in (model.universe, edges_of(model)):
        found, scores = gradients(model, units), torch.zeros(len(units), requires_grad=True)
        optimizer, losses = torch.optim.Adam([scores], lr=0.3), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = -found.loss(scores.sigmoid(), slice(0, 3))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


# The model afterwards, and what is refused


@pytest.mark.parametrize("units", ["nodes", "edges"])
def test_the_model_is_left_as_it_was(units):
    model = tiny_model("qwen2")
    model.hf.requires_grad_(True)
    model.module(1, "mlp").train()
    before = state_of(model)
    universe = model.universe if units == "nodes" else edges_of(model)
    found = gradients(model, universe)
    found.grad(rules="relp")
    found.loss(torch.full((len(universe),), 0.5, requires_grad=True)).backward()
    assert same_state(before, state_of(model))
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    error = RuntimeError("half-way")
    with failing(model.module(2, "out_proj"), error), pytest.raises(RuntimeError) as caught:
        found.grad(rules="gim")
    assert caught.value is error and same_state(before, state_of(model))


def test_passes_that_do_not_fit_are_halved(monkeypatch):
    from circuitkit.models import differentiable

    model, prompts = shared_model("gpt2"), tiny_prompts(7)
    expected = gradients(model, model.universe, prompts=prompts).grad()
    rows, real = [], differentiable.logits

    def sometimes(model, ids, **inputs):
        rows.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, ids, **inputs)

    monkeypatch.setattr(differentiable, "logits", sometimes)
    assert torch.allclose(gradients(model, model.universe, prompts=prompts).grad(), expected, atol=1e-5)
    assert rows == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(differentiable, "logits", lambda *args, **inputs: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MeasurementError, match="Memory ran out in a pass with a single prompt"):
        gradients(model, model.universe, prompts=prompts).grad()


def test_weights_that_are_nan():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.hf.lm_head.weight[0, 0] = torch.nan
    for units in (model.universe, edges_of(model)):
        with pytest.raises(MeasurementError, match="NaN or infinity"):
            gradients(model, units).grad()


class Detached(Patcher):
    """Reads the activation behind autograd's back."""

    def patch(self, act, source, site):
        return 0.5 * act.detach()


def test_what_is_refused():
    model, prompts = shared_model("gpt2"), tiny_prompts()
    for metric in (Accuracy(), AnswerRank()):
        with pytest.raises(MeasurementError, match=f"{metric.name} counts, so it has no gradient"):
            gradients(model, model.universe, metric=metric)
    with pytest.raises(MeasurementError, match="conditional means"):
        Gradients(model, prompts, Mean("conditional"), LogitDiff(), model.universe)
    with pytest.raises(MeasurementError, match="Detached reads the activation in a way that autograd cannot follow"):
        Gradients(model, prompts, Detached(), LogitDiff(), model.universe)
    with pytest.raises(MeasurementError, match="features need their dictionary"):
        gradients(model, Universe.of_features(3, 2, {(Site.RESID_POST, 1): 5}))
    found = Gradients(model, prompts, Zero(), LogitDiff(), model.universe)
    with pytest.raises(MeasurementError, match="one number for each of the 9 units"):
        found.grad(torch.ones(8))
    for wrong in (torch.full((9,), 1.5), torch.full((9,), torch.nan)):
        with pytest.raises(MeasurementError, match="lies between 0"):
            found.loss(wrong)
    with pytest.raises(MeasurementError, match="max_rows must be at least 1"):
        gradients(model, model.universe, max_rows=0)
