"""Featurizers: what each one's coordinates are, by hand, and dictionaries in files."""

from __future__ import annotations

import json

import pytest
import torch
from models_for_tests import PATCHERS, shared_model, tiny_prompts
from safetensors.torch import save_file

from circuitkit.core.describe import describe
from circuitkit.core.errors import CircuitError, ConfigError, MeasurementError
from circuitkit.core.node import Kind, Site
from circuitkit.core.universe import Universe
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.featurizers import PCA, Dictionary, Identity, Rotation, load_dictionary, random_dictionary
from circuitkit.featurizers.activations import JumpReLU, TopK
from circuitkit.metrics import LogitDiff
from circuitkit.testing import FeaturizerConformance


class TestIdentity(FeaturizerConformance):
    def make(self):
        return Identity(6)


class TestDictionary(FeaturizerConformance):
    def make(self):
        return random_dictionary(6, 10, 3)


class TestJumpReLUDictionary(FeaturizerConformance):
    def make(self):
        made = random_dictionary(6, 10, 3)
        return Dictionary(made.encoder, made.decoder, made.encoder_bias, torch.ones(6), JumpReLU(torch.full((10,), 0.5)), centred=True)


class TestTopKTranscoder(FeaturizerConformance):
    def make(self):
        made = random_dictionary(6, 10, 3)
        return Dictionary(made.encoder, made.decoder, made.encoder_bias, made.decoder_bias, TopK(2), reads_input=True)


class TestRotation(FeaturizerConformance):
    def make(self):
        return Rotation(6, 4, seed=1)


class TestPCA(FeaturizerConformance):
    def make(self):
        return PCA.fit(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), 3)


def test_a_dictionary_by_hand():
    encoder = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
    decoder = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 0.5]])
    made = Dictionary(encoder, decoder, torch.tensor([0.0, 0.0, -1.0]), torch.tensor([0.0, 1.0]), centred=True)
    # x - b_dec = (3, 1): 3, -3, 2 - 1. Features 3, 0, 1; reconstruction (3, 0.5) + (0, 1); error (0, 0.5).
    coordinates, error = made.encode(torch.tensor([3.0, 2.0]))
    assert coordinates.tolist() == [3.0, 0.0, 1.0] and error.tolist() == [0.0, 0.5]
    assert made.decode(torch.tensor([3.0, 0.0, 0.0]), error).tolist() == [3.0, 1.5]
    assert made.reconstruct(torch.zeros(3)).tolist() == [0.0, 1.0]


def test_activation_functions_by_hand():
    pre = torch.tensor([[0.5, 1.0, 1.5, -2.0]])
    assert JumpReLU(torch.tensor([0.4, 1.0, 1.0, 0.0]))(pre).tolist() == [[0.5, 0.0, 1.5, 0.0]], "at the threshold a feature is off"
    assert TopK(2)(pre).tolist() == [[0.0, 1.0, 1.5, 0.0]]
    assert TopK(4)(pre).tolist() == [[0.5, 1.0, 1.5, 0.0]], "what is negative is no feature"
    with pytest.raises(ConfigError, match="must not be negative"):
        JumpReLU(torch.tensor([-0.1]))
    with pytest.raises(ConfigError, match="at least 1"):
        TopK(0)


def test_a_transcoder_reads_what_the_module_read():
    made = Dictionary(torch.eye(2), 2 * torch.eye(2), torch.zeros(2), torch.zeros(2), reads_input=True)
    coordinates, error = made.encode(torch.tensor([5.0, 5.0]), torch.tensor([1.0, -1.0]))
    assert coordinates.tolist() == [1.0, 0.0] and error.tolist() == [3.0, 5.0]


def test_a_rotation_stays_one_while_it_is_learned():
    rotation = Rotation(5, 2, seed=0)
    target = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0, 0.0, 0.0, 1.0]]), dim=-1)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-rotation.coordinates(target).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(rotation.directions @ rotation.directions.T, torch.eye(2))
    assert rotation.coordinates(target).norm() > 0.99, "the directions did not turn to what they were to hold"
    assert rotation.encode(target)[1].norm() < 0.15
    torch.testing.assert_close(Rotation.of(rotation.directions).directions, rotation.directions)
    with pytest.raises(ConfigError, match="orthonormal"):
        Rotation.of(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="1 to 3 directions"):
        Rotation(3, 4)


def test_principal_components_by_hand():
    """Points on the line (1, 2, 3) + t (0, 3, 4) / 5: one component explains all of them."""
    t = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    points = torch.tensor([1.0, 2.0, 3.0]) + t[:, None] * torch.tensor([0.0, 0.6, 0.8])
    fitted = PCA.fit(points, 1)
    torch.testing.assert_close(fitted.directions, torch.tensor([[0.0, 0.6, 0.8]]))
    coordinates, error = fitted.encode(points)
    torch.testing.assert_close(coordinates.flatten(), t)
    assert error.abs().max() < 1e-5
    with pytest.raises(ConfigError, match="at most 3"):
        PCA.fit(points, 4)


def test_a_random_dictionary_depends_on_its_seed_alone():
    torch.testing.assert_close(random_dictionary(4, 9, 1).decoder.norm(dim=-1), torch.ones(9))
    found = [describe(random_dictionary(4, 9, seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


# Files


def weights(width: int = 4, n_features: int = 6, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(width, n_features, generator=generator),
        "W_dec": torch.randn(n_features, width, generator=generator),
        "b_enc": torch.randn(n_features, generator=generator),
        "b_dec": torch.randn(width, generator=generator),
        **more,
    }


def saelens(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    settings = {"architecture": "standard", "d_in": 4, "d_sae": 6, "normalize_activations": "none", "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps({**settings, **config}))
    return folder


X = torch.tensor([[0.3, -1.0, 2.0, 0.7], [1.0, 1.0, -1.0, 0.0]])


def test_a_saelens_folder(tmp_path):
    w = weights()
    placed = load_dictionary(saelens(tmp_path / "sae", w, hook_name="blocks.8.hook_resid_pre"))
    expected = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(placed.dictionary.coordinates(X), expected)
    torch.testing.assert_close(placed.dictionary.reconstruct(expected), expected @ w["W_dec"] + w["b_dec"])
    assert placed.place == (Site.RESID_POST, 7), "what enters block 8 is what leaves block 7"


def test_newer_saelens_folders_keep_the_hook_in_metadata(tmp_path):
    w = weights(threshold=torch.full((6,), 0.8))
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": {"hook_name": "blocks.3.hook_mlp_out"}}
    placed = load_dictionary(saelens(tmp_path / "sae", w, **config))
    pre = X @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(placed.dictionary.coordinates(X), torch.where(pre > 0.8, pre, 0.0))
    assert placed.place == (Site.MLP_OUT, 3) and not placed.dictionary.reads_input


@pytest.mark.parametrize(
    "config", [{"architecture": "topk", "k": 2}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}], ids=["new", "old"]
)
def test_topk_folders(tmp_path, config):
    placed = load_dictionary(saelens(tmp_path / "sae", weights(), **config))
    assert ((placed.dictionary.coordinates(X) != 0).sum(-1) <= 2).all()
    assert (placed.dictionary.coordinates(X) != 0).any()
    with pytest.raises(ConfigError, match="do not say at which site"):
        _ = placed.place


def test_a_transcoder_folder_lies_where_it_writes(tmp_path):
    hooks = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    placed = load_dictionary(saelens(tmp_path / "sae", weights(), architecture="transcoder", apply_b_dec_to_input=False, **hooks))
    assert placed.place == (Site.MLP_OUT, 2) and placed.dictionary.reads_input


@pytest.mark.parametrize("square", [False, True])
def test_a_per_layer_transcoder_keeps_a_row_per_feature(tmp_path, square):
    w = weights(4, 4 if square else 6)
    threshold = torch.full((len(w["b_enc"]),), 0.1)
    rows = {**w, "W_enc": w["W_enc"].T.contiguous(), "activation_function.threshold": threshold}
    save_file(rows, tmp_path / "layer_5.safetensors")
    placed = load_dictionary(tmp_path / "layer_5.safetensors")
    pre = X @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(placed.dictionary.coordinates(X), torch.where(pre > 0.1, pre, 0.0))
    assert placed.place == (Site.MLP_OUT, 5) and placed.dictionary.reads_input


def test_a_gemma_scope_file(tmp_path):
    w = weights(4, 4, threshold=torch.full((4,), 0.1))
    save_file({name.lower(): tensor for name, tensor in w.items()}, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "jump_relu", "width": 4, "type": "transcoder"}))
    placed = load_dictionary(tmp_path)
    pre = X @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(placed.dictionary.coordinates(X), torch.where(pre > 0.1, pre, 0.0))
    assert placed.dictionary.reads_input and placed.site is None


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"architecture": "gated"}, {}, "no architecture of dictionaries named 'gated'"),
        ({"architecture": "jumprelu"}, {}, "no tensor named threshold"),
        ({"architecture": "topk"}, {}, "says no k"),
        ({"normalize_activations": "layer_norm"}, {}, "normalises what it encodes"),
        ({"d_in": 5}, {}, "its config says 5"),
        ({"activation_fn_str": "tanh-relu"}, {}, "no activation function of dictionaries named 'tanh-relu'"),
        ({}, {"b_enc": torch.zeros(5)}, "may be of another layout"),
        ({}, {"W_dec": torch.zeros(6, 2, 4)}, "no dictionary of one layer"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, config, more, words):
    with pytest.raises(ConfigError, match=words):
        load_dictionary(saelens(tmp_path / "sae", {**weights(), **more}, **config))


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_dictionary(tmp_path / "none")
    with pytest.raises(ConfigError, match="a folder without one"):
        load_dictionary(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ConfigError, match="config of a dictionary"):
        load_dictionary(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="found 2 of them"):
        load_dictionary(tmp_path)


# What an engine refuses


def engine(universe, featurizers=None, patcher="resample"):
    return PackedEngine(shared_model("gpt2"), tiny_prompts(), PATCHERS[patcher], LogitDiff(), universe, featurizers)


def test_featurizers_that_do_not_fit_are_refused():
    place = (Site.RESID_POST, 1)
    universe = Universe.of_features(3, 2, {place: 6})
    with pytest.raises(MeasurementError, match="there is no featurizer for that place. Given: mlp_out of layer 0"):
        engine(universe, {(Site.MLP_OUT, 0): Identity(8)})
    with pytest.raises(MeasurementError, match="of width 9, but tiny-gpt2 has 8"):
        engine(universe, {place: random_dictionary(9, 6)})
    with pytest.raises(MeasurementError, match="there are 5 of them: 0 to 4"):
        engine(universe, {place: random_dictionary(8, 5)})
    with pytest.raises(MeasurementError, match="it lies at mlp_out; found one at resid_post"):
        made = random_dictionary(8, 6)
        engine(universe, {place: Dictionary(made.encoder, made.decoder, made.encoder_bias, made.decoder_bias, reads_input=True)})
    with pytest.raises(MeasurementError, match="neuron 99 at mlp_act of layer 0, but there are 32"):
        engine(Universe.of_neurons(3, 2, 100))


def test_universes_that_contradict_themselves_are_refused():
    nodes, features = Universe.of_nodes(3, 2), Universe.of_features(3, 2, {(Site.MLP_OUT, 1): 6})
    with pytest.raises(MeasurementError, match="MLP of layer 1 as a unit, and the features"):
        engine(nodes | features, {(Site.MLP_OUT, 1): random_dictionary(8, 6)})
    with pytest.raises(MeasurementError, match="single heads and whole attentions"):
        engine(nodes | Universe.of_attentions(3, 2))
    with pytest.raises(MeasurementError, match="units of kind neuron. Take plain means"):
        engine(Universe.of_neurons(3, 2, 32), patcher="conditional_all")
    assert engine(nodes.only(Kind.HEAD) | features, {(Site.MLP_OUT, 1): random_dictionary(8, 6)}).featurizers


def test_a_unit_of_another_universe_is_refused():
    neurons = Universe.of_neurons(3, 2, 32, [1])
    with pytest.raises(CircuitError, match="'a0.h0' is not in this universe: it has layers 0-2 and neurons such as m1.n0"):
        neurons.mask(["a0.h0"])
    with pytest.raises(CircuitError, match="'m0.n3' is not in this universe: it has layers 0-2 and heads 0-1"):
        Universe.of_nodes(3, 2).mask(["m0.n3"])
    with pytest.raises(CircuitError, match="'m1.n32' is not"):
        neurons.mask(["m1.n32"])
