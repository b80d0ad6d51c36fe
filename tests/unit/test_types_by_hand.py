"""Knock-outs in ten types of transformers and a state space model, against plain torch hooks on modules named here by hand.

What is expected knows nothing of circuitkit: it comes from a copy of the model that only torch has run, and from paths and columns that
were read off the models' source. Columns are those of a head in what the output projection reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from circuitkit.core.prompts import PromptSet
from circuitkit.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.models.tiny import tiny_model
from circuitkit.patchers import Mean, Zero

N_PROMPTS, N_POS = 4, 9


@dataclass(frozen=True)
class Reads:
    """Some columns of what a module is given."""

    module: str
    first: int
    behind: int


@dataclass(frozen=True)
class Gives:
    """What a module returns, or the first of several outputs."""

    module: str


BY_HAND: dict[str, dict[str, Reads | Gives]] = {
    "gpt_neox": {
        "a0.h1": Reads("gpt_neox.layers.0.attention.dense", 16, 32),
        "a1.h3": Reads("gpt_neox.layers.1.attention.dense", 48, 64),
        "m0": Gives("gpt_neox.layers.0.mlp"),
    },
    "phi": {
        "a0.h2": Reads("model.layers.0.self_attn.dense", 32, 48),
        "a1.h0": Reads("model.layers.1.self_attn.dense", 0, 16),
        "m1": Gives("model.layers.1.mlp"),
    },
    "cohere": {
        "a0.h0": Reads("model.layers.0.self_attn.o_proj", 0, 16),
        "a1.h1": Reads("model.layers.1.self_attn.o_proj", 16, 32),
        "m0": Gives("model.layers.0.mlp"),
    },
    "gemma3_text": {
        "a0.h3": Reads("model.layers.0.self_attn.o_proj", 72, 96),
        "a1.h1": Reads("model.layers.1.self_attn.o_proj", 24, 48),
        "m0": Gives("model.layers.0.mlp"),
    },
    "olmo2": {
        "a0.h1": Reads("model.layers.0.self_attn.o_proj", 16, 32),
        "a1.h2": Reads("model.layers.1.self_attn.o_proj", 32, 48),
        "m1": Gives("model.layers.1.mlp"),
    },
    "mixtral": {
        "a0.h2": Reads("model.layers.0.self_attn.o_proj", 32, 48),
        "a1.h3": Reads("model.layers.1.self_attn.o_proj", 48, 64),
        "m0": Gives("model.layers.0.mlp"),
    },
    "gpt_oss": {
        "a0.h0": Reads("model.layers.0.self_attn.o_proj", 0, 24),
        "a1.h2": Reads("model.layers.1.self_attn.o_proj", 48, 72),
        "m0": Gives("model.layers.0.mlp"),
    },
    "bloom": {  # its MLP adds the residual stream by itself, behind its last projection
        "a0.h3": Reads("transformer.h.0.self_attention.dense", 48, 64),
        "a1.h0": Reads("transformer.h.1.self_attention.dense", 0, 16),
        "m0": Gives("transformer.h.0.mlp.dense_4h_to_h"),
    },
    "granite": {
        "a0.h1": Reads("model.layers.0.self_attn.o_proj", 16, 32),
        "a1.h1": Reads("model.layers.1.self_attn.o_proj", 16, 32),
        "m1": Gives("model.layers.1.mlp"),
    },
    "qwen3_next": {  # linear attention first, then gated heads
        "a0": Gives("model.layers.0.linear_attn"),
        "a1.h0": Reads("model.layers.1.self_attn.o_proj", 0, 24),
        "a1.h3": Reads("model.layers.1.self_attn.o_proj", 72, 96),
        "m0": Gives("model.layers.0.mlp"),
    },
    "mamba": {
        "a0": Gives("backbone.layers.0.mixer"),
        "a1": Gives("backbone.layers.1.mixer"),
    },
}  # fmt: skip


def prompts() -> PromptSet:
    """Random tokens behind one first token that all share, as a model's own first token is."""
    generator = torch.Generator().manual_seed(3)
    clean, corrupt = (torch.randint(3, 101, (N_PROMPTS, N_POS), generator=generator) for _ in range(2))
    clean[:, 0] = corrupt[:, 0] = 5
    return PromptSet(clean, corrupt, torch.arange(20, 20 + N_PROMPTS), torch.arange(60, 60 + N_PROMPTS), torch.zeros(N_PROMPTS).long())


def hooked(model: nn.Module, place: Reads | Gives, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Has ``change`` make another value of what is at a place."""
    module = dict(model.named_modules())[place.module]
    if isinstance(place, Gives):

        def behind(_module, _given, output):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return module.register_forward_hook(behind)

    def before(_module, given):
        read = given[0].clone()
        read[..., place.first : place.behind] = change(read[..., place.first : place.behind])
        return (read, *given[1:])

    return module.register_forward_pre_hook(before)


def at_the_end(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1]


def means(model: nn.Module, places: dict[str, Reads | Gives], corrupt: Tensor) -> dict[str, Tensor]:
    """Of every place over the corrupt prompts, position by position."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            seen[name] = value.double().mean(0).float()
            return value

        return look

    with ExitStack() as hooks:
        for name, place in places.items():
            hooks.callback(hooked(model, place, keep(name)).remove)
        at_the_end(model, corrupt)
    assert all(mean.shape[0] == N_POS for mean in seen.values()) and seen.keys() == places.keys()
    return seen


def by_hand(model: nn.Module, ids: Tensor, out: Iterable[Reads | Gives], values: Iterable[Tensor | None]) -> Tensor:
    """Logit of token 20 + i minus that of token 60 + i of prompt i, with these places overwritten: by a value, or by zeros for None."""
    with ExitStack() as hooks:
        for place, value in zip(out, values, strict=True):
            hooks.callback(
                hooked(model, place, lambda act, v=value: torch.zeros_like(act) if v is None else v.expand_as(act).clone()).remove
            )
        logits = at_the_end(model, ids)
    rows = torch.arange(N_PROMPTS)
    return logits[rows, 20 + rows] - logits[rows, 60 + rows]


@pytest.mark.parametrize("model_type", BY_HAND)
def test_knock_outs_are_those_of_plain_hooks(model_type):
    places, given = BY_HAND[model_type], prompts()
    hf = tiny_model(model_type)
    plain = copy.deepcopy(hf)
    outs = [*((name,) for name in places), *combinations(places, 2)]
    mean = means(plain, places, given.corrupt)
    untouched = by_hand(plain, given.clean, (), ())
    model = HookedModel(hf)
    for patcher, values in ((Zero(), dict.fromkeys(places)), (Mean(), mean)):
        expected = torch.stack([by_hand(plain, given.clean, (places[n] for n in out), (values[n] for n in out)) for out in outs])
        engine = PackedEngine(model, given, patcher, LogitDiff())
        full = model.universe.full()
        masks = torch.stack([full, *(model.universe.without(full, out) for out in outs)])
        found, spread = engine.score(masks), expected.std()
        assert found.shape == (1 + len(outs), N_PROMPTS)
        moved = (expected - untouched).abs().amax(-1)
        assert moved.min() > 1e-2 * spread, "a knock-out that moves nothing shows nothing"
        errors = (found - torch.cat([untouched[None], expected])).abs().amax(-1) / spread
        assert errors.max() < 1e-5, dict(zip([(), *outs], errors.tolist(), strict=True))
    assert torch.equal(by_hand(plain, given.clean, (), ()), untouched), "no hook was left"
