"""Any module that maps token ids to logits: heads, mixers, layers without MLP, positions that read later ones, by a map given by hand."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models_for_tests import PATCHERS, difference, engines, logits_of, random_masks, same_state, state_of
from own_modules import VOCAB, Own, map_by_hand
from rich.console import Console
from transformers import T5Config, T5ForConditionalGeneration

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ModelError, PromptError
from circuitkit.core.node import Kind, Level
from circuitkit.core.prompts import PromptSet
from circuitkit.engine.base import Engine
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.proof.doctor import Patient, examine
from circuitkit.jobs.map_tree import map_tree
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import KL
from circuitkit.models.hooked import HookedModel
from circuitkit.models.layer import Layer
from circuitkit.models.resolve import resolve
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.storage import load, save

KINDS = {"heads": ("hm", "hm", "hm"), "hybrid": ("hm", "xm", "m", "h", "xm"), "mixers": ("xm", "x"), "mixer last": ("hm", "x")}


def made(kinds=("hm", "hm"), causal=True) -> HookedModel:
    own = Own(kinds, causal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnsight says that it renames `input` and `output`
        return HookedModel(own, map=map_by_hand(own), name="own")


def prompts(behind: bool = False, n: int = 6, n_pos: int = 5) -> PromptSet:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, VOCAB, (2, n, n_pos), generator=generator)
    answers = torch.randint(0, VOCAB, (n,), generator=generator)
    places = torch.arange(n) % n_pos if behind else None
    return PromptSet(clean, corrupt, answers, (answers + 1) % VOCAB, torch.arange(n) % 2, ("a", "b"), behind=places)


@pytest.mark.parametrize("patcher", PATCHERS, ids=str)
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_packed_is_the_naive_path(kinds, patcher):
    model = made(KINDS[kinds])
    packed, naive = engines(model, prompts(), PATCHERS[patcher])
    masks = torch.cat([random_masks(5, len(model.universe)), packed.universe.empty()[None], packed.universe.full()[None]])
    assert difference(logits_of(packed, masks), logits_of(naive, masks)) < 1e-5


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_positions_and_bases(kinds):
    model = made(KINDS[kinds])
    universe = model.universe.at(("1", "last"))
    packed, naive = engines(model, prompts(), Resample(), universe)
    masks = random_masks(6, len(universe))
    assert difference(logits_of(packed, masks), logits_of(naive, masks)) < 1e-5
    base = universe.full()
    single = torch.stack([universe.without(base, [unit]) for unit in universe.nodes])
    assert difference(logits_of(packed, single, base), logits_of(naive, single)) < 1e-5


@pytest.mark.parametrize("behind", [False, True])
def test_positions_that_read_later_ones(behind):
    """No cone and no narrowing; and what stands behind the scored position counts."""
    model = made(KINDS["hybrid"], causal=False)
    given = prompts(behind)
    packed, naive = engines(model, given, Mean(pool="group"))
    masks = random_masks(6, len(model.universe))
    assert difference(logits_of(packed, masks), logits_of(naive, masks)) < 1e-5
    plain = Own(KINDS["hybrid"], causal=False)(given.clean)
    at = given.n_pos - 1 - given.behind
    assert torch.equal(naive.clean_logits(), plain[torch.arange(len(given)), at])
    later = given.clean.clone()
    later[:, -1] = (later[:, -1] + 1) % VOCAB
    changed = engines(model, replace(given, clean=later), Zero())[0].clean_logits()
    assert not torch.equal(changed, packed.clean_logits()), "the last token is read at all positions"


def test_units_are_what_there_is():
    names = [str(node) for node in made(KINDS["hybrid"]).universe]
    assert names == ["a0.h0", "a0.h1", "a0.h2", "m0", "a1", "m1", "m2", "a3.h0", "a3.h1", "a3.h2", "a4", "m4"]
    assert made(KINDS["hybrid"]).universe.level is Level.NODE
    assert [str(node) for node in made(KINDS["mixers"]).universe] == ["a0", "m0", "a1"]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_every_check_of_the_doctor(kinds):
    model = made(KINDS[kinds])
    patient = Patient(model, prompts(), Zero(), Resample(), Mean(), Mean("conditional"), KL())
    before = state_of(model)
    failed = [check for check in examine(patient) if not check.passed]
    assert not failed
    assert same_state(before, state_of(model))


def test_a_search_and_a_circuit_file(tmp_path):
    model = made(KINDS["hybrid"])
    given = prompts()
    clean, corrupt = (model.run(ids)[:, -1] for ids in (given.clean, given.corrupt))
    solvable = PromptSet(given.clean, given.corrupt, clean.argmax(-1), (corrupt - clean).argmax(-1), given.groups, given.group_names)
    engine = engines(model, solvable, Mean())[0]
    engine.check()
    scores = Knockout().discover(engine, on_step=lambda step: None)
    assert set(scores.values) == {str(node) for node in model.universe}
    circuit = IterativePruning(threshold=0.8).discover(engine, on_step=lambda step: None)
    save(circuit, tmp_path / "circuit.json")
    again = load(Circuit, tmp_path / "circuit.json")
    assert again.nodes == circuit.nodes and engine.percent(again.mask(engine.universe)[None]).item() >= 80


def test_edges_of_heads_and_mlps():
    model = made(KINDS["heads"])
    packed, naive = engines(model, prompts(), Mean())
    fast, slow = PackedEdges(packed), ReferenceEdges(naive)
    masks = random_masks(2, len(fast.universe), keep=0.9)
    assert torch.allclose(fast.score(masks), slow.score(masks), atol=1e-4)


@pytest.mark.parametrize("kinds", ["mixers", "hybrid"])
def test_edges_of_mixers(kinds):
    packed, naive = engines(made(KINDS[kinds]), prompts(), Mean())
    fast, slow = packed.edges(), naive.edges()
    assert any(edge.src.kind is Kind.ATTENTION for edge in fast.universe.edges)
    masks = random_masks(2, len(fast.universe), keep=0.9)
    assert torch.allclose(fast.score(masks), slow.score(masks), atol=1e-4)


@pytest.mark.parametrize("kinds", ["heads", "hybrid"])
def test_gradients_are_finite_differences(kinds):
    model = made(KINDS[kinds])
    model.hf.double()
    engine = engines(model, prompts(), Resample())[0]
    gradients, at = engine.gradients(), torch.full((len(model.universe),), 0.6, dtype=torch.float64)
    found = gradients.grad(at)
    for place in range(len(at)):
        step = torch.zeros_like(at)
        step[place] = 1e-4
        slope = (gradients.loss(at + step) - gradients.loss(at - step)) / 2e-4
        assert found[place].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-5)


def test_gradients_need_the_last_position():
    engine: Engine = engines(made(causal=False), prompts(behind=True), Resample())[0]
    with pytest.raises(PromptError, match="A gradient reads the last position of each prompt, and in 4 of 6 prompts tokens stand behind"):
        engine.gradients()


def test_only_what_is_asked_for_is_unembedded():
    model, seen = made(), []
    model.hf.unembed.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    ids = prompts().clean
    whole = model.run(ids, lambda layer: None, keep=0)
    assert torch.equal(model.run(ids, lambda layer: None, keep=2), whole[:, -2:]) and model.run(ids).shape[1] == 1
    assert seen[:2] == [5, 2]


def test_padding_is_refused():
    given = prompts()
    shorter = replace(given, pads=torch.tensor([0, 0, 0, 0, 0, 1]), corrupt=torch.cat([given.clean[:, :1], given.corrupt[:, 1:]], 1))
    with pytest.raises(ModelError, match=r"The forward of own \(own\) takes no attention_mask, .* Take prompts of equal length"):
        engines(made(), shorter, Zero())[0].clean_logits()


def test_a_tuple_is_given_whole_when_a_module_is_left_out():
    model, ids = made(("xm",)), prompts().clean
    seen = []

    def keep(layer: Layer) -> None:
        seen.append(layer.attention_out)

    expected = model.run(ids, keep)
    assert torch.equal(model.run(ids, lambda layer: layer.skip_attention(seen[0])), expected)


def test_maps_that_cannot_be_right():
    own = Own()
    right = map_by_hand(own)
    with pytest.raises(ModelError, match="The map of Own: There is no module named 'layers.0.mpl.output'. Did you mean"):
        HookedModel(own, map=replace(right, blocks=(replace(right.blocks[0], neurons="layers.0.mpl.output"),)))
    with pytest.raises(ModelError, match="names a module for two layers"):
        HookedModel(own, map=replace(right, blocks=right.blocks[:1] * 2))
    with pytest.raises(ModelError, match="has no layers"):
        HookedModel(own, map=replace(right, blocks=()))


def test_an_encoder_with_a_decoder_is_refused():
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="has an encoder and a decoder"):
        HookedModel(T5ForConditionalGeneration(config))


def test_scored_positions_that_are_outside():
    given = prompts()
    with pytest.raises(PromptError, match="6 numbers of tokens behind the scored position, .* found 6 numbers, of 5 to 5"):
        replace(given, behind=torch.full((6,), 5))
    assert replace(given, behind=torch.zeros(6, dtype=torch.long)).content_hash() == given.content_hash()
    assert replace(given, behind=torch.ones(6, dtype=torch.long)).content_hash() != given.content_hash()


def test_logit_difference_at_the_scored_position():
    """By hand: the metric of the untouched model is that of its own logits at the mask token."""
    model = made(causal=False)
    given = prompts(behind=True)
    found = engines(model, given, Zero())[0].score(model.universe.full()[None])[0]
    logits = Own(causal=False)(given.clean)[torch.arange(6), given.n_pos - 1 - given.behind]
    rows = torch.arange(6)
    assert torch.allclose(found, logits[rows, given.answers.tokens] - logits[rows, given.wrongs.tokens], atol=1e-5)


def test_the_example(monkeypatch):
    """The script that shows a model of one's own: no map is given, and what is found is what the naive path says."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    import own_model

    scores, circuit = own_model.main()
    assert list(scores.values) == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]
    assert circuit.score >= 80 and len(circuit) < 10
    assert circuit.heads, "what the first token was is carried to the last position by heads"


@pytest.mark.parametrize("kinds", ["heads", "hybrid"])
def test_found_and_given_by_hand_are_the_same(kinds):
    own = Own(KINDS[kinds])
    given = map_by_hand(own)
    found = resolve(own)
    for one, other in zip(found.blocks, given.blocks, strict=True):
        assert one.attention == other.attention and one.mlp == other.mlp and one.is_mixer == other.is_mixer
        assert (one.heads is None) == (other.heads is None)
        assert one.heads is None or other.heads is None or one.heads.out_proj == other.heads.out_proj


def test_the_map_as_a_tree():
    own = Own(KINDS["hybrid"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(map_tree(map_by_hand(own), "mine"))
    text = console.export_text()
    assert "mine: own, positions read earlier ones, no cache of keys and values, attention of its own, given, not found" in text
    for line in (
        "embedding: embed", "layer 0: layers.0", "attention: attention, reads norms.0", "3 heads of 4: what attention.out reads",
        "queries, keys, values: attention.qkv, attention.qkv from column 12, attention.qkv from column 24", "mixer: attention[0], reads",
        "MLP: mlp, reads norms.1", "neurons: what mlp.output reads", "unembedding: unembed",
    ):  # fmt: skip
        assert line in text, line
