"""Models whose weights are set by hand, and the numbers that follow by hand. Both engines must give just these."""

from __future__ import annotations

import pytest
import torch
import transformers
from models_for_tests import MICRO_PROMPTS, engines, linear_llama, micro_model, wire_head, wire_mlp

from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.proof.quick import quick_check
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return micro_model()


EXPECTED = {
    # patcher, removed: logit differences of the two prompts
    ("zero", ""): (131.0, 65.0),  # heads 12 and 6; 12 + 120 - 1, 6 + 60 - 1
    ("zero", "a0.h0"): (87.0, 43.0),  # heads 8 and 4
    ("zero", "a0.h1"): (43.0, 21.0),  # heads 4 and 2
    ("zero", "m0"): (11.0, 5.0),  # heads alone
    ("zero", "a0.h0 a0.h1"): (-1.0, -1.0),
    ("zero", "a0.h0 a0.h1 m0"): (-1.0, -1.0),
    ("mean", "a0.h0"): (109.0, 65.0),  # head 0 gives (1 + 3) / 2 = 2: heads 10 and 6
    ("mean", "a0.h1"): (87.0, 65.0),  # head 1 gives 4: heads 8 and 6
    ("mean", "m0"): (71.0, 65.0),  # corrupt heads 3 and 9, MLP 30 and 90, mean 60
    ("mean", "a0.h0 m0"): (69.0, 65.0),
    ("mean", "a0.h0 a0.h1 m0"): (65.0, 65.0),
    ("group", "a0.h0"): (98.0, 76.0),  # each group's own mean: heads 1 + 8 and 3 + 4
    ("group", "m0"): (41.0, 95.0),  # MLP 30 and 90
    ("resample", "a0.h1"): (65.0, 87.0),  # heads 4 + 2 and 2 + 6
    ("resample", "a0.h0 a0.h1 m0"): (32.0, 98.0),  # the corrupt run: 3 + 30 - 1, 9 + 90 - 1
    # Heads out: the corrupt run's MLP sees their means, 2 + 4 = 6 for both prompts, so the conditional mean is 60 as well. With head 0 out
    # it sees 2 + 2 and 2 + 6: mean 60 again. The model is linear, so only conditional group means differ.
    ("conditional", "a0.h0 m0"): (69.0, 65.0),
    ("conditional_group", "a0.h0 m0"): (38.0, 96.0),  # plain heads' group means: 1 and 3; the same corrupt run as before
}
PATCHERS = {
    "zero": Zero(),
    "mean": Mean(),
    "group": Mean(pool="group"),
    "resample": Resample(),
    "conditional": Mean("conditional"),
    "conditional_group": Mean("conditional", "group"),
}


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(("name", "removed"), sorted(EXPECTED))
def test_logit_differences(model, name, removed, which):
    engine = engines(model, MICRO_PROMPTS, PATCHERS[name])[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    torch.testing.assert_close(engine.score(mask[None])[0], torch.tensor(EXPECTED[name, removed]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_whole_logits(model, which):
    engine = engines(model, MICRO_PROMPTS, Zero())[which]
    expected = torch.zeros(2, 8)
    expected[:, 1], expected[:, 2] = torch.tensor([132.0, 66.0]), 1.0
    torch.testing.assert_close(engine.clean_logits(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
def test_scores_are_ratios_of_means(model, which):
    """(87 + 43) / (131 + 65) = 66.33 %. The mean of the two ratios would be 66.28 %."""
    engine = engines(model, MICRO_PROMPTS, Zero())[which]
    graph = engine.universe
    masks = torch.stack([graph.full(), graph.without(graph.full(), ["a0.h0"]), graph.empty()])
    expected = torch.tensor([100.0, 100 * 130 / 196, -100 * 2 / 196], dtype=torch.float64)
    torch.testing.assert_close(engine.percent(masks), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PATCHERS))
def test_all_kept_is_exactly_100_percent(model, name):
    for engine in engines(model, MICRO_PROMPTS, PATCHERS[name]):
        assert engine.percent(engine.universe.full()[None]).tolist() == [100.0]


def test_the_empty_circuit_is_the_corrupt_mean_run(model):
    """Everything replaced by means: 6 from the heads and 60 from the MLP, whatever the prompt; for Resample, the corrupt run."""
    fast, naive = engines(model, MICRO_PROMPTS, Mean())
    assert fast.baseline().patched.tolist() == naive.baseline().patched.tolist() == [65.0, 65.0]
    fast, _ = engines(model, MICRO_PROMPTS, Resample())
    corrupt = model.hf(MICRO_PROMPTS.corrupt).logits[:, -1]
    torch.testing.assert_close(fast.all_logits(fast.universe.empty()[None])[0], corrupt, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        # A head's z at the last position is only read there: as if it were removed everywhere, as nothing comes after.
        ("a0.h0@last", (87.0, 43.0)),
        # An output at an earlier position never reaches the last one in a model of one layer.
        ("a0.h0@0", (131.0, 65.0)),
        ("m0@last", (11.0, 5.0)),
        ("m0@0 a0.h1@last", (43.0, 21.0)),
    ],
)
def test_single_positions(model, removed, expected, which):
    engine = engines(model, MICRO_PROMPTS, Zero(), Universe.of_nodes(1, 2, ("0", "last")))[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    torch.testing.assert_close(engine.score(mask[None])[0], torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("means", "removed", "expected"),
    [
        ("plain", "m0", (56.0, 50.0)),  # corrupt heads 3 and 9, squares 9 and 81, mean 45; clean heads 12 and 6
        ("conditional", "m0", (56.0, 50.0)),  # no head is out
        ("plain", "a0.h0 m0", (54.0, 50.0)),  # head 0 gives 2: heads 10 and 6, and the same 45
        ("conditional", "a0.h0 m0", (49.0, 45.0)),  # the corrupt heads are then 2 + 2 and 2 + 6, squares 16 and 64, mean 40
        ("conditional", "a0.h0", (109.0, 41.0)),  # the MLP is in: it squares 10 and 6
        ("conditional", "a0.h0 a0.h1 m0", (41.0, 41.0)),  # heads 2 + 4, square 36
        ("plain", "a0.h0 a0.h1 m0", (50.0, 50.0)),
    ],
)
def test_conditional_means_differ_where_the_mlp_is_not_linear(means, removed, expected, which):
    model = linear_llama(n_layers=1, n_heads=2, d_model=4, vocab=8)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        wire_head(model, 0, 0, 1, 2, 1.0)
        wire_head(model, 0, 1, 1, 2, 2.0)
        wire_mlp(model, 0, 2, 3, 1.0)
        gate = model.module(0, "mlp").gate_proj.weight
        gate[0, 0], gate[0, 2] = 0.0, 1.0  # it adds the square of dimension 2
        model.hf.lm_head.weight[1, 2] = model.hf.lm_head.weight[1, 3] = model.hf.lm_head.weight[2, 0] = 1.0
    engine = engines(model, MICRO_PROMPTS, Mean(means))[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    torch.testing.assert_close(engine.score(mask[None])[0], torch.tensor(expected), rtol=0, atol=1e-4)


# Two layers: the second reads what the first wrote at earlier positions


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        # Layer 0's MLP copies the value (4, 8, 6) to dimension 2; layer 1's head averages it: 6.
        ("", 6.0),
        ("m0@0", 14 / 3),  # (0 + 8 + 6) / 3
        ("m0@last", 4.0),  # (4 + 8 + 0) / 3
        ("m0@0 m0@last", 8 / 3),
        ("a1.h0@0", 6.0),
        ("a1.h0@last", 0.0),
    ],
)
def test_positions_that_a_later_layer_reads(removed, expected, which):
    model = linear_llama(n_layers=2, n_heads=1, d_model=4, vocab=10)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(10.0)
        wire_mlp(model, 0, 1, 2, 1.0)
        wire_head(model, 1, 0, 2, 3, 1.0)
        model.hf.lm_head.weight[1, 3] = 1.0
    one = torch.tensor([1])
    prompts = PromptSet(torch.tensor([[4, 8, 6]]), torch.tensor([[0, 0, 0]]), one, one + 1, one - 1)
    engine = engines(model, prompts, Zero(), Universe.of_nodes(2, 1, ("0", "last")))[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    assert engine.score(mask[None]).item() == pytest.approx(expected, abs=1e-5)


# GPT-2, with LayerNorm, biases and transposed weights


@pytest.fixture(scope="module")
def gpt2() -> HookedModel:
    """Every number is written as +a in one dimension and -a in the next, so that its mean is zero and the LayerNorm changes nothing.

    Pairs: (0, 1) the token's value, (2, 3) the heads, (4, 5) the MLP. Biases: the output projection adds 0.5 to the heads' pair and stays
    when heads are replaced; the MLP's adds 3 to its own and goes with it.
    """
    config = transformers.GPT2Config(
        n_embd=6, n_head=2, n_layer=1, n_inner=1, n_positions=8, vocab_size=10, activation_function="relu", layer_norm_epsilon=2.0**40,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(2.0**20 if "ln_" in name and name.endswith("weight") else 0.0)
        values = torch.arange(10.0)
        hf.transformer.wte.weight[:, 0], hf.transformer.wte.weight[:, 1] = values, -values
        block = hf.transformer.h[0]
        block.attn.c_attn.weight[0, 12] = 1.0  # value of head 0, first of its three dimensions: the token's value
        block.attn.c_attn.weight[0, 15] = 1.0  # head 1
        for place, weight in ((0, 1.0), (3, 2.0)):
            block.attn.c_proj.weight[place, 2], block.attn.c_proj.weight[place, 3] = weight, -weight
        block.attn.c_proj.bias[2], block.attn.c_proj.bias[3] = 0.5, -0.5
        block.mlp.c_fc.weight[2, 0] = 1.0
        block.mlp.c_proj.weight[0, 4], block.mlp.c_proj.weight[0, 5] = 10.0, -10.0
        block.mlp.c_proj.bias[4], block.mlp.c_proj.bias[5] = 3.0, -3.0
        hf.lm_head.weight[1, 2] = hf.lm_head.weight[1, 4] = 1.0
    return HookedModel(hf, name="by-hand")


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("patcher", "removed", "expected"),
    [
        (Zero(), "", 140.5),  # value 4: heads 4 + 8 + 0.5 = 12.5, MLP 125 + 3
        (Zero(), "a0.h0", 96.5),  # 8.5, 88
        (Zero(), "a0.h1", 52.5),  # 4.5, 48
        (Zero(), "m0", 12.5),  # the MLP's own bias goes with it
        (Zero(), "a0.h0 a0.h1", 8.5),  # 0.5, 8: the attention's bias stays
        (Zero(), "a0.h0 a0.h1 m0", 0.5),
        (Mean(), "a0.h0", 107.5),  # corrupt value 1: 1 + 8 + 0.5 = 9.5, 98
        (Mean(), "m0", 50.5),  # corrupt heads 3.5, MLP 38; 12.5 + 38
        (Resample(), "a0.h0 a0.h1 m0", 41.5),  # 3.5 + 38
    ],
)
def test_gpt2_by_hand(gpt2, patcher, removed, expected, which):
    one = torch.tensor([1])
    prompts = PromptSet(torch.tensor([[7, 3, 2]]), torch.tensor([[2, 1, 0]]), one, one + 1, one - 1)
    engine = engines(gpt2, prompts, patcher)[which]
    mask = engine.universe.without(engine.universe.full(), removed.split())
    assert engine.score(mask[None]).item() == pytest.approx(expected, abs=1e-4)


def test_the_self_check_accepts_the_model_by_hand(model):
    quick_check(engines(model, MICRO_PROMPTS, Mean())[0])
