"""What is measured: models of real shapes with random weights, prompts of random tokens, and the published circuits.

Speed does not depend on what weights and prompts say, so nothing is downloaded and everyone measures the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import NodeUniverse
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.methods import IterativePruning
from circuitkit.metrics import LogitDiff
from circuitkit.models.hooked import HookedModel
from circuitkit.models.zoo import zoo_path
from circuitkit.patchers import Mean

N_POS = 23
"""Tokens of a published GPT-2 prompt."""


def gpt2(*, quick: bool = False, device: str = "cpu") -> HookedModel:
    """The shape of GPT-2 Small, or a tiny one."""
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 101} if quick else {}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    return _random("tiny GPT-2" if quick else "GPT-2 Small", config, device=device)


def tiny_gpt2() -> HookedModel:
    """The shape of circuitkit's embedded model."""
    return _random("tiny_gpt2", transformers.GPT2Config.from_pretrained(zoo_path("tiny_gpt2")))


def llama_7b(device: str = "cuda", *, quick: bool = False) -> HookedModel:
    """The shape of Llama-2-7B in bfloat16, or a tiny one."""
    sizes = (64, 4, 3, 160, 101) if quick else (4096, 32, 32, 11008, 32000)
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
    return _random("Llama-2-7B", transformers.LlamaConfig(**dict(zip(names, sizes, strict=True))), dtype=torch.bfloat16, device=device)


def _random(name: str, config: transformers.PreTrainedConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> HookedModel:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    return HookedModel(hf.to(device, dtype).requires_grad_(False), name=name)


def prompts(model: HookedModel, n: int, n_pos: int = N_POS) -> PromptSet:
    """Random prompts; the answer is what the model finds most likely, so that a percentage means something."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, model.d_vocab, (2, n, n_pos), generator=generator)
    with torch.no_grad():
        last = torch.cat([model.run(ids)[:, -1].float().cpu() for ids in clean.split(256)])
    return PromptSet(clean, corrupt, last.argmax(-1), last.argmin(-1), torch.zeros(n, dtype=torch.long))


def engine(
    model: HookedModel, prompt_set: PromptSet, means: str = "plain", graph: NodeUniverse | None = None, **settings: int
) -> PackedEngine:
    """A new engine with nothing computed, as a user gets it."""
    return PackedEngine(model, prompt_set, Mean(means), LogitDiff(), graph, **settings)


def single_masks(graph: NodeUniverse) -> Tensor:
    """Every unit removed alone."""
    return ~torch.eye(len(graph), dtype=torch.bool)


def circuits(graph: NodeUniverse) -> dict[str, Tensor]:
    """The published GPT-2 Small circuits as masks; for any other shape, one random circuit."""
    if (graph.n_layers, graph.n_heads) != (12, 12):
        return {"random": torch.rand(len(graph), generator=torch.Generator().manual_seed(0)) < 0.2}
    named: dict[str, Sequence[str]] = json.loads(Path(__file__).with_name("circuits.json").read_text())
    return {task: graph.mask(names) for task, names in named.items()}


class Scripted(PackedEngine):
    """Computes every score it is asked for, and then says what leads a search to a given circuit. Keeps the masks asked for."""

    def follow(self, circuit: Tensor) -> Scripted:
        """Sets the circuit to be found."""
        self.circuit = circuit
        self.asked: list[Tensor] = []
        return self

    def percent(self, masks: Tensor, base: Tensor | None = None) -> Tensor:
        if not self.asked:
            self.score(self.universe.empty()[None])  # the baseline; `baseline()` would refuse the zeros of uncomputed products
        self.score(masks, base)
        self.asked += list(masks)
        return torch.where((self.circuit & ~masks).any(-1), 50.0, 90.0)


def search(model: HookedModel, prompt_set: PromptSet, circuit: Tensor, means: str = "plain", *, speculate: bool = True) -> list[Tensor]:
    """A whole search from nothing whose decisions lead to ``circuit``; the masks that were scored."""
    scripted = Scripted(model, prompt_set, Mean(means), LogitDiff()).follow(circuit)
    found = IterativePruning(speculate=speculate).discover(scripted, on_step=lambda step: None)
    assert torch.equal(found.mask(model.universe), circuit)
    return scripted.asked
