"""The doctor: it finds every family healthy, and each way to break a model or an engine it calls by its name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from models_for_tests import FAMILIES, hook_counts, tiny_hf, tiny_model

from circuitkit.config import conf_dir
from circuitkit.core.errors import MeasurementError, ModelError
from circuitkit.core.universe import Universe
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.doctor import ENGINE_CHECKS, Patient, examine
from circuitkit.jobs import doctor
from circuitkit.metrics import LogitDiff
from circuitkit.models.checks import MODEL_CHECKS, TOLERANCE, Check, random_prompts, relative
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.patchers import Mean, Resample, Zero

NAMES = [check.__name__ for check in (*MODEL_CHECKS, *ENGINE_CHECKS)] + ["hooks_gone", "weights_kept"]
BITWISE = {"finite", "called", "no_edit", "self_patch", "prefix", "groups", "fires", "hooks_gone", "weights_kept"}


def patient_of(model: HookedModel, engine=PackedEngine) -> Patient:
    return Patient(model, random_prompts(model, n_pos=6), Zero(), Resample(), Mean(), Mean("conditional"), LogitDiff(), engine)


def failed(patient: Patient) -> dict[str, str]:
    """The checks that failed, with their details."""
    return {check.name: check.detail for check in examine(patient) if not check.passed}


def model_failed(model: HookedModel) -> set[str]:
    """The same of those that need only the model."""
    prompts = random_prompts(model, n_pos=6)
    return {check.name for check in (each(model, prompts) for each in MODEL_CHECKS) if not check.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_healthy(family, dtype):
    model = tiny_model(family, n_layers=2, n_heads=4, dtype=dtype)
    checks = list(examine(patient_of(model)))
    assert [check.name for check in checks] == NAMES
    assert not [check for check in checks if not check.passed]
    assert {check.name for check in checks if check.tolerance == 0} == BITWISE
    assert {check.tolerance for check in checks if check.tolerance} == {TOLERANCE[dtype]}
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert all(check.difference <= rounding for check in checks), "far below what is allowed"


@pytest.mark.parametrize(("n_layers", "n_heads", "n_pos"), [(1, 1, 1), (1, 2, 16), (3, 3, 2)])
def test_odd_shapes_are_healthy(n_layers, n_heads, n_pos):
    model = tiny_model("llama", n_layers=n_layers, n_heads=n_heads)
    patient = replace(patient_of(model), prompts=random_prompts(model, n=1, n_pos=n_pos))
    assert failed(patient) == {}


def test_sdpa_is_healthy_too():
    assert failed(patient_of(tiny_model("qwen2", n_layers=2, n_heads=4, attention="sdpa"))) == {}


# Broken models, and broken ways to look into them


def with_setter(site, change):
    """A site of ``Layer`` whose writing goes wrong."""
    right = getattr(Layer, site)
    return property(right.fget, lambda self, value: right.fset(self, change(self, value)))


def with_getter(site, change):
    """A site of ``Layer`` whose reading goes wrong."""
    right = getattr(Layer, site)
    return property(lambda self: change(right.fget(self)), right.fset)


def test_a_site_whose_reading_changes_it(monkeypatch):
    monkeypatch.setattr(Layer, "mlp_in", with_getter("mlp_in", lambda act: act.mul_(1.01)))
    assert model_failed(tiny_model()) == {"no_edit", "self_patch", "narrowed"}


@pytest.mark.parametrize("site", ["resid", "mlp_out"])
def test_a_site_whose_writing_changes_it(monkeypatch, site):
    monkeypatch.setattr(Layer, site, with_setter(site, lambda layer, act: act * (1 + 1e-6)))
    assert model_failed(tiny_model()) == {"self_patch"}


def test_heads_swapped_when_written(monkeypatch):
    monkeypatch.setattr(Layer, "z", with_setter("z", lambda layer, z: z.flip(-2)))
    assert model_failed(tiny_model()) == {"self_patch", "narrowed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_swapped_both_ways(monkeypatch, family):
    """No patch of all heads shows it, but each name means another head."""
    right = Layer.z
    monkeypatch.setattr(Layer, "z", property(lambda self: right.fget(self).flip(-2), lambda self, z: right.fset(self, z.flip(-2))))
    assert model_failed(tiny_model(family, n_layers=1, n_heads=4)) == {"heads_sum", "groups"}


def test_a_module_left_out_that_gives_something_else(monkeypatch):
    right = Layer.skip_mlp
    monkeypatch.setattr(Layer, "skip_mlp", lambda self, out: right(self, out * 1.01))
    assert model_failed(tiny_model()) == {"self_patch"}


def test_a_prefix_that_is_not_taken_over(monkeypatch):
    right = Layer.skip
    monkeypatch.setattr(Layer, "skip", lambda self, resid: right(self, resid * (1 + 1e-6)))
    assert model_failed(tiny_model()) == {"prefix"}


def test_an_output_projection_without_its_bias(monkeypatch):
    right = HookedModel.project
    monkeypatch.setattr(HookedModel, "project", lambda self, layer, z: right(self, layer, z) - self.module(layer, "out_proj").bias)
    assert model_failed(tiny_model("gpt2")) == {"heads_sum"}


def test_grouped_heads_that_are_dealt_out_in_turn(monkeypatch):
    def in_turn(states, n):
        return states.repeat(1, n, 1, 1)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.repeat_kv", in_turn)
    assert model_failed(tiny_model("llama", n_heads=4)) == {"groups"}


def test_an_mlp_that_mixes_positions():
    model = tiny_model("llama")
    model.module(2, "mlp").register_forward_hook(lambda module, args, out: out + args[0].mean(1, keepdim=True))
    assert model_failed(model) == {"narrowed", "padding"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_padding(ignored, dtype):
    hf = tiny_hf("gpt2", dtype=dtype)
    right = hf.forward

    def forward(*args, **kwargs):
        # Without any mask transformers would guess one from the position ids.
        if ignored in kwargs:
            kwargs[ignored] = torch.ones_like(kwargs[ignored]) if ignored == "attention_mask" else None
        return right(*args, **kwargs)

    hf.forward = forward
    model = HookedModel(hf, name="ignores-padding")
    assert "attention_mask" not in model.map.forward and not model_failed(model)
    with pytest.raises(ModelError, match="cannot be told which tokens are padding"):
        model.run(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    by_hand = replace(model.map, forward=model.map.forward | {"attention_mask"})
    assert model_failed(HookedModel(hf, map=by_hand, name="ignores-padding")) == {"padding"}


def test_an_mlp_that_runs_twice():
    model = tiny_model("llama")
    mlp = model.module(1, "mlp")
    model.module(1, "mlp_norm").register_forward_hook(lambda module, args, out: mlp(out) * 0 + out)
    assert "called" in model_failed(model)


def test_an_mlp_that_writes_but_is_not_heard():
    model = tiny_model("gemma2", n_layers=2)
    model.hf.model.layers[1].post_feedforward_layernorm.weight.data.fill_(-1)  # this norm multiplies by 1 + weight
    assert failed(patient_of(model)) == {"fires": "m1"}


def test_a_head_that_writes_nothing_is_named_and_no_failure():
    model = tiny_model("llama", n_layers=2)
    model.module(1, "out_proj").weight.data[:, : model.d_head] = 0
    checks = {check.name: check for check in examine(patient_of(model))}
    assert all(check.passed for check in checks.values())
    assert checks["fires"].detail == "write nothing at all: a1.h0"


def test_weights_that_are_nan():
    model = tiny_model("llama", n_layers=2)
    model.module(1, "mlp").up_proj.weight.data[0, 0] = torch.nan
    wrong = failed(patient_of(model))
    assert list(wrong)[0] == "finite" and {"no_edit", "prefix", "all_patched", "any_mask", "base", "fires"} <= set(wrong)
    assert wrong["finite"] == "model.layers.1.mlp.up_proj.weight, logits of the clean prompts, logits of the corrupt prompts"


def test_a_token_whose_embedding_is_infinite_is_found_though_no_prompt_has_it():
    model = tiny_model("llama", n_layers=2)
    prompts = random_prompts(model, n=1, n_pos=4)
    unseen = min({*range(model.d_vocab)} - {*prompts.clean.flatten().tolist(), *prompts.corrupt.flatten().tolist()})
    model.hf.model.embed_tokens.weight.data[unseen] = torch.inf
    assert failed(replace(patient_of(model), prompts=prompts)) == {"finite": "model.embed_tokens.weight"}


# Broken engines


class IgnoresMasks(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(torch.ones_like(masks), base)


class OneLayerOff(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(masks.roll(len(self.universe) // self.universe.n_layers, -1), None)


class TakesTheWrongTwin(PackedEngine):
    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        super().__init__(model, replace(prompts, corrupt=prompts.corrupt.roll(1, 0)), patcher, metric, universe, max_rows=max_rows)


class ForgetsToCondition(PackedEngine):
    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        super().__init__(model, prompts, Mean() if patcher.needs.conditional else patcher, metric, universe, max_rows=max_rows)


class MixesPositions(PackedEngine):
    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        universe = None if universe is None else Universe.of_nodes(universe.n_layers, universe.n_heads, universe.spans[::-1])
        super().__init__(model, prompts, patcher, metric, universe, max_rows=max_rows)


class HoldsStaleStates(PackedEngine):
    def passes(self, masks, base=None):
        return super().passes(masks if base is None else base.expand_as(masks), base)


class UnpacksWrongly(PackedEngine):
    def all_logits(self, masks):
        return super().all_logits(masks) * (1 if self.budget.rows > 1 else 1.01)


class IgnoresSingles(PackedEngine):
    def passes(self, masks, base=None):
        single = masks.sum(-1, keepdim=True) == masks.shape[1] - 1
        return super().passes(masks | single, base)


class KeepsTheLastMlp(PackedEngine):
    def passes(self, masks, base=None):
        masks = masks.clone()
        masks[~masks.any(-1), -1] = True
        return super().passes(masks, base)


class LeavesAHook(PackedEngine):
    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        super().__init__(model, prompts, patcher, metric, universe, max_rows=max_rows)
        self.model.module(1, "mlp").register_forward_hook(lambda *_: None)


class TouchesAWeight(PackedEngine):
    def __init__(self, model, prompts, patcher, metric, universe=None, *, max_rows=None):
        super().__init__(model, prompts, patcher, metric, universe, max_rows=max_rows)
        unseen = sorted({*range(self.model.d_vocab)} - {*self.prompts.clean.flatten().tolist(), *self.prompts.corrupt.flatten().tolist()})
        self.model.hf.get_input_embeddings().weight[unseen[0]] += 1e-3


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        (IgnoresMasks, {"all_patched", "any_mask", "conditional", "positions", "base", "fires"}),
        (OneLayerOff, {"any_mask", "conditional", "positions", "base", "fires"}),
        (TakesTheWrongTwin, {"corrupt_run", "all_patched", "any_mask", "positions", "fires"}),
        (KeepsTheLastMlp, {"all_patched", "any_mask", "conditional", "positions"}),
        (ForgetsToCondition, {"conditional"}),
        (MixesPositions, {"positions"}),
        (HoldsStaleStates, {"base"}),
        (UnpacksWrongly, {"packing"}),
        (IgnoresSingles, {"fires"}),
        (LeavesAHook, {"hooks_gone"}),
        (TouchesAWeight, {"weights_kept"}),
    ],
)
def test_a_broken_engine(engine, names):
    model = tiny_model("llama", n_layers=2)
    assert set(failed(patient_of(model, engine))) == names


def test_the_hook_and_the_weight_are_named():
    assert failed(patient_of(tiny_model(n_layers=2), LeavesAHook)) == {"hooks_gone": "transformer.h.1.mlp"}
    assert failed(patient_of(tiny_model("llama", n_layers=2), TouchesAWeight)) == {"weights_kept": "model.embed_tokens.weight"}


def test_a_check_that_raises_has_failed_and_the_others_go_on():
    class Breaks(Mean):
        def patch(self, act, source, site):
            raise ValueError("no value for it")

    model = tiny_model("llama", n_layers=2)
    before = hook_counts(model)
    checks = list(examine(replace(patient_of(model), conditional=Breaks("conditional"))))
    assert [check.name for check in checks] == NAMES
    assert {check.name: check.detail for check in checks if not check.passed} == {"conditional": "raised ValueError: no value for it"}
    assert hook_counts(model) == before


# The numbers and the job


def test_differences_are_relative_and_nan_never_passes():
    assert relative(torch.tensor([1.0, 2.0, 3.5]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(0.5)
    assert relative(torch.tensor([torch.inf]), torch.tensor([torch.inf])) == 0
    assert not Check.of("a", "b", relative(torch.tensor([torch.nan, 1]), torch.tensor([1.0, 2])), 1.0).passed
    assert Check.of("a", "b", 0.0, 0.0).passed and not Check.of("a", "b", 1e-12, 0.0).passed


def test_random_prompts_differ_everywhere_and_repeat():
    model = tiny_model()
    drawn = random_prompts(model, n=5, n_pos=40)
    assert drawn.clean.shape == (5, 16), "as long as the model allows"
    assert (drawn.clean != drawn.corrupt).all() and not drawn.answers.shared(drawn.wrongs).any()
    assert torch.equal(drawn.clean, random_prompts(model, n=5, n_pos=40).clean)


def config_of(*settings):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["job=doctor", "model=tiny_llama", *settings])


@pytest.mark.parametrize("task", [(), ("task=months",)], ids=["random", "months"])
def test_the_job_prints_a_table_and_writes_it(task, tmp_path, capsys):
    doctor.run(config_of(f"dir={tmp_path}/here", *task))
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES) and "FAILED" not in printed and "doctor.json" in printed
    written = json.loads((tmp_path / "here/doctor.json").read_text())
    assert [check["name"] for check in written["checks"]] == NAMES
    assert written["passed"] and written["model"] == "tiny_llama" and written["dtype"] == "float32"


def test_the_job_fails_in_one_sentence(monkeypatch, capsys, tmp_path):
    config = config_of(f"dir={tmp_path}")
    right = Layer.skip
    monkeypatch.setattr(Layer, "skip", lambda self, resid: right(self, resid * torch.nan))
    with pytest.raises(MeasurementError, match=r"of 19 checks failed for tiny_llama in float32: prefix,.* Expected all to pass"):
        doctor.run(config)
    assert "FAILED" in capsys.readouterr().out
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert not written["passed"] and next(check for check in written["checks"] if check["name"] == "prefix")["difference"] is None
