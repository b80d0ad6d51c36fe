"""A model on two devices, without two cards: the first half in main memory, the second on torch's `meta` device.

That one computes shapes only, but refuses to mix its tensors with those of another device, as a second card would. What it cannot show
is the way back from the second to the first; tests/integration/test_placement.py has real cards for that, where there are two.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models_for_tests import PATCHERS, Halfway, tiny_model, tiny_prompts

from circuitkit.core.prompts import PromptSet
from circuitkit.engine.cost import DryEngine
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models import allocator
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Patcher

META = torch.device("meta")
POSITIONS = ("S1", "last")


def halved(family: str) -> HookedModel:
    """Layers 2 and 3, the last norm and the unembedding on the second device, with the hooks by which Accelerate moves what enters them."""
    model = tiny_model(family, n_layers=4)
    blocks = [model.map.blocks[layer].module for layer in (2, 3)]
    head = "lm_head" if hasattr(model.hf, "lm_head") else "embed_out"
    for path in (*blocks, model.map.final_norm, head):
        part = model.hf.get_submodule(path)
        for module in part.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:  # not moved in place, because the unembedding may be tied to the embedding
                    module._parameters[name] = torch.nn.Parameter(weight.to(META), requires_grad=False)
        add_hook_to_module(part, AlignDevicesHook(META, io_same_device=False))
    return model


def search(model: HookedModel, patcher: Patcher, positions, assume: float, prompts: PromptSet | None = None) -> DryEngine:
    method = Knockout(positions=positions) if positions else IterativePruning()
    prompts = prompts or tiny_prompts()
    engine = DryEngine(model, prompts, patcher, LogitDiff(), method.universe(model, prompts), assume=assume, max_rows=100)
    method.discover(engine, on_step=lambda step: None)
    return engine


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox_parallel", "llama", "gemma2"])
def test_layers_know_where_they_compute(family):
    model = halved(family)
    assert [model.device_of(layer).type for layer in range(4)] == ["cpu", "cpu", "meta", "meta"]
    assert model.device.type == "cpu", "token ids go to the embedding"


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all", "positions"])
@pytest.mark.parametrize("patcher", sorted(PATCHERS))
@pytest.mark.parametrize("family", ["gpt_neox_parallel", "llama"])
def test_edits_move_to_the_device_of_their_layer(family, patcher, positions):
    """Whatever is decided: with everything kept and with everything removed other modules are skipped and other states held."""
    for assume in (0.0, 100.0):
        assert search(halved(family), PATCHERS[patcher], positions, assume).work.passes > 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_causal_cone_moves_too(family):
    engine = search(halved(family), PATCHERS["resample"], POSITIONS, 0.0, tiny_prompts(same=2))
    assert engine.holds_keys_values and engine.work.layer_tokens < engine.work.layer_rows * 5


def test_a_patcher_of_one_s_own_gets_everything_on_one_device():
    class Checks(Halfway):
        seen = set()

        def patch(self, act, source, site):
            assert act.device == source.device
            self.seen.add((site.layer // 2, act.device.type))
            return super().patch(act, source, site)

    search(halved("llama"), Checks(), None, 100.0)
    assert Checks.seen == {(0, "cpu"), (1, "meta")}


def test_an_edit_that_stays_behind_is_noticed():
    """Or the tests above could not fail."""

    class StaysBehind(Halfway):
        def patch(self, act, source, site):
            return act * torch.ones(act.shape)

    with pytest.raises((RuntimeError, NotImplementedError), match="device|meta"):
        search(halved("llama"), StaysBehind(), None, 100.0)


def test_freed_memory_is_kept_only_where_the_user_has_not_chosen(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    class Library:
        def mallopt(self, *arguments):
            asked.append(arguments)
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library())
    ask = allocator.keep_freed_memory.__wrapped__  # it is asked once a process
    assert ask() and asked == [(-3, 1 << 25), (-1, 1 << 29)]
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # no glibc
    assert not ask()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert not ask() and len(asked) == 2
