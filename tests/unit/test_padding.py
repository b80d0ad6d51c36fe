"""Prompts of different lengths in one set: every shortcut against the naive path, one prompt or template at a time, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, PATCHERS, Halfway, difference, logits_of, random_masks, shared_model, tiny_model, tiny_prompts
from test_coordinates_property import KINDS
from test_coordinates_property import Case as UnitCase
from test_tasks import wrap
from tokenizers import pre_tokenizers

from circuitkit.analysis.attention import mean_patterns
from circuitkit.analysis.direct_attribution import direct_attribution
from circuitkit.analysis.logit_lens import logit_lens
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import MeasurementError, PromptError
from circuitkit.core.prompts import Prompt, PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.filtering import Solves
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.doctor import Patient, examine
from circuitkit.engine.proof.quick import few, quick_check
from circuitkit.jobs.doctor import prompts as doctors_prompts
from circuitkit.metrics import KL, LogitDiff
from circuitkit.models import slices
from circuitkit.patchers import Mean, Patcher, Resample, Zero
from circuitkit.tasks import FromFile
from circuitkit.tasks.encoding import Encoder, encode

TOLERANCE = 1e-5
FEW = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
AVERAGING = {name for name, patcher in PATCHERS.items() if patcher.needs.source == "mean"}


def ragged(lengths: list[int], groups: list[int], seed: int = 0, same: int = 0, garbage: int = 0) -> PromptSet:
    """Prompts of these lengths; ``same`` first tokens of twins are equal, and ``garbage`` is what stands in the padding."""
    drawn = tiny_prompts(len(lengths), max(lengths), seed=seed)
    pads = max(lengths) - torch.tensor(lengths)
    clean, corrupt = drawn.clean.clone(), drawn.corrupt.clone()
    places = torch.arange(max(lengths)) - pads[:, None]
    corrupt[places < same] = clean[places < same]
    clean[places < 0] = corrupt[places < 0] = garbage
    spans = {"S1": (torch.arange(len(lengths)) + seed) % (torch.tensor(lengths) - 1)}
    names = tuple(f"g{group}" for group in range(max(groups) + 1))
    return PromptSet(clean, corrupt, drawn.answers, drawn.wrongs, torch.tensor(groups), names, spans, pads=pads)


def parts(prompts: PromptSet, patcher: Patcher) -> list[torch.Tensor]:
    """Rows that can be run without padding: templates where means are taken over them, else single prompts."""
    if patcher.needs.source == "mean":
        return [(prompts.groups == group).nonzero().flatten() for group in prompts.groups.unique()]
    return list(torch.arange(len(prompts)).split(1))


def unpadded(model, prompts, patcher, universe, masks) -> torch.Tensor:
    """Logits by the definition, from sets that have no padding at all."""
    logits = torch.empty(len(masks), len(prompts), model.d_vocab)
    for rows in parts(prompts, patcher):
        alone = prompts.take(rows)
        assert not alone.is_padded and alone.padding(slice(0, len(alone))) == {}
        logits[:, rows] = ReferenceEngine(model, alone, patcher, LogitDiff(), universe).all_logits(masks)
    return logits


@dataclass(frozen=True)
class Case:
    family: str
    n_layers: int
    lengths: tuple[int, ...]
    patcher: str
    spans: tuple[str, ...]
    max_rows: int | None
    stride: int
    seed: int
    same: int

    def prompts(self) -> PromptSet:
        lengths = list(self.lengths)
        groups = sorted(set(lengths))
        return ragged(lengths, [groups.index(length) for length in lengths], self.seed, self.same, garbage=self.seed % 10)


# `all` is what Mean does by default; over groups it is the same patcher with means that are defined here.
DEFINED = {name: patcher for name, patcher in PATCHERS.items() if patcher.needs.source != "mean" or patcher.needs.pool == "group"}
cases = st.builds(
    Case,
    family=st.sampled_from(FAMILIES),
    n_layers=st.integers(1, 3),
    lengths=st.lists(st.integers(3, 8), min_size=2, max_size=6).map(tuple),
    patcher=st.sampled_from(sorted(DEFINED)),
    spans=st.sampled_from([(), (), ("last",), ("S1", "last"), ("0", "-1")]),
    max_rows=st.sampled_from([None, 1, 2, 3, 5, 64]),
    stride=st.integers(1, 3),
    seed=st.integers(0, 1000),
    same=st.sampled_from([0, 0, 2, 3]),
)


@FEW
@given(case=cases)
def test_packed_engine_is_the_naive_path_without_padding(case):
    """At once, from a base whose states are held, and from another base: entries, dead modules, narrowing, cones, conditional means."""
    model, prompts, patcher = shared_model(case.family, case.n_layers, 2), case.prompts(), DEFINED[case.patcher]
    universe = Universe.of_nodes(case.n_layers, 2, case.spans)
    base = random_masks(1, len(universe), case.seed + 1, keep=0.8)[0]
    masks = torch.stack([universe.empty(), base, *random_masks(3, len(universe), case.seed)])
    masks = torch.cat([masks, base & random_masks(2, len(universe), case.seed + 2, keep=0.9)])
    expected = unpadded(model, prompts, patcher, universe, masks)
    # These models are too narrow for slices to be worthwhile, so every other case is told that they are.
    with mock.patch.object(slices, "WORTH_FROM", 0 if case.seed % 2 else slices.WORTH_FROM):
        fast = PackedEngine(model, prompts, patcher, LogitDiff(), universe, max_rows=case.max_rows)
    fast._clean_lane.trunk.stride = case.stride
    for given_base in (None, base, universe.full()):
        assert difference(logits_of(fast, masks, given_base), expected) < TOLERANCE
    naive = ReferenceEngine(model, prompts, patcher, LogitDiff(), universe)
    assert difference(naive.all_logits(masks), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patcher", [Resample(), Zero(), Mean("conditional", "group"), Halfway()], ids=lambda each: type(each).__name__)
def test_every_family(family, patcher, monkeypatch):
    monkeypatch.setattr(slices, "WORTH_FROM", 0)
    model, prompts = shared_model(family), ragged([4, 7, 4, 5], [0, 1, 0, 2], same=2)
    masks = random_masks(4, len(model.universe))
    expected = unpadded(model, prompts, patcher, model.universe, masks)
    assert difference(PackedEngine(model, prompts, patcher, LogitDiff()).all_logits(masks), expected) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_neurons_and_features(family, kind):
    """On the engines' own masks at all positions and at spans."""
    prompts = ragged([4, 7, 4, 5], [0, 1, 0, 2])
    for patcher, spans in (("resample", ()), ("mean_group", ()), ("halfway", ()), ("zero", ("S1", "last"))):
        fast, naive = (each.on(prompts) for each in UnitCase(family, 2, 4, 5, 2, patcher, kind, "relu", spans, 7, 1, 7, 0).engines())
        masks = torch.cat([random_masks(2, len(fast.universe), keep=0.8), fast.universe.empty()[None]])
        found = fast.all_logits(masks)
        assert difference(found, naive.all_logits(masks)) < 2e-5
        for rows in parts(prompts, PATCHERS[patcher]):
            alone = naive.on(prompts.take(rows)).all_logits(masks)
            assert ((found[:, rows] - alone).abs().max() / found.std()).item() < 2e-5


def test_a_shared_prefix_is_not_computed_again_behind_padding():
    """The causal cone stays on: keys and values of padding are held too, and masked."""
    model, prompts = shared_model("llama"), ragged([8, 6, 7], [0, 1, 2], same=4)
    engine = PackedEngine(model, prompts, Resample(), LogitDiff())
    assert engine.holds_keys_values and engine._clean_lane._prefix >= 4
    masks = model.universe.full().repeat(4, 1)
    masks[range(4), [0, 2, 4, 6]] = False
    engine.score(masks, model.universe.full())
    before = engine.work.layer_tokens
    assert (
        difference(logits_of(engine, masks, model.universe.full()), unpadded(model, prompts, Resample(), model.universe, masks)) < TOLERANCE
    )
    assert engine.work.layer_tokens - before < 4 * 3 * 8 * model.n_layers / 1.5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_parallel", "llama", "qwen3"])
@pytest.mark.parametrize(
    ("level", "mlps", "patcher"),
    [("edge", "recompute", Resample()), ("edge_qkv", "freeze", Mean(pool="group")), ("edge", "freeze", Zero())],
)
def test_edges_are_the_naive_path_without_padding(family, level, mlps, patcher):
    model, prompts = shared_model(family), ragged([4, 7, 5, 4], [0, 1, 2, 0])
    circuit = Circuit(tuple(node for place, node in enumerate(model.universe.nodes) if place % 3), model.n_layers, model.n_heads)
    edges = PackedEngine(model, prompts, patcher, LogitDiff()).edges(circuit, level=level, mlps=mlps)
    wanted = list(edges.universe.edges)[::3]
    masks = random_masks(3, len(edges.universe), keep=0.8)
    alone, whole = edges.alone(wanted), edges.score(masks)
    for rows in parts(prompts, patcher):
        naive = ReferenceEngine(model, prompts.take(rows), patcher, LogitDiff()).edges(circuit, level=level, mlps=mlps)
        torch.testing.assert_close(alone[:, rows], naive.alone(wanted), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(whole[:, rows], naive.score(masks), rtol=1e-4, atol=2e-5)
    both = ReferenceEngine(model, prompts, patcher, LogitDiff()).edges(circuit, level=level, mlps=mlps)
    torch.testing.assert_close(both.alone(wanted), alone, rtol=1e-4, atol=2e-5)


def test_what_stands_in_the_padding_is_of_no_consequence():
    model = shared_model("gpt2")
    masks = random_masks(3, len(model.universe))
    found = [PackedEngine(model, ragged([3, 6], [0, 1], garbage=token), Zero(), LogitDiff()).all_logits(masks) for token in (0, 7)]
    assert torch.equal(*found)


def test_the_filter_judges_each_prompt_as_if_alone():
    model, drawn = shared_model("gpt2"), ragged([4, 8, 5, 8], [0, 0, 0, 0])
    answers = torch.stack([model.hf(drawn.take([row]).clean).logits[0, -1].argmax() for row in range(4)]).detach()
    prompts = PromptSet(
        drawn.clean, drawn.corrupt, answers, (answers + 1) % model.d_vocab, drawn.groups, drawn.group_names, pads=drawn.pads
    )
    alone = torch.cat([Solves(model)(prompts.take([row])) for row in range(4)])
    assert torch.equal(Solves(model)(prompts), alone)
    wrong = replace(prompts, answers=prompts.wrongs, wrongs=prompts.answers)
    assert not Solves(model)(wrong).any()


def test_analyses_read_each_prompt_as_if_alone():
    model, prompts = shared_model("llama"), ragged([4, 6, 5], [0, 1, 2])
    lens, shares = logit_lens(model, prompts), direct_attribution(model, prompts)
    for row in range(3):
        alone = prompts.take([row])
        torch.testing.assert_close(lens.answer[:, row], logit_lens(model, alone).answer[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shares.differences[row], direct_attribution(model, alone).differences[0], rtol=1e-4, atol=1e-5)
    assert [pattern.n_pos for pattern in mean_patterns(model, prompts)] == [4, 6, 5]
    with pytest.raises(PromptError, match=r"mean pattern of group 'g0' needs prompts of the same number of tokens, and these have 4 to 6"):
        mean_patterns(model, replace(prompts, groups=torch.zeros(3).long(), spans={}))


def test_the_checks_of_a_run_and_of_the_doctor_look_at_padding():
    model, prompts = shared_model("gpt2"), ragged([5, 5, 5, 8], [0, 0, 0, 0])
    engine = PackedEngine(model, prompts, Resample(), LogitDiff())
    assert few(engine).lengths.tolist() == [5, 8]
    quick_check(engine)

    class Given(FromFile):
        def prompts(self, tokenizer, **_):
            return prompts

    drawn = doctors_prompts(model, Given(path=""))
    assert drawn.is_padded and drawn.group_names == ("5 tokens", "8 tokens") and set(drawn.lengths.tolist()[:2]) == {5, 8}
    patient = Patient(model, drawn, Zero(), Resample(), Mean(pool="group"), Mean("conditional", "group"), KL())
    failed = [check for check in examine(patient) if not check.passed]
    assert not failed, failed


def test_a_pass_that_forgets_the_padding_is_caught():
    """The self-check at the start of a run sees it: else a wrong number would go by."""
    model, prompts = shared_model("gpt2"), ragged([5, 8], [0, 0])

    class Forgetful(PromptSet):
        def padding(self, rows, copies=1, cut=0):
            return {}

    forgetful = Forgetful(**{name: getattr(prompts, name) for name in prompts.__dataclass_fields__})
    with pytest.raises(MeasurementError, match="engine and the naive path give different logits"):
        quick_check(PackedEngine(model, forgetful, Resample(), LogitDiff()))


# Equal lengths stay as they were


def test_equal_lengths_are_told_nothing_of_padding(monkeypatch):
    model, prompts = tiny_model("gpt2"), ragged([5, 5], [0, 0])
    assert not prompts.is_padded and prompts.padding(slice(0, 2), 3, 1) == {}
    told = []
    run = type(model).run
    monkeypatch.setattr(type(model), "run", lambda self, *args, **inputs: told.append(inputs) or run(self, *args, **inputs))
    PackedEngine(model, prompts, Mean("conditional"), LogitDiff()).score(random_masks(3, len(model.universe)))
    assert told and not any({"attention_mask", "position_ids"} & inputs.keys() for inputs in told)


# What is defined


@pytest.mark.parametrize(
    ("patcher", "groups", "sentence"),
    [
        (Mean(), [0, 1], "Mean averages over all prompts position by position.*these have 4 to 6. Use patcher.pool=group"),
        (Mean(pool="group"), [0, 0], "averages over the prompts of group 'g0' position by position"),
        (Mean("conditional"), [0, 1], "averages over all prompts"),
    ],
)
def test_means_over_different_lengths_are_refused(patcher, groups, sentence):
    prompts = ragged([4, 6], groups)
    for engine in (PackedEngine, ReferenceEngine):
        with pytest.raises(MeasurementError, match=f"(?s){sentence}"):
            engine(shared_model("gpt2"), prompts, patcher, LogitDiff())
    for defined in (Zero(), Resample()):
        PackedEngine(shared_model("gpt2"), prompts, defined, LogitDiff())


def test_positions_count_from_a_prompts_own_first_token():
    prompts = ragged([4, 6], [0, 1])
    assert prompts.places("0").tolist() == [0, 0] and prompts.columns("0").tolist() == [2, 0]
    assert prompts.places("-1").tolist() == prompts.places("last").tolist() == [3, 5]
    assert prompts.columns("-1").tolist() == prompts.columns("last").tolist() == [5, 5]
    with pytest.raises(PromptError, match=r"Position 4 is outside of prompts with 4 tokens \(0-3\)"):
        prompts.places("4")


def test_taken_rows_lose_the_padding_that_all_of_them_have():
    prompts = ragged([3, 5, 8], [0, 1, 2])
    taken = prompts.take([0, 1])
    assert taken.n_pos == 5 and taken.pads.tolist() == [2, 0] and torch.equal(taken.clean, prompts.clean[:2, 3:])
    assert taken.places("S1").tolist() == prompts.places("S1").tolist()[:2]
    assert taken.content_hash() != prompts.content_hash()
    fewer = replace(prompts, pads=torch.tensor([5, 2, 0]), corrupt=torch.cat([prompts.corrupt[:, :2], prompts.corrupt[:, 2:]], 1))
    assert prompts.content_hash() != fewer.content_hash()


@pytest.mark.parametrize("pads", [[0], [0, 5], [0, 0, 0]])
def test_padding_that_does_not_fit(pads):
    drawn = tiny_prompts(2, 5, 1)
    with pytest.raises(PromptError, match="2 prompts need 2 numbers of padding columns, each less than the 5 columns"):
        PromptSet(drawn.clean, drawn.corrupt, drawn.answers, drawn.wrongs, drawn.groups, pads=torch.tensor(pads))


def test_text_of_different_lengths():
    tokenizer = wrap(["<s>", "a", "b", "c", "d", "e"], pre_tokenizers.Whitespace())
    given = (
        Prompt("a b", "b b", " c", " d", spans={"S1": (2, 3)}, corrupt_spans={"S1": (2, 3)}),
        Prompt("a b c d", "b b b b", " e", " a", spans={"S1": (4, 5)}, corrupt_spans={"S1": (4, 5)}),
    )
    prompts = encode(given, Encoder(tokenizer), equal=False)
    assert prompts.lengths.tolist() == [2, 4] and prompts.places("S1").tolist() == [1, 2] and prompts.columns("S1").tolist() == [3, 2]
    assert tokenizer.convert_ids_to_tokens(prompts.clean[0, 2:].tolist()) == ["a", "b"]
    with pytest.raises(PromptError, match="All prompts must have the same number of tokens"):
        encode(given, Encoder(tokenizer))
