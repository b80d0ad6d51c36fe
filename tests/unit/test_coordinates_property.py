"""Neurons and features: the fast engine against the naive one over random universes, dictionaries, masks, patchers, families and spans."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, PATCHERS, difference, logits_of, random_masks, shared_model, tiny_prompts

from circuitkit.core.node import Kind, Site
from circuitkit.core.universe import Universe
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.featurizers import Dictionary, Identity, Rotation, random_dictionary
from circuitkit.featurizers.activations import JumpReLU, TopK
from circuitkit.metrics import LogitDiff
from circuitkit.models import slices
from circuitkit.patchers import Zero

TOLERANCE = 2e-5
FEW = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
PLAIN = sorted(name for name in PATCHERS if not PATCHERS[name].needs.conditional)
SITES = (Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST)
KINDS = ("neurons", "features", "nodes and neurons", "heads and features", "attentions", "attentions and neurons and features")
SPANS = ((), (), ("last",), ("S1", "last"), ("0", "2", "last"))


def dictionary(width: int, which: str, seed: int) -> Dictionary | Rotation:
    """A small featurizer whose features are at work: as many as the activation has axes, and some more."""
    if which == "rotation":
        return Rotation(width, width // 2, seed)
    made = random_dictionary(width, width + 3, seed)
    activation = {"jumprelu": JumpReLU(torch.full((width + 3,), 0.2)), "topk": TopK(3)}.get(which)
    bias = 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Dictionary(made.encoder, made.decoder, made.encoder_bias, bias, activation, centred=True, reads_input=which == "transcoder")


@dataclass(frozen=True)
class Case:
    """One model, prompt set, patcher, universe and packing."""

    family: str
    n_layers: int
    n_prompts: int
    n_pos: int
    n_groups: int
    patcher: str
    kind: str
    which: str
    spans: tuple[str, ...]
    max_rows: int | None
    stride: int
    seed: int
    same: int

    def engines(self):
        model = shared_model(self.family, self.n_layers, 2)
        prompts = tiny_prompts(self.n_prompts, self.n_pos, self.n_groups, self.seed, same=min(self.same, self.n_pos - 1))
        shape = self.n_layers, 2
        some = [site for at, site in enumerate(SITES) if self.seed >> at & 1] or SITES[2:]
        sites = [Site.MLP_OUT] if self.which == "transcoder" else some
        places = [(site, layer) for site in sites for layer in range(self.n_layers) if (self.seed >> layer) % 3 or layer == 0]
        featurizers = {place: dictionary(model.d_model, self.which, self.seed + at) for at, place in enumerate(places)}
        features = Universe.of_features(*shape, {place: each.n_features for place, each in featurizers.items()}, errors=self.seed % 4 > 0)
        nodes = Universe.of_nodes(*shape)
        neurons = Universe.of_neurons(*shape, model.d_mlp, range(self.seed % self.n_layers, self.n_layers))
        attentions = Universe.of_attentions(*shape)
        universe = {
            "neurons": neurons,
            "features": features,
            "nodes and neurons": nodes | neurons,
            "heads and features": nodes.only(Kind.HEAD) | features,
            "attentions": attentions,
            "attentions and neurons and features": attentions.only(Kind.ATTENTION) | neurons | features,
        }[self.kind].at(self.spans)
        parts = (model, prompts, PATCHERS[self.patcher], LogitDiff(), universe, featurizers)
        # These models are too narrow for slices to be worthwhile, so every other case is told that they are.
        with mock.patch.object(slices, "WORTH_FROM", 0 if self.seed % 2 else slices.WORTH_FROM):
            fast, naive = PackedEngine(*parts, max_rows=self.max_rows), ReferenceEngine(*parts)
        fast._clean_lane.trunk.stride = self.stride
        return fast, naive


cases = st.builds(
    Case,
    family=st.sampled_from(FAMILIES),
    n_layers=st.integers(1, 3),
    n_prompts=st.integers(1, 6),
    n_pos=st.integers(4, 6),
    n_groups=st.integers(1, 3),
    patcher=st.sampled_from(PLAIN),
    kind=st.sampled_from(KINDS),
    which=st.sampled_from(["relu", "jumprelu", "topk", "transcoder", "rotation"]),
    spans=st.sampled_from(SPANS),
    max_rows=st.sampled_from([None, 1, 3, 8, 64]),
    stride=st.integers(1, 3),
    seed=st.integers(0, 1000),
    same=st.sampled_from([0, 0, 2, 3]),
)


@FEW
@given(case=cases, n_masks=st.integers(1, 4), keep=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_random_masks(case, n_masks, keep):
    fast, naive = case.engines()
    masks = random_masks(n_masks, len(fast.universe), case.seed, keep)
    assert difference(fast.all_logits(masks), naive.all_logits(masks)) < TOLERANCE


@settings(parent=FEW, max_examples=25)
@given(
    case=cases,
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 3), st.booleans(), st.sampled_from([0.5, 0.95, 1.0])), min_size=2, max_size=4
    ),
)
def test_a_sequence_of_calls_with_changing_bases_on_one_engine(case, calls):
    """States that are held from earlier calls must never leak into later ones."""
    fast, naive = case.engines()
    for at, (n_masks, changes, given_base, keep) in enumerate(calls):
        base = random_masks(1, len(fast.universe), at, keep)[0]
        masks = base.repeat(n_masks, 1)
        for mask in masks:
            places = torch.randint(0, len(base), (changes,), generator=torch.Generator().manual_seed(at))
            mask[places] = ~mask[places]
        assert difference(logits_of(fast, masks, base if given_base else None), naive.all_logits(masks)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_kind(family, kind):
    for patcher in ("resample", "mean_group", "zero", "halfway"):
        fast, naive = Case(family, 3, 5, 5, 2, patcher, kind, "relu", (), 7, 1, 7, 0).engines()
        masks = torch.cat([random_masks(2, len(fast.universe), keep=0.8), fast.universe.empty()[None], fast.universe.full()[None]])
        found, expected = fast.all_logits(masks), naive.all_logits(masks)
        assert difference(found, expected) < TOLERANCE
        assert difference(found[2], found[3]) > 0.01, "removing every unit changed nothing"
        assert difference(found[3], naive.clean_logits()) < TOLERANCE


@pytest.mark.parametrize("site", [Site.ATTN_OUT, Site.MLP_OUT])
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_features_lie_behind_the_norm_that_lies_behind_attention_or_mlp(family, site):
    """A dimension set to zero: in what is added to the stream, and not in what the norm reads, whose scale would change."""
    model, prompts = shared_model(family), tiny_prompts(4)
    universe = Universe.of_features(3, 2, {(site, 1): model.d_model}, errors=False)
    norm = model.module(1, "attention_post_norm" if site is Site.ATTN_OUT else "mlp_post_norm")
    mask = universe.without(universe.full(), [universe.nodes[3]])

    def silence(module, args, out):
        out = out.clone()
        out[..., 3] = 0
        return out

    handle = norm.register_forward_hook(silence)
    try:
        expected = model.hf(prompts.clean).logits[:, -1].float()
    finally:
        handle.remove()
    for engine in (PackedEngine, ReferenceEngine):
        found = logits_of(engine(model, prompts, Zero(), LogitDiff(), universe, {(site, 1): Identity(model.d_model)}), mask[None])
        assert difference(found[0], expected) < TOLERANCE
