"""Tiny random models of every family, and prompts for them. Imported by the tests beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import transformers

from circuitkit.core.node import Kind
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Logits, Masks
from circuitkit.engine.base import Engine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.metrics import LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Needs, Patcher, Resample, Zero

torch.set_num_threads(1)  # Tensors this small only lose by threads.

VOCAB = 23
FAMILIES = ("gpt2", "gpt_neox", "gpt_neox_parallel", "llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2")


class Halfway(Patcher):
    """Half of what the component computes, half of its mean: reads the activation."""

    needs = Needs("mean", "group")
    reads_activation = True

    def patch(self, act, source, site):
        return 0.5 * act + 0.5 * source


class Flipped(Patcher):
    """The opposite of what the component computes. Needs nothing, and leaves ``reads_activation`` at its default."""

    def patch(self, act, source, site):
        return -act


class Shrunk(Patcher):
    """A third of the conditional mean: what a user may build on ``Needs(conditional=True)``."""

    needs = Needs("mean", "all", conditional=True)
    reads_activation = False

    def patch(self, act, source, site):
        return source / 3


PATCHERS = {
    "zero": Zero(),
    "resample": Resample(),
    "mean_all": Mean("plain", "all"),
    "mean_group": Mean("plain", "group"),
    "conditional_all": Mean("conditional", "all"),
    "conditional_group": Mean("conditional", "group"),
    "halfway": Halfway(),
    "flipped": Flipped(),
    "shrunk": Shrunk(),
}


def tiny_config(family: str, n_layers: int = 3, n_heads: int = 2, d_head: int = 4, vocab: int = VOCAB):
    """The transformers config of a tiny model. Grouped key/value heads where the family has them and the number of heads is even."""
    d_model = n_heads * d_head
    shared = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=d_model, n_head=n_heads, n_layer=n_layers, n_positions=16, **shared)
    size = {"hidden_size": d_model, "num_attention_heads": n_heads, "num_hidden_layers": n_layers, "intermediate_size": 3 * d_model}
    if family.startswith("gpt_neox"):
        return transformers.GPTNeoXConfig(use_parallel_residual=family.endswith("parallel"), max_position_embeddings=16, **size, **shared)
    grouped = {"num_key_value_heads": n_heads // 2 if n_heads % 2 == 0 else n_heads, "max_position_embeddings": 16, "pad_token_id": 0}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "olmo2": "Olmo2"}
    # Heads wider than d_model / n_heads, where the family allows it.
    wide = {"head_dim": d_head + 2} if family in ("qwen3", "gemma2", "olmo2") else {}
    return getattr(transformers, f"{names[family]}Config")(**size, **shared, **grouped, **wide)


def tiny_hf(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "eager", **shape: int):
    """A transformers model with weights so large that every component matters."""
    config = tiny_config(family, **shape)
    config._attn_implementation = attention
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    hf.requires_grad_(False)
    return hf.to(dtype)


def tiny_model(family: str = "gpt2", **settings) -> HookedModel:
    """A tiny model of its own, for tests that break or count things."""
    return HookedModel(tiny_hf(family, **settings), name=f"tiny-{family}")


@lru_cache(maxsize=64)
def shared_model(family: str = "gpt2", n_layers: int = 3, n_heads: int = 2, dtype: torch.dtype = torch.float32) -> HookedModel:
    """The same, made once, for tests that only read."""
    return tiny_model(family, n_layers=n_layers, n_heads=n_heads, dtype=dtype)


def linear_llama(n_layers: int, n_heads: int, d_model: int, vocab: int, d_head: int = 2, window: int | None = None) -> HookedModel:
    """A Llama whose norms are exactly the identity, whose heads look at all earlier tokens alike, and whose other weights are zero.

    The norm divides by sqrt(mean square + eps) and multiplies by its weight: with eps = 2^40 and a weight of 2^20 that is 1 in float32.
    Queries and keys are zero, so a head's z is the mean of its values so far. ReLU makes the gate 1 where it reads a 1. With a window it
    is a Mistral, which is the same but for heads that see only so many tokens, their own among them.
    """
    d_model = -(-d_model // n_heads) * n_heads  # transformers insists
    kind, more = (transformers.LlamaConfig, {}) if window is None else (transformers.MistralConfig, {"sliding_window": window})
    config = kind(
        hidden_size=d_model, head_dim=d_head, num_attention_heads=n_heads, num_key_value_heads=n_heads, num_hidden_layers=n_layers,
        intermediate_size=2, vocab_size=vocab, hidden_act="relu", rms_norm_eps=2.0**40, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        **more,
    )  # fmt: skip
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.fill_(2.0**20 if parameter.ndim == 1 else 0.0)
    hf.requires_grad_(False)
    return HookedModel(hf, name="by-hand")


def wire_head(model: HookedModel, layer: int, head: int, read: int, write: int, weight: float) -> None:
    """Makes a head add ``weight`` x (mean of dimension ``read`` so far) to dimension ``write``."""
    attention, place = model.module(layer, "attention"), head * model.d_head
    attention.v_proj.weight[place, read] = 1.0
    attention.o_proj.weight[write, place] = weight


def wire_mlp(model: HookedModel, layer: int, read: int, write: int, weight: float) -> None:
    """Makes an MLP add ``weight`` x dimension ``read`` to dimension ``write``. Dimension 0 must be 1."""
    mlp = model.module(layer, "mlp")
    mlp.gate_proj.weight[0, 0] = 1.0
    mlp.up_proj.weight[0, read] = 1.0
    mlp.down_proj.weight[write, 0] = weight


def paths_model() -> HookedModel:
    """A linear model of two layers of two heads whose paths are known by hand: see test_edges.py."""
    model = linear_llama(n_layers=2, n_heads=2, d_model=6, vocab=8)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        wire_head(model, 0, 0, 1, 2, 1.0)
        wire_head(model, 0, 1, 1, 4, 5.0)
        wire_mlp(model, 0, 2, 3, 10.0)
        wire_head(model, 1, 0, 3, 4, 1.0)
        wire_head(model, 1, 1, 2, 4, 2.0)
        wire_mlp(model, 1, 4, 5, 1.0)
        model.hf.lm_head.weight[1, 1:6] = 1.0
    return model


def paths_prompts(clean: torch.Tensor, corrupt: torch.Tensor) -> PromptSet:
    """Prompts of one value each for that model; the answer is token 1 against token 2."""
    one = torch.ones(len(clean), dtype=torch.long)
    ids = [values.long()[:, None].expand(-1, 3).contiguous() for values in (clean, corrupt)]
    return PromptSet(*ids, one, one + 1, one - 1)


PLANTED = ("a0.h1", "m1", "a2.h0")


def micro_model() -> HookedModel:
    """One layer, two heads, an MLP of two neurons, whose numbers follow by hand.

    Dimensions: 0 is always 1, 1 the token's value (its id), 2 what heads write, 3 what the MLP writes. Head 0 adds 1 x mean value, head 1
    adds 2 x mean value to dimension 2; neuron 0 reads dimension 2 and adds 10 x it to dimension 3; neuron 1 is 0. Logit of token 1 =
    dimension 2 + dimension 3; logit of token 2 = dimension 0 = 1. So logit difference = heads + MLP - 1.
    """
    micro = linear_llama(n_layers=1, n_heads=2, d_model=4, vocab=8)
    with torch.no_grad():
        micro.hf.model.embed_tokens.weight[:, 0] = 1.0
        micro.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        wire_head(micro, 0, 0, 1, 2, 1.0)
        wire_head(micro, 0, 1, 1, 2, 2.0)
        wire_mlp(micro, 0, 2, 3, 10.0)
        micro.hf.lm_head.weight[1, 2] = micro.hf.lm_head.weight[1, 3] = 1.0
        micro.hf.lm_head.weight[2, 0] = 1.0
    return micro


# At the last position the mean value is 4 and 2 in the clean prompts, 1 and 3 in the corrupt ones: heads 12 and 6, 3 and 9.
MICRO_PROMPTS = PromptSet(
    clean=torch.tensor([[7, 3, 2], [1, 2, 3]]),
    corrupt=torch.tensor([[2, 1, 0], [4, 3, 2]]),
    answers=torch.tensor([1, 1]),
    wrongs=torch.tensor([2, 2]),
    groups=torch.tensor([0, 1]),
    group_names=("first", "second"),
)


def planted_model(n_layers: int = 4, n_heads: int = 3, noise: float = 1.0, seed: int = 0) -> HookedModel:
    """A model whose circuit is ``PLANTED``: it reads the tokens' values, hands the number on twice, and makes it the logit of token 1.

    All other components write into dimensions that only they read.
    """
    # Dimensions: 0 is always 1, 1 the token's value, 2 to 4 the number on its way, 5 to 8 noise.
    model = linear_llama(n_layers, n_heads, 9, 8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 0] = 1.0
        model.hf.model.embed_tokens.weight[:, 1] = torch.arange(8.0)
        model.hf.lm_head.weight[1, 4] = 1.0
        for node in model.universe.nodes:
            if str(node) in PLANTED:
                continue
            read, write = (int(place) for place in torch.randint(5, 9, (2,), generator=generator))
            wire = (
                (lambda *a, n=node: wire_head(model, n.layer, n.head, *a))
                if node.kind is Kind.HEAD
                else partial(wire_mlp, model, node.layer)
            )
            wire(1 if node.layer == 0 else read, write, noise)
        wire_head(model, 0, 1, 1, 2, 1.0)
        wire_mlp(model, 1, 2, 3, 1.0)
        wire_head(model, 2, 0, 3, 4, 1.0)
    return model


def planted_prompts(n: int = 6, n_pos: int = 5) -> PromptSet:
    """Values 4 to 7 against 0 and 1, so that the number of a clean prompt is large and of a corrupt one small."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(low, high, (n, n_pos), generator=generator) for low, high in ((4, 8), (0, 2)))
    return PromptSet(clean, corrupt, torch.full((n,), 1), torch.full((n,), 2), torch.arange(n) % 2, ("g0", "g1"))


def tiny_prompts(
    n: int = 6, n_pos: int = 5, n_groups: int = 2, seed: int = 0, *, same: int = 0, alike: bool = True, vocab: int = VOCAB
) -> PromptSet:
    """Random token ids with random answers; groups in turn, with one label that lies elsewhere in each group.

    The first ``same`` tokens of a corrupt prompt are those of its clean twin; ``alike`` makes them the same in all prompts.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, vocab, shape, generator=generator)

    answers = draw(n)
    clean, corrupt = draw(n, n_pos), draw(n, n_pos)
    clean[:, :same] = clean[:1, :same] if alike else clean[:, :same]
    corrupt[:, :same] = clean[:, :same]
    return PromptSet(
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        wrongs=(answers + 1 + draw(n) % (vocab - 1)) % vocab,
        groups=torch.arange(n) % n_groups,
        group_names=tuple(f"g{group}" for group in range(n_groups)),
        spans={"S1": tuple(group % n_pos for group in range(n_groups))},
    )


def solvable_prompts(model: HookedModel, n: int = 6, n_pos: int = 5, n_groups: int = 2, seed: int = 0) -> PromptSet:
    """Random prompts whose answer is what the model says and whose wrong token is what it says on the corrupt twin or least likely."""
    drawn = tiny_prompts(n, n_pos, n_groups, seed)
    with torch.no_grad():
        clean, corrupt = (model.hf(ids).logits[:, -1].float() for ids in (drawn.clean, drawn.corrupt))
    return PromptSet(
        drawn.clean, drawn.corrupt, clean.argmax(-1), (corrupt - clean).argmax(-1), drawn.groups, drawn.group_names, drawn.spans
    )


def engines(model: HookedModel, prompts: PromptSet, patcher: Patcher, graph=None, **packed) -> tuple[PackedEngine, ReferenceEngine]:
    """The fast engine and the naive one on the same things."""
    parts = (model, prompts, patcher, LogitDiff(), graph)
    return PackedEngine(*parts, **packed), ReferenceEngine(*parts)


def logits_of(engine: Engine, masks: Masks, base=None) -> Logits:
    """Logits of every mask and prompt, given a base."""
    logits = torch.full((len(masks), len(engine.prompts), engine.model.d_vocab), torch.nan)
    for chosen, rows, part in engine.passes(masks, base):
        assert logits[chosen, rows].isnan().all(), "a mask was run twice"
        logits[chosen, rows] = part
    return logits


def random_masks(n: int, width: int, seed: int = 0, keep: float = 0.6) -> Masks:
    """Masks that keep about this share of the units."""
    return torch.rand(n, width, generator=torch.Generator().manual_seed(seed)) < keep


def difference(found: Logits, expected: Logits) -> float:
    """Largest difference, relative to the spread of what is expected. NaN if something is missing."""
    return ((found - expected).abs().max() / expected.std()).item()


def hook_counts(model: HookedModel) -> dict[str, tuple[int, int]]:
    """Forward hooks on every module."""
    return {name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.hf.named_modules()}


def state_of(model: HookedModel) -> tuple:
    """Everything that a run must leave as it was: hooks, weights, and the flags for gradients and training."""
    hf = model.hf
    weights = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in hf.named_parameters()}
    training = {name: module.training for name, module in hf.named_modules()}
    forwards = {name: "forward" in vars(module) for name, module in hf.named_modules()}
    return hook_counts(model), weights, flags, training, forwards, torch.is_grad_enabled()


def same_state(before: tuple, after: tuple) -> bool:
    """Whether two states of a model are equal, weights bit for bit."""
    weights, others = (before[1], after[1]), ((*before[:1], *before[2:]), (*after[:1], *after[2:]))
    equal = weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    return equal and others[0] == others[1]


@contextmanager
def failing(module: torch.nn.Module, error: Exception, times: int = 1) -> Iterator[None]:
    """Makes a module raise, the first ``times`` times that it is called."""
    left = [times]

    def raise_it(*_) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    handle = module.register_forward_pre_hook(raise_it)
    try:
        yield
    finally:
        handle.remove()
