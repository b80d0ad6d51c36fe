"""Edges between the members of a circuit: by hand, against the naive oracle, by what must hold, by what they cost, and what is refused."""

from __future__ import annotations

from itertools import product
from math import ceil, hypot

import pytest
import torch
import transformers
from models_for_tests import (
    FAMILIES,
    PATCHERS,
    difference,
    engines,
    failing,
    logits_of,
    paths_model,
    paths_prompts,
    random_masks,
    same_state,
    shared_model,
    state_of,
    tiny_config,
    tiny_model,
    tiny_prompts,
)

from circuitkit.core.circuit import Circuit
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError
from circuitkit.core.node import LOGITS, Edge, Level, Node
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.base import Engine
from circuitkit.engine.dense.gradients import Gradients
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.engine.edges.pruned import _Removed
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.edges import check_edges
from circuitkit.methods import Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero

POST_NORM = ("gemma2", "olmo2")
LEVELS = (Level.EDGE_QKV, Level.EDGE)
WAYS = ("recompute", "freeze")
TOLERANCE = 1e-5  # of the spread of the logit differences


def edges_of(engine: Engine, keep: float = 0.6, seed: int = 0, **options) -> EdgeEngine:
    """The edge engine of a random circuit."""
    mask = random_masks(1, len(engine.universe), seed, keep)[0]
    return engine.edges(Circuit.of(engine.universe, mask), **options)


def both(model: HookedModel, prompts: PromptSet, ablation, circuit: Circuit, max_rows: int | None = None, **options):
    """The fast and the naive edge engine on the same things."""
    fast, naive = engines(model, prompts, ablation, max_rows=max_rows)
    return PackedEdges(fast, circuit, **options), ReferenceEdges(naive, circuit, **options)


def nodes(*names: str) -> tuple[Node, ...]:
    return tuple(Node.parse(name) for name in names)


def multi_query(n_heads: int = 4) -> HookedModel:
    """A Llama all of whose query heads share one key and value head."""
    config = tiny_config("llama", n_heads=n_heads)
    config.num_key_value_heads = 1
    hf = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    hf.requires_grad_(False)
    return HookedModel(hf, name="multi-query")


# --- By hand --------------------------------------------------------------------------------------------------------------------------
#
# Two layers, two heads. All tokens of a prompt have one value v. Dimensions: 0 is always 1, 1 the value.
#   a0.h0 writes 1 x dimension 1 to 2;  m0 writes 10 x dimension 2 to 3;  a1.h0 writes 1 x dimension 3 to 4;  a1.h1 writes 2 x dimension 2
#   to 4;  m1 writes 1 x dimension 4 to 5.  The logit of token 1 is the sum of dimensions 1 to 5; token 2 has 0.
# So dimensions 1 to 5 are v, v, 10 v, 12 v, 12 v: 36 v. Outside of the circuit a0.h1 writes 5 x dimension 1 to 4; its mean over the corrupt
# prompts is 7.5, which arrives twice: 36 v + 15. Numbers below are by how much a unit of v less lowers the logit.

CLEAN, CORRUPT = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
BASE = 36 * CLEAN + 15

DIRECT = {
    "input->a0.h0<v>": 35.0,  # dimension 2: 1, 10 by m0, 10 + 2 by the heads of layer 1, 12 by m1
    "input->logits": 1.0,
    "a0.h0->m0": 30.0,  # 10, and 10 each by a1.h0 and m1
    "a0.h0->a1.h1<v>": 4.0,  # 2, and 2 by m1
    "a0.h0->logits": 1.0,
    "m0->a1.h0<v>": 20.0,  # 10, and 10 by m1
    "m0->logits": 10.0,
    "a1.h0->m1": 10.0,
    "a1.h0->logits": 10.0,
    "a1.h1->m1": 2.0,
    "a1.h1->logits": 2.0,
    "m1->logits": 12.0,
}
PATHS = {  # where MLPs on the way recompute while other heads stay as they were
    **DIRECT,
    "a0.h0->a1.h0<v>": 20.0,  # by m0: 10, and 10 by m1 behind the receiver
    "a0.h0->logits": 11.0,  # by m0
    "a1.h0->logits": 20.0,  # by m1
    "a1.h1->logits": 4.0,
}
TOTAL = {"input": 36.0, "a0.h0": 35.0, "m0": 30.0, "a1.h0": 20.0, "a1.h1": 4.0, "m1": 12.0}
REMOVED = {  # several edges at once: what a sender no longer gives cannot be taken twice
    "": 0.0,
    "input->a0.h0<v> m0->logits": 35.0,
    "a0.h0->m0 m0->logits": 30.0,
    "a0.h0->logits m0->logits": 11.0,
    "m0->a1.h0<v> a1.h0->m1": 20.0,
    "a1.h0->m1 a1.h1->m1 a1.h0->logits": 22.0,
    "a1.h0->m1 m1->logits": 12.0,
}


@pytest.fixture(scope="module")
def by_hand() -> HookedModel:
    return paths_model()


def hand_edges(model: HookedModel, which: int, **options) -> EdgeEngine:
    circuit = Circuit(nodes("a0.h0", "m0", "a1.h0", "a1.h1", "m1"), 2, 2)
    return both(model, paths_prompts(CLEAN, CORRUPT), Mean(), circuit, **{"patcher": Resample(), **options})[which]


def assert_lowers(values: torch.Tensor, effects: list[float]) -> None:
    expected = BASE - torch.tensor(effects)[:, None] * (CLEAN - CORRUPT)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mlps", WAYS)
def test_the_effect_of_every_edge_by_hand(by_hand, which, level, mlps):
    """Where an MLP lies between, the two ways differ. Queries and keys are zero in this model, so only values are paths."""
    edges = hand_edges(by_hand, which, level=level, mlps=mlps)
    effects = PATHS if mlps == "recompute" else DIRECT
    if level is Level.EDGE:
        effects = {name.replace("<v>", ""): effect for name, effect in effects.items()}
    assert set(effects) < {str(edge) for edge in edges.universe}
    assert_lowers(edges.alone(edges.universe.edges), [effects.get(str(edge), 0.0) for edge in edges.universe])


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_whole_masks_by_hand(by_hand, which):
    edges = hand_edges(by_hand, which)
    masks = [edges.universe.without(edges.universe.full(), names.split()) for names in REMOVED]
    singles = [edges.universe.without(edges.universe.full(), [name]) for name in DIRECT]
    # With no edge left every reader sees the circuit on the corrupt prompts.
    values = edges.score(torch.stack([*masks, *singles, edges.universe.empty()]))
    assert_lowers(values, [*REMOVED.values(), *DIRECT.values(), 36.0])


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(("patcher", "carried"), [(Zero(), torch.zeros(2)), (Mean(), CORRUPT.mean().expand(2))], ids=["zero", "mean"])
def test_the_patcher_governs_what_a_removed_edge_carries(by_hand, which, patcher, carried):
    """The model is linear: a sender's value by the patcher counts as if its part of the prompt had been that number."""
    edges = hand_edges(by_hand, which, patcher=patcher, mlps="freeze")
    # The embedding has a constant part, and m1 reads what the replaced a0.h1 adds: zeros would take that away too.
    names = [name for name in DIRECT if not name.startswith(("input", "m1"))]
    effects = torch.tensor([DIRECT[name] for name in names])[:, None] * (CLEAN - carried)
    expected = BASE - effects
    torch.testing.assert_close(edges.alone(names), expected, rtol=0, atol=1e-3)
    masks = torch.stack([edges.universe.without(edges.universe.full(), [name]) for name in names])
    torch.testing.assert_close(edges.score(masks), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_direct_effects_of_a_linear_models_sender_sum_to_its_total_effect(by_hand, which):
    edges = hand_edges(by_hand, which, mlps="freeze")
    effects = BASE - edges.alone(edges.universe.edges)
    for name, total in TOTAL.items():
        outgoing = [place for place, edge in enumerate(edges.universe) if str(edge.src) == name]
        torch.testing.assert_close(effects[outgoing].sum(0), total * (CLEAN - CORRUPT), rtol=0, atol=1e-2)
        assert total == sum(effect for edge, effect in DIRECT.items() if edge.startswith(f"{name}->"))


# The same with a norm behind attention and MLP and none before them (OLMo 2), one layer. Dimensions: 0 is always 1, 1 the value v. a0.h0
# writes 3 v to 2, a0.h1 writes 4 v to 3, and the norm makes of (a, b) 2 (a, b) / |(a, b)|. m0 writes dimension 3 of what it reads to 0 and
# 1.2 to 2, and its norm does likewise. The logit of token 1 is dimension 2 + 10 x dimension 3 + 100 x dimension 0.
# v is 3 in clean prompts, so the heads give (9, 12), of length 15, and 5/3 in corrupt ones, so that a0.h0 gives 5: (5, 12) has length 13.


def post_norm_model(dtype: torch.dtype = torch.float32) -> HookedModel:
    model = HookedModel(transformers.AutoModelForCausalLM.from_config(tiny_config("olmo2", 1, 2, 2)).to(dtype), name="by-hand")
    hf, layer = model.hf, model.hf.model.layers[0]
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        for norm in (module for module in hf.modules() if "Norm" in type(module).__name__):
            norm.variance_epsilon = 1e-12
        hf.model.norm.variance_epsilon = 2.0**40  # with a weight of 2^20 it is the identity
        hf.model.norm.weight.fill_(2.0**20)
        hf.model.embed_tokens.weight[:2] = torch.tensor([[1.0, 3, 0, 0], [1, 5 / 3, 0, 0]])
        layer.self_attn.v_proj.weight[0, 1] = 1.0  # heads share keys and values
        layer.self_attn.o_proj.weight[2, 0], layer.self_attn.o_proj.weight[3, model.d_head] = 3.0, 4.0
        layer.mlp.act_fn = torch.nn.ReLU()
        layer.mlp.gate_proj.weight[:2, 0] = 1.0
        layer.mlp.up_proj.weight[0, 3], layer.mlp.up_proj.weight[1, 0] = 1.0, 1.2
        layer.mlp.down_proj.weight[0, 0], layer.mlp.down_proj.weight[2, 1] = 1.0, 1.0
        hf.lm_head.weight[1] = torch.tensor([100.0, 0, 1, 10])
    hf.requires_grad_(False)
    return model


def post_norm_logit(to_logits: tuple[float, float], to_mlp: tuple[float, float], mlp: bool = True) -> float:
    """By hand, from what the heads give the logits and the MLP, and whether the MLP's output is there."""
    two, three = (2 * each / hypot(*to_logits) if any(to_logits) else 0.0 for each in to_logits)
    read = 2 * to_mlp[1] / hypot(*to_mlp) if any(to_mlp) else 0.0
    zero, more = (2 * each / hypot(read, 1.2) for each in (read, 1.2)) if mlp else (0.0, 0.0)
    return two + more + 10 * three + 100 * (1 + zero)


POST_NORM_BY_HAND = {
    # Removed edges: what the heads give the logits, and the MLP, under resample.
    "": ((9, 12), (9, 12)),
    "a0.h0->logits": ((5, 12), (9, 12)),
    "a0.h1->logits": ((9, 20 / 3), (9, 12)),
    "a0.h0->logits a0.h1->logits": ((5, 20 / 3), (9, 12)),  # of (5, 20/3) the norm makes the same as of (9, 12)
    "a0.h0->m0": ((9, 12), (5, 12)),
    "a0.h1->m0 a0.h0->logits": ((5, 12), (9, 20 / 3)),
    "input->a0.h0": ((5, 12), (5, 12)),
    "input->a0.h1 a0.h0->m0": ((9, 20 / 3), (5, 20 / 3)),
}


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_edges_through_a_norm_behind_two_heads_by_hand(which):
    model, ids = post_norm_model(), torch.zeros(1, 2, dtype=torch.long)
    one = torch.ones(1, dtype=torch.long)
    prompts, circuit = PromptSet(ids, ids + 1, one, one + 1, one - 1), Circuit(model.universe.nodes, 1, 2)
    edges = both(model, prompts, Zero(), circuit, level=Level.EDGE, patcher=Resample())[which]
    expected = torch.tensor([post_norm_logit(*heads) for heads in POST_NORM_BY_HAND.values()])
    assert expected[0] == expected[3] == pytest.approx(17.2 + 1.2 + 100 + 160) and expected[1] == pytest.approx(250 / 13 + 261.2)
    masks = [edges.universe.without(edges.universe.full(), names.split()) for names in POST_NORM_BY_HAND]
    torch.testing.assert_close(edges.score(torch.stack(masks))[:, 0], expected, rtol=0, atol=1e-3)
    singles = [name for name in POST_NORM_BY_HAND if name.count("->") == 1 and not name.endswith("h0->m0")]
    found = both(model, prompts, Zero(), circuit, level=Level.EDGE, patcher=Resample(), mlps="freeze")[which].alone(singles)
    wanted = torch.tensor([post_norm_logit(*POST_NORM_BY_HAND[name]) for name in singles])
    torch.testing.assert_close(found[:, 0], wanted, rtol=0, atol=1e-3)
    # Under zero the one head that is left is all that the norm sees, and with none of them it gives nothing.
    edges = both(model, prompts, Zero(), circuit, level=Level.EDGE, patcher=Zero())[which]
    names = ("a0.h0->logits", "a0.h0->logits a0.h1->logits", "m0->logits")
    masks = [edges.universe.without(edges.universe.full(), some.split()) for some in names]
    wanted = [post_norm_logit((0, 12), (9, 12)), post_norm_logit((0, 0), (9, 12)), post_norm_logit((9, 12), (9, 12), mlp=False)]
    torch.testing.assert_close(edges.score(torch.stack(masks))[:, 0], torch.tensor(wanted), rtol=0, atol=1e-3)


def test_the_gradient_of_an_edge_through_a_norm_behind_two_heads_by_hand():
    """By its mask a0.h0 gives the logits 5 + 4 m. Of (h, 12) the norm makes 2 (h, 12) / sqrt(h^2 + 144), whose derivative by h is
    2 (144, -12 h) / 15^3 at h = 9: with the logit 2 (144 - 10 x 108) / 3375 a unit of h, four times that a unit of m."""
    model, ids = post_norm_model(torch.float64), torch.zeros(1, 2, dtype=torch.long)
    one = torch.ones(1, dtype=torch.long)
    edges = EdgeUniverse(model.universe.nodes, Level.EDGE, model.map.is_parallel)
    gradients = Gradients(model, PromptSet(ids, ids + 1, one, one + 1, one - 1), Resample(), LogitDiff(), edges)
    assert gradients.grad()[edges.index("a0.h0->logits")].item() == pytest.approx(4 * 2 * (144 - 10 * 108) / 3375, rel=1e-4)
    assert gradients.grad()[edges.index("a0.h1->logits")].item() == pytest.approx((12 - 20 / 3) * 2 * (10 * 81 - 108) / 3375, rel=1e-4)


@pytest.mark.parametrize("patcher", [Resample(), Zero()], ids=["resample", "zero"])
@pytest.mark.parametrize("family", POST_NORM)
def test_all_edges_out_of_a_node_are_the_node_removed(family, patcher):
    """Through a norm behind it too: a node's mask against that of all its edges, and of all edges out of several of one layer.

    Of a whole attention under zero the norm is given zeros. A sum from which everything is subtracted again would leave rounding there,
    and the norm would make that large.
    """
    fast, _ = engines(shared_model(family, 3, 4), tiny_prompts(4, 4), patcher)
    edges = fast.edges()
    for names in (["a1.h2"], ["m1"], ["a0.h0", "a0.h3", "m0"], [f"a1.h{head}" for head in range(4)]):
        mask = edges.universe.mask([edge for edge in edges.universe.edges if str(edge.src) not in names])
        nodes = fast.universe.without(fast.universe.full(), names)
        assert difference(edges.score(mask[None]), fast.score(nodes[None])) < TOLERANCE, names


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_the_total_effect_is_that_of_giving_the_sender_its_corrupt_output(which):
    """In any model: a mask without all outgoing edges of a sender against that output put in by a plain hook."""
    model, prompts = shared_model("gpt_neox", 3, 2), tiny_prompts(4, 4)
    edges = both(model, prompts, Zero(), Circuit(model.universe.nodes, 3, 2), patcher=Resample())[which]
    masks = [torch.tensor([str(edge.src) != name for edge in edges.universe]) for name in ("m1", "m0")]
    for name, values in zip(("m1", "m0"), edges.score(torch.stack(masks)), strict=True):
        mlp, seen = model.module(int(name[1:]), "mlp"), []
        handle = mlp.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        model.hf(prompts.corrupt)
        handle.remove()
        handle = mlp.register_forward_hook(lambda module, args, out, seen=seen: seen[0])
        logits = model.hf(prompts.clean).logits[:, -1]
        handle.remove()
        expected = logits.gather(1, prompts.answers.tokens[:, None]) - logits.gather(1, prompts.wrongs.tokens[:, None])
        assert difference(values, expected[:, 0]) < TOLERANCE


# --- Against the naive oracle -----------------------------------------------------------------------------------------------------------

CASES = [
    (family, list(PATCHERS)[(2 * place + way) % len(PATCHERS)], LEVELS[(place + way) % 2], WAYS[way])
    for (place, family), way in product(enumerate(FAMILIES), range(2))
]


def assert_agree(model: HookedModel, patcher, level: Level, mlps: str, seed: int = 0) -> None:
    """A random circuit, some of its edges alone, and masks from sparse to dense; slices of three prompts and passes of a few edges."""
    circuit = Circuit.of(model.universe, random_masks(1, len(model.universe), seed, keep=0.7)[0])
    fast, naive = both(model, tiny_prompts(4, 4, seed=seed), patcher, circuit, max_rows=7 if seed % 2 else 3, level=level, mlps=mlps)
    generator = torch.Generator().manual_seed(seed)
    some = [fast.universe.edges[place] for place in torch.randperm(len(fast.universe), generator=generator)[:5].tolist()]
    masks = torch.rand(2, len(fast.universe), generator=generator) < torch.tensor([0.5, 0.95])[:, None]
    expected = torch.cat([naive.alone(some), naive.score(masks)])
    assert difference(torch.cat([fast.alone(some), fast.score(masks)]), expected) < TOLERANCE
    unpatched = naive.score(naive.universe.full()[None])
    assert ((expected - unpatched).abs() > 0.01 * expected.std()).any(1).sum() >= 3  # else the comparison would be of nothing


@pytest.mark.parametrize("seed_and_case", list(enumerate(CASES)), ids=lambda case: "-".join(map(str, case[1])))
def test_fast_and_naive_agree(seed_and_case):
    """Every family with both levels and both ways, and every patcher; two query heads a key and value head where the family groups them."""
    seed, (family, name, level, mlps) = seed_and_case
    assert_agree(shared_model(family, 3, 4), PATCHERS[name], level, mlps, seed)


@pytest.mark.parametrize("name", PATCHERS)
@pytest.mark.parametrize("family", POST_NORM)
def test_fast_and_naive_agree_with_norms_behind_attention_and_mlp(family, name):
    """Every patcher at both levels, where what a head adds depends on the other heads that are replaced for the same receiver."""
    seed = list(PATCHERS).index(name)
    for place, level in enumerate(LEVELS):
        assert_agree(shared_model(family, 2, 2), PATCHERS[name], level, WAYS[(seed + place) % 2], seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_and_naive_agree_everywhere(family):
    """Every patcher and way in every family."""
    for seed, patcher in enumerate(PATCHERS.values()):
        for mlps in WAYS:
            assert_agree(shared_model(family, 3, 4), patcher, Level.EDGE_QKV, mlps, seed)


@pytest.mark.parametrize(
    ("name", "level", "mlps"), [("halfway", "edge_qkv", "recompute"), ("zero", "edge", "freeze"), ("shrunk", "edge_qkv", "freeze")]
)
def test_fast_and_naive_agree_with_four_query_heads_and_one_key_and_value_head(name, level, mlps):
    assert_agree(multi_query(), PATCHERS[name], Level(level), mlps)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "conditional_group"), ("gpt2", "halfway"), ("gpt_neox_parallel", "conditional_all")])
def test_mlps_outside_of_the_circuit_are_replaced_alike(family, name):
    """Only heads are members, so that every MLP is replaced: by means under just these heads, or by what reads the activation."""
    model = shared_model(family, 3, 2)
    circuit = Circuit(nodes("a0.h0", "a1.h0", "a1.h1", "a2.h1"), 3, 2)
    fast, naive = both(model, tiny_prompts(5, 4, n_groups=3), PATCHERS[name], circuit, max_rows=4)
    masks = random_masks(2, len(fast.universe))
    found, expected = (torch.cat([edges.alone(edges.universe.edges[::5]), edges.score(masks)]) for edges in (fast, naive))
    assert difference(found, expected) < TOLERANCE


def test_the_self_check_of_an_edge_stage(monkeypatch):
    edges = edges_of(engines(shared_model("llama", 3, 4), tiny_prompts(4, 4), Mean())[0])
    check_edges(edges)
    correct = PackedEdges.alone
    monkeypatch.setattr(PackedEdges, "alone", lambda self, some: correct(self, some) * 1.01)
    with pytest.raises(MeasurementError, match="fast and the naive path give different scores for edges"):
        check_edges(edges)


@pytest.mark.parametrize(("family", "mlps"), [("gpt2", "recompute"), ("llama", "freeze"), ("gemma2", "recompute"), ("olmo2", "freeze")])
def test_in_bfloat16_the_fast_path_is_as_close_to_float32_as_the_naive_one(family, mlps):
    half = tiny_model(family, n_heads=4, dtype=torch.bfloat16)
    exact = tiny_model(family, n_heads=4)
    with torch.no_grad():
        for parameter, rounded in zip(exact.hf.parameters(), half.hf.parameters(), strict=True):
            parameter.copy_(rounded)
    circuit = Circuit.of(half.universe, random_masks(1, len(half.universe), seed=1, keep=0.7)[0])
    fast, naive = both(half, tiny_prompts(4, 4), Mean(), circuit, mlps=mlps)
    expected, _ = both(exact, tiny_prompts(4, 4), Mean(), circuit, mlps=mlps)
    some, masks = fast.universe.edges[::9], random_masks(2, len(fast.universe))
    rounding, allowed = (
        difference(torch.cat([edges.alone(some), edges.score(masks)]), torch.cat([expected.alone(some), expected.score(masks)]))
        for edges in (fast, naive)
    )
    assert rounding < 2 * allowed < 0.5


# --- What must hold ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean_all", "conditional_group", "resample", "halfway"])
def test_with_every_edge_the_circuit_is_the_node_circuit_to_the_last_bit(name):
    fast, naive = engines(shared_model("qwen2", 3, 4), tiny_prompts(4, 4), PATCHERS[name])
    for engine in (fast, naive):
        edges = edges_of(engine)
        values = edges.score(torch.stack([edges.universe.full(), edges.universe.empty(), edges.universe.full()]))
        expected = engine.score(edges.mask[None])[0]
        if engine is fast:
            assert torch.equal(values[0], expected) and torch.equal(values[2], expected)
        assert difference(values[0], expected) < TOLERANCE and difference(values[1], expected) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_circuit_run_layer_by_layer_gives_the_engines_logits(family):
    """From the states held at every layer, and from the heads' outputs that are held there."""
    engine = engines(shared_model(family, 3, 4), tiny_prompts(4, 4), Mean("conditional"))[0]
    edges = edges_of(engine)
    rows = slice(1, 4)
    expected = logits_of(engine, edges.mask[None])[0, rows]
    states = edges.passes.layers.states(engine.prompts.clean[rows], rows)
    for layer, (resid, z) in enumerate(zip(states.resid, states.z, strict=True)):
        assert difference(edges.passes.layers.logits(layer, resid, rows), expected) < TOLERANCE
        assert difference(edges.passes.layers.logits(layer, resid, rows, z), expected) < TOLERANCE
    assert difference(edges.passes.layers.logits(3, states.final, rows), expected) < TOLERANCE


@pytest.mark.parametrize(("family", "name"), [("llama", "mean_group"), ("gpt_neox_parallel", "halfway"), ("gpt2", "conditional_all")])
@pytest.mark.parametrize("level", LEVELS)
def test_a_frozen_edge_is_the_mask_without_it(family, name, level):
    engine = engines(shared_model(family, 3, 4), tiny_prompts(4, 4), PATCHERS[name])[0]
    edges = edges_of(engine, level=level, mlps="freeze")
    masks = torch.stack([edges.universe.without(edges.universe.full(), [edge]) for edge in edges.universe])
    alone = edges.alone(edges.universe.edges)
    assert difference(edges.score(masks), alone) < TOLERANCE
    assert (alone - engine.score(edges.mask[None])).abs().max() > 0.1 * alone.std()


@pytest.mark.parametrize(
    ("engine_class", "name"), [(PackedEngine, "zero"), (PackedEngine, "conditional_all"), (ReferenceEngine, "mean_all")]
)
def test_edges_that_lead_nowhere_change_nothing(engine_class, name):
    """A node none of whose kept edges leads to the logits may lose all that lead into it."""
    engine = engine_class(shared_model("mistral", 3, 4), tiny_prompts(4, 4), PATCHERS[name], LogitDiff())
    edges = edges_of(engine)
    masks = random_masks(2, len(edges.universe), keep=0.4)
    into_logits = torch.tensor([edge.dst == LOGITS for edge in edges.universe])
    masks[:, into_logits] = torch.tensor([edge.src.layer < 2 for edge in edges.universe if edge.dst == LOGITS])
    live = torch.stack([edges.universe.mask(edges.universe.live(mask)[1]) for mask in masks])
    assert (live.sum(1) < masks.sum(1)).all() and (live.sum(1) > into_logits.sum()).all()
    assert difference(edges.score(live), edges.score(masks)) < TOLERANCE


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_heads_that_share_keys_and_values_are_left_alone(which):
    """a1.h0 writes nothing, so whatever it reads changes no score, though a1.h1 uses the same keys and values."""
    model = tiny_model("llama", n_heads=4)
    with torch.no_grad():
        model.module(1, "out_proj").weight[:, : model.d_head] = 0.0
    circuit = Circuit(nodes("a0.h1", "m0", "a1.h0", "a1.h1", "m2"), 3, 4)
    edges = both(model, tiny_prompts(4, 4), Mean(), circuit)[which]
    full = edges.universe.full()
    whole = edges.score(full[None])[0]
    for head, changes in ((0, False), (1, True)):
        for port in "qkv":
            into = [Edge.parse(f"{src}->a1.h{head}<{port}>") for src in ("input", "a0.h1", "m0")]
            found = torch.cat([edges.alone(into), edges.score(edges.universe.without(full, into)[None])])
            moved = (found - whole).abs().amax(1) / whole.std()
            assert (moved > 1e-3).all() if changes else (moved < TOLERANCE).all()


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_a_head_is_patched_whole_when_ports_are_not_split(which):
    """An edge into the head is its three edges into queries, keys and values at once, and not the sum of what they do."""
    model, prompts = shared_model("gpt2", 3, 4), tiny_prompts(4, 4)
    circuit = Circuit(nodes("a0.h1", "m0", "a1.h1", "m2"), 3, 4)
    whole, split = (both(model, prompts, Mean(), circuit, level=level, mlps="freeze")[which] for level in LEVELS[::-1])
    into = ["a0.h1->a1.h1<q>", "a0.h1->a1.h1<k>", "a0.h1->a1.h1<v>"]
    expected = split.score(split.universe.without(split.universe.full(), into)[None])
    assert difference(whole.alone([Edge.parse("a0.h1->a1.h1")]), expected) < TOLERANCE
    none = split.score(split.universe.full()[None])
    summed = none + (split.alone([Edge.parse(name) for name in into]) - none).sum(0)
    assert difference(summed, expected) > 1e-3


def test_the_order_in_which_edges_are_asked_for_changes_nothing():
    edges = edges_of(engines(shared_model("llama", 3, 4), tiny_prompts(4, 4), Mean(), max_rows=8)[0])
    every = edges.alone(edges.universe.edges)
    some = [edges.universe.edges[place] for place in (9, 3, -1, 3)]
    assert difference(edges.alone(some), every[[9, 3, -1, 3]]) < TOLERANCE
    assert edges.alone([]).shape == (0, 4)


# --- What it costs, counted -------------------------------------------------------------------------------------------------------------

N_LAYERS = 3


def counted(max_rows: int | None, mlps: str = "recompute", n: int = 4) -> tuple[PackedEngine, PackedEdges]:
    """An engine that has made its replacements, and whose work is counted from here on."""
    model = shared_model("gpt2", N_LAYERS, 4)
    engine = PackedEngine(model, tiny_prompts(n, 4), Mean(), LogitDiff(), max_rows=max_rows)
    edges = PackedEdges(
        engine, Circuit(nodes("a0.h1", "m0", "a1.h0", "a1.h3", "m1", "a2.h2", "m2"), N_LAYERS, 4), mlps=mlps, patcher=Resample()
    )
    engine.score(engine.universe.full()[None])  # the untouched model, which every metric is held against
    return engine, edges


def into_layers(graph: EdgeUniverse) -> tuple[list[int], list[int]]:
    """How many edges lead into the heads and into the MLP of each layer: 3, 3 x 2 x 3, 3 x 6 and 2, 5, 7 here."""
    heads = [sum(edge.dst.head is not None and edge.dst.layer == layer for edge in graph) for layer in range(N_LAYERS)]
    mlps = [sum(edge.dst == Node.of_mlp(layer) for edge in graph) for layer in range(N_LAYERS)]
    return heads, mlps


@pytest.mark.parametrize(
    ("max_rows", "n", "mlps"), [(None, 4, "recompute"), (8, 4, "freeze"), (13, 4, "recompute"), (3, 7, "recompute"), (1, 2, "freeze")]
)
def test_passes_for_every_edge(max_rows, n, mlps):
    """Edges into heads of layer l compute layers l and on, those into its MLP layers l + 1 and on, those into m2 and the logits none.

    Passes of one receiver's layer are full but the last. So, a slice: one for the states, the edges that need layers over the edges that
    fit a pass, and at most one more for each of the 2 x 3 - 1 places of receivers that need layers.
    """
    engine, edges = counted(max_rows, mlps, n)
    assert into_layers(edges.universe) == ([3, 18, 18], [2, 5, 7])
    heads, into_mlps = into_layers(edges.universe)
    before = engine.work.passes, engine.work.layer_rows
    edges.alone(edges.universe.edges)
    passes, layer_rows = engine.work.passes - before[0], engine.work.layer_rows - before[1]
    assert layer_rows == n * (2 * 3 + 3 * heads[0] + 2 * heads[1] + heads[2] + 2 * into_mlps[0] + into_mlps[1])
    needing = sum(heads) + sum(into_mlps[:-1])
    step = min(max_rows or n, n)
    slices = [min(step, n - first) for first in range(0, n, step)]
    copies = [max(1, engine.budget.rows // rows) for rows in slices]
    exact = sum(1 + sum(ceil(part / fit) for part in (*heads, *into_mlps[:-1])) for fit in copies)
    assert passes == exact <= sum(1 + ceil(needing / fit) + 2 * N_LAYERS - 1 for fit in copies)


def test_states_are_computed_once_a_slice():
    engine, edges = counted(max_rows=3, n=7)
    edges.alone(edges.universe.edges[:1])
    before = engine.work.layer_rows
    edges.alone([Edge.parse("m2->logits")])
    edges.alone([Edge.parse("a1.h0->m2")])  # from layer 3 on: nothing but the unembedding
    edges.score(edges.universe.without(edges.universe.full(), ["input->logits"])[None])
    assert engine.work.layer_rows == before


@pytest.mark.parametrize("max_rows", [None, 9, 3])
def test_no_pass_is_larger_than_allowed(max_rows, monkeypatch):
    engine, edges = counted(max_rows)
    rows, run = [], HookedModel.run
    monkeypatch.setattr(HookedModel, "run", lambda self, ids, *args, **kwargs: rows.append(len(ids)) or run(self, ids, *args, **kwargs))
    edges.alone(edges.universe.edges)
    edges.score(random_masks(7, len(edges.universe)))
    assert max(rows) <= engine.budget.rows and (max_rows is None or max(rows) > max_rows / 2)


def test_modules_outside_of_the_circuit_are_left_uncomputed():
    """No MLP but the last, and no head of the last layer, is a member: these may break."""
    model = tiny_model("gpt2")
    edges = both(model, tiny_prompts(4, 4), Zero(), Circuit(nodes("a1.h0", "m2"), 3, 2))[0]
    edges.engine.score(edges.engine.universe.full()[None])  # the untouched model, which every metric is held against
    with failing(model.module(0, "mlp"), RuntimeError("computed"), 99), failing(model.module(2, "attention"), RuntimeError("computed"), 99):
        edges.alone(edges.universe.edges)
        edges.score(random_masks(3, len(edges.universe)))


def test_blank_tokens_are_not_taken_for_padding(monkeypatch):
    """Attention that runs alone is given token 0, which is the padding of many a model; transformers would warn of it."""
    model, blank = tiny_model("gpt2"), []
    model.hf.config.pad_token_id = 0

    def warn(self, ids, mask):
        blank.append(mask is None and not ids.any())

    monkeypatch.setattr(transformers.PreTrainedModel, "warn_if_padding_and_no_attention_mask", warn)
    edges = edges_of(engines(model, tiny_prompts(4, 4), Mean())[0])
    scored(edges)
    assert blank and not any(blank)


# --- Memory, and the model afterwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "rows"),
    [
        (lambda call, rows: call in (1, 9), 4),  # in the states of the first slice, and behind them
        (lambda call, rows: call == 30, 8),
        (lambda call, rows: rows > 8, 8),
        (lambda call, rows: rows > 3, 2),  # fewer than there are prompts: these are taken in slices
    ],
    ids=["twice", "late", "packed", "sliced"],
)
def test_memory_that_runs_out_in_the_middle_halves_the_passes_and_changes_no_number(fails, rows, monkeypatch):
    expected = scored(counted(None)[1])
    engine, edges = counted(max_rows=16)
    calls, run = [], HookedModel.run

    def sometimes(self, ids, *args, **kwargs):
        calls.append(len(ids))
        if fails(len(calls), len(ids)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(HookedModel, "run", sometimes)
    found = scored(edges)
    assert engine.budget.rows == rows
    for values, wanted in zip(found, expected, strict=True):
        assert difference(values, wanted) < TOLERANCE


def scored(edges: EdgeEngine) -> list[torch.Tensor]:
    return [edges.alone(edges.universe.edges), edges.score(random_masks(5, len(edges.universe)))]


def test_memory_that_does_not_hold_one_prompt_is_a_sentence(monkeypatch):
    _, edges = counted(None)
    monkeypatch.setattr(type(edges.passes.layers), "attend", lambda *_: (_ for _ in ()).throw(MemoryError()))
    for work in (lambda: edges.alone(edges.universe.edges), lambda: edges.score(edges.universe.empty()[None])):
        with pytest.raises(MeasurementError, match="Memory ran out in a pass with a single prompt"):
            work()


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_the_model_is_left_as_it_was(which):
    model = tiny_model("qwen3", n_heads=4)
    before = state_of(model)
    circuit = Circuit(nodes("a0.h1", "m0", "a1.h3", "m2"), 3, 4)
    edges = both(model, tiny_prompts(4, 4), PATCHERS["halfway"], circuit)[which]
    values = scored(edges)
    assert same_state(before, state_of(model))
    with failing(model.module(2, "mlp"), ValueError("half-way")), pytest.raises(ValueError, match="half-way"):
        scored(edges)
    assert same_state(before, state_of(model))
    assert all(torch.equal(one, other) for one, other in zip(scored(edges), values, strict=True))


# --- What is refused --------------------------------------------------------------------------------------------------------------------

MODEL_2X2 = Circuit(nodes("a0.h0", "m1"), 2, 2)


@pytest.mark.parametrize("engine_class", [PackedEngine, ReferenceEngine])
@pytest.mark.parametrize(
    ("circuit", "options", "error", "text"),
    [
        (Circuit(nodes("a0.h0"), 12, 12, "gpt2-small"), {}, CircuitError, "found in gpt2-small with 12 layers x 12 heads, but .* 2 x 2"),
        (Circuit(nodes("a0.h0"), 2, 2, "another"), {}, CircuitError, "was found in the model 'another', not in 'tiny-gpt2'"),
        (Circuit(nodes("a0.h0"), 2, 2, level=Level.EDGE), {}, CircuitError, "circuit of edges .* and a circuit of nodes was expected"),
        (Circuit((), 2, 2), {}, CircuitError, "The circuit is empty"),
        (MODEL_2X2, {"level": "node"}, ConfigError, "no level of edges named 'node'.*Choices: edge, edge_qkv"),
        (MODEL_2X2, {"level": "edges"}, ConfigError, "Did you mean 'edge'"),
        (MODEL_2X2, {"mlps": "frozen"}, ConfigError, "no way to treat MLPs .* named 'frozen'. Did you mean 'freeze'"),
    ],
)
def test_circuits_and_settings_that_do_not_fit(engine_class, circuit, options, error, text):
    engine = engine_class(shared_model("gpt2", 2, 2), tiny_prompts(2, 3), Zero(), LogitDiff())
    with pytest.raises(error, match=text):
        engine.edges(circuit, **options)


def test_a_circuit_of_edges_where_one_of_nodes_is_expected():
    engine = engines(shared_model("gpt2", 2, 2), tiny_prompts(2, 3), Zero())[0]
    circuit = Circuit(nodes("a0.h0", "m1"), 2, 2, level=Level.EDGE, edges=(Edge.parse("a0.h0->m1"),))
    with pytest.raises(CircuitError, match=r"Take the file of the node circuit .*Circuit.nodes_only\(\)"):
        Knockout(circuit).discover(engine, on_step=lambda step: None)


def test_an_engine_of_positions_and_one_of_another_kind():
    model, prompts = shared_model("gpt2", 2, 2), tiny_prompts(2, 3)
    with pytest.raises(CircuitError, match="Edges are between whole components"):
        PackedEngine(model, prompts, Zero(), LogitDiff(), model.universe.at(["last"])).edges(MODEL_2X2)

    class Own(ReferenceEngine.__base__):
        def passes(self, masks, base=None):
            raise NotImplementedError

        def clean_logits(self):
            raise NotImplementedError

    with pytest.raises(MeasurementError, match="scored by the packed and by the reference engine, and this is a Own"):
        Own(model, prompts, Zero(), LogitDiff()).edges(MODEL_2X2)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_edges_and_masks_of_another_graph(which):
    edges = both(shared_model("gpt2", 2, 2), tiny_prompts(2, 3), Resample(), MODEL_2X2)[which]
    with pytest.raises(CircuitError, match="runs against the causal order"):
        edges.alone([Edge.parse("m1->a0.h0<q>")])
    with pytest.raises(CircuitError, match="m0 is not among its senders"):
        edges.alone([Edge.parse("m0->m1")])
    full = edges.universe.full()
    for masks in (full, full[None, 1:], full[None].float()):
        with pytest.raises(MeasurementError, match=f"boolean table of masks x {len(full)} units"):
            edges.score(masks)
    with pytest.raises(MeasurementError, match="The list of masks is empty"):
        edges.score(full[None][:0])


@pytest.mark.parametrize("level", [Level.EDGE, Level.EDGE_QKV])
def test_the_first_layer_into_which_an_edge_is_removed(level):
    """Of every mask at once, against edge by edge; the removed edges of a pass likewise."""
    engine = PackedEngine(tiny_model("llama"), tiny_prompts(), Zero(), LogitDiff()).edges(level=level)
    universe, n_layers = engine.universe, engine.model.n_layers
    masks = torch.rand(40, len(universe), generator=torch.Generator().manual_seed(0)) < torch.linspace(0.5, 1, 40)[:, None]
    masks[0], masks[1, :] = True, True
    masks[1, -1] = False  # into the logits
    into = [n_layers if edge.dst == LOGITS else edge.dst.layer for edge in universe.edges]
    expected = [min([layer for layer, kept in zip(into, mask.tolist(), strict=True) if not kept], default=n_layers + 1) for mask in masks]
    assert engine._pruned.first_layers(masks).tolist() == expected and {n_layers, n_layers + 1} < set(expected)
    removed = _Removed(universe, masks[2:4])
    for place, edge in enumerate(universe.edges):
        gone = ~masks[2:4, place]
        assert removed.any(edge.dst) or not gone.any()
        if gone.any():
            assert removed._into[edge.dst][edge.src].tolist() == gone.tolist() and edge.src in removed.senders
