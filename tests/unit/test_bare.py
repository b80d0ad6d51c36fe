"""The model without nnsight: bitwise that of transformers, nothing of nnsight in its stack, and nnsight as before afterwards."""

from __future__ import annotations

import copy
import sys
import threading

import nnsight
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models_for_tests import FAMILIES, Halfway, engines, random_masks, tiny_hf, tiny_model, tiny_prompts
from torch.overrides import TorchFunctionMode

from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import ModelError
from circuitkit.engine.edges.engine import PackedEdges
from circuitkit.engine.oracle.edges import ReferenceEdges
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models import bare
from circuitkit.models.bare import is_unwrapped, unwrapped
from circuitkit.models.checks import MODEL_CHECKS, no_edit, plain
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean


def never_wrapped(family: str, monkeypatch) -> HookedModel:
    """The same model as ``tiny_model`` gives, without nnsight from the start; only the oracle can use it."""
    monkeypatch.setattr("circuitkit.models.hooked.wrapped", lambda hf: hf)
    model = HookedModel(tiny_hf(family), name="never-wrapped")
    monkeypatch.undo()
    assert not any("forward" in vars(module) for module in model.hf.modules())
    return model


def circuit_of(model: HookedModel) -> Circuit:
    """All components but two."""
    return Circuit.of(model.universe, model.universe.without(model.universe.full(), ["a0.h1", "m1"]))


def edge_oracle(model: HookedModel) -> ReferenceEdges:
    return ReferenceEdges(ReferenceEngine(model, tiny_prompts(), Mean(), LogitDiff()), circuit_of(model))


def forwards(model: HookedModel) -> dict[str, object]:
    return {path: vars(module).get("forward") for path, module in model.hf.named_modules()}


def packages() -> set[str]:
    """Top-level packages of the functions that are running."""
    frame, found = sys._getframe(1), set()
    while frame is not None:
        found.add(frame.f_globals.get("__name__", "").partition(".")[0])
        frame = frame.f_back
    return found


class Watch(TorchFunctionMode):
    """Looks at the stack in every call of a torch function, which is to say everywhere in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.seen |= packages()
        return func(*args, **(kwargs or {}))


# Equal to what was never wrapped


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_is_bitwise_a_model_that_was_never_wrapped(family):
    ids = tiny_prompts().clean
    with torch.no_grad():
        expected = tiny_hf(family).eval()(ids, use_cache=False).logits
    assert torch.equal(plain(tiny_model(family), ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_bitwise_that_of_a_model_that_was_never_wrapped(family, monkeypatch):
    masks = random_masks(4, 9)
    for patcher in (Mean("conditional"), Halfway()):
        found, expected = (
            ReferenceEngine(model, tiny_prompts(), patcher, LogitDiff(), max_rows=4).all_logits(masks)
            for model in (tiny_model(family), never_wrapped(family, monkeypatch))
        )
        assert found.std() > 0 and torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_for_edges_is_bitwise_that_of_a_model_that_was_never_wrapped(family, monkeypatch):
    found, expected = (edge_oracle(model) for model in (tiny_model(family), never_wrapped(family, monkeypatch)))
    masks = random_masks(2, len(found.universe), keep=0.8)
    some = found.universe.edges[:: len(found.universe) // 5]
    assert torch.equal(found.score(masks), expected.score(masks))
    assert torch.equal(found.alone(some), expected.alone(some))


# Nothing of nnsight on the way


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_outside_of_the_context_nnsight_is_in_the_stack(family):
    """Or the tests below could not fail."""
    model = tiny_model(family)
    with Watch() as whole:
        model.hf(tiny_prompts().clean)
    with Watch() as part:
        model.module(1, "attention_norm").forward(torch.ones(1, model.d_model))
    assert "nnsight" in whole.seen and "nnsight" in part.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_nnsight_is_not_in_the_stack_of_the_oracle(family):
    model = tiny_model(family)
    in_patch: set[str] = set()

    class Looks(Halfway):
        def patch(self, act, source, site):
            in_patch.update(packages())
            return super().patch(act, source, site)

    with Watch() as watch:
        ReferenceEngine(model, tiny_prompts(), Looks(), LogitDiff()).all_logits(random_masks(3, 9))
        plain(model, tiny_prompts().clean)
    assert "transformers" in in_patch & watch.seen and "nnsight" not in in_patch | watch.seen
    assert watch.calls > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_nnsight_is_not_in_the_stack_of_the_oracle_for_edges(family):
    """Neither in its passes, nor where it calls norms and projections by themselves."""
    edges = edge_oracle(tiny_model(family))
    with Watch() as watch:
        edges.score(random_masks(1, len(edges.universe), keep=0.9))
        edges.alone(edges.universe.edges[:: len(edges.universe) // 2])
    assert "transformers" in watch.seen and "nnsight" not in watch.seen


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_nnsight_itself_does_wrong_is_found(family, monkeypatch):
    """Its forward for every module is a little off: the plain pass and the oracle have no part in that, so the difference is seen."""
    run_body = nnsight.intervention.source.run_body

    def off(state, module, args, kwargs):
        out = run_body(state, module, args, kwargs)
        return out * (1 + 1e-6) if isinstance(module, torch.nn.Embedding) else out

    model = tiny_model(family)
    fast, naive = engines(model, tiny_prompts(), Mean())
    expected = naive.all_logits(model.universe.full()[None])
    monkeypatch.setattr(nnsight.intervention.source, "run_body", off)
    assert not no_edit(model, tiny_prompts()).passed
    assert torch.equal(naive.all_logits(model.universe.full()[None]), expected)
    assert not torch.equal(fast.all_logits(model.universe.full()[None]), expected)


# As before afterwards


@pytest.mark.parametrize("family", FAMILIES)
def test_nnsight_works_as_before_afterwards(family):
    model = tiny_model(family)
    before = forwards(model)
    fast, naive = engines(model, tiny_prompts(), Halfway())
    masks = random_masks(4, 9)
    expected = fast.all_logits(masks)
    naive.all_logits(masks)
    assert forwards(model) == before and all(type(forward).__module__.startswith("nnsight") for forward in before.values())
    assert torch.equal(engines(model, tiny_prompts(), Halfway())[0].all_logits(masks), expected)
    assert all(check(model, tiny_prompts()).passed for check in MODEL_CHECKS)


def test_an_error_inside_puts_nnsight_back():
    model = tiny_model()
    before = forwards(model)
    with pytest.raises(ZeroDivisionError), unwrapped(model.hf):
        assert not any("forward" in vars(module) for module in model.hf.modules())
        raise ZeroDivisionError
    assert forwards(model) == before and not is_unwrapped(model.hf)


def test_contexts_may_be_nested():
    model = tiny_model()
    before = forwards(model)
    with unwrapped(model.hf):
        with pytest.raises(ZeroDivisionError), unwrapped(model.hf):
            raise ZeroDivisionError
        assert is_unwrapped(model.hf) and not any(forwards(model).values()), "the outer context is still open"
    assert forwards(model) == before


def test_threads_may_overlap_and_the_last_one_out_puts_nnsight_back():
    model = tiny_model()
    before, entered, leave = forwards(model), threading.Event(), threading.Event()

    def other() -> None:
        with unwrapped(model.hf):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with unwrapped(model.hf):
        thread.start()
        assert entered.wait(30)
    try:
        assert is_unwrapped(model.hf) and not any(forwards(model).values()), "the other thread is still inside"
        with pytest.raises(ModelError, match="own forwards are in place.*in this thread or another"):
            model.run(tiny_prompts().clean, lambda layer: None)
    finally:
        leave.set()
        thread.join(30)
    assert forwards(model) == before
    assert model.run(tiny_prompts().clean, lambda layer: None) is not None


def test_other_models_are_left_alone():
    one, other = tiny_model(), tiny_model()
    before = forwards(other)
    with unwrapped(one.hf):
        assert forwards(other) == before and not is_unwrapped(other.hf)
        assert other.run(tiny_prompts().clean, lambda layer: None) is not None


def test_a_model_that_was_never_wrapped_is_left_as_it_is():
    hf = tiny_hf("gpt2")
    with unwrapped(hf):
        assert not any("forward" in vars(module) for module in hf.modules())
    assert not any("forward" in vars(module) for module in hf.modules())


# What it costs


@pytest.fixture
def swaps(monkeypatch) -> list[object]:
    """One entry for every time that forwards are put aside."""
    made: list[object] = []
    put_aside = bare._put_aside
    monkeypatch.setattr(bare, "_put_aside", lambda hf: made.append(hf) or put_aside(hf))
    return made


def test_forwards_are_put_aside_once_a_pass(swaps):
    model = tiny_model()
    swaps.clear()
    naive = ReferenceEngine(model, tiny_prompts(6), Mean(), LogitDiff(), max_rows=3)
    assert len(swaps) == 2  # the corrupt prompts, in two passes
    naive.all_logits(random_masks(4, 9))
    assert len(swaps) == 2 + 4 * 2


def test_forwards_are_put_aside_once_a_call_for_edges(swaps):
    edges = edge_oracle(tiny_model())
    swaps.clear()
    edges.score(random_masks(3, len(edges.universe), keep=0.8))
    edges.alone(edges.universe.edges[:3])
    assert len(swaps) == 2  # the clean logits for the metric are taken inside


# Forwards that were there before nnsight


class Counts(ModelHook):
    """What Accelerate may hang on a module: here it counts, and notes what is in the stack."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, set()

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        self.seen |= packages()
        return args, kwargs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accelerate_s_own_forward_comes_back(family):
    hf, hook = tiny_hf(family), Counts()
    block = hf.get_submodule({"gpt2": "transformer.h.1", "llama": "model.layers.1"}[family])
    add_hook_to_module(block, hook)
    own = vars(block)["forward"]
    model = HookedModel(hf, name="placed")
    ids = tiny_prompts().clean
    with unwrapped(hf):
        assert vars(block)["forward"] is own
    hook.calls = 0
    logits = plain(model, ids)
    assert hook.calls == 1 and "accelerate" in hook.seen and "nnsight" not in hook.seen
    assert torch.equal(model.run(ids, lambda layer: None, keep=0), logits) and hook.calls == 2, "once a pass, also when nnsight is back"
    assert torch.equal(tiny_hf(family).eval()(ids).logits, logits)


def test_a_module_s_own_forward_comes_back():
    """One that somebody gave to this very module, and not to its class."""
    hf = tiny_hf("gpt2")
    mlp = hf.transformer.h[1].mlp
    mlp.forward = lambda hidden_states: 2 * hidden_states
    own, model = mlp.forward, HookedModel(hf, name="changed")
    expected = tiny_hf("gpt2").eval()
    expected.transformer.h[1].mlp.forward = own
    ids = tiny_prompts().clean
    with unwrapped(hf):
        assert mlp.forward is own
    assert torch.equal(plain(model, ids), expected(ids).logits)


def test_a_model_may_be_wrapped_again_and_copied():
    model = tiny_model()
    again, copied = HookedModel(model.hf, name="again"), HookedModel(copy.deepcopy(model.hf), name="copied")
    ids = tiny_prompts().clean
    expected = tiny_hf("gpt2").eval()(ids).logits
    for one in (model, again, copied):
        with Watch() as watch:
            assert torch.equal(plain(one, ids), expected)
        assert watch.calls and "nnsight" not in watch.seen
        assert torch.equal(one.run(ids, lambda layer: None, keep=0), expected)


# Where the originals are not known


def test_a_model_that_somebody_else_wrapped_is_refused():
    hf = tiny_hf("gpt2")
    nnsight.NNsight(hf)
    with pytest.raises(ModelError, match=r"nnsight has wrapped the model before \(the model itself\).*load it anew"):
        HookedModel(hf, name="foreign")


def test_a_forward_that_was_replaced_afterwards_is_refused():
    model = tiny_model()
    add_hook_to_module(model.hf.transformer.h[1], Counts())
    before = forwards(model)
    with pytest.raises(ModelError, match=r"The forward of transformer\.h\.1 was replaced or added after"):
        plain(model, tiny_prompts().clean)
    assert forwards(model) == before and not is_unwrapped(model.hf), "nothing is left half-done"


def test_a_model_is_not_wrapped_inside():
    model = tiny_model()
    with unwrapped(model.hf), pytest.raises(ModelError, match="outside of `unwrapped`"):
        HookedModel(model.hf, name="again")


def test_edges_from_the_fast_engine_reach_the_same_oracle():
    """Its ``oracle``, which decides near a threshold, is free of nnsight too."""
    model = tiny_model()
    edges = PackedEdges(engines(model, tiny_prompts(), Mean())[0], circuit_of(model))
    with Watch() as watch:
        found = edges.oracle.score(random_masks(2, len(edges.universe), keep=0.8))
    assert watch.calls and "nnsight" not in watch.seen
    assert torch.equal(found, edge_oracle(tiny_model()).score(random_masks(2, len(edges.universe), keep=0.8)))
