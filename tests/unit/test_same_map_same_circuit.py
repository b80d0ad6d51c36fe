"""A map given by hand and one found by value lead to the same circuit file, byte for byte."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import transformers

from circuitkit.core.circuit import Circuit
from circuitkit.engine import PackedEngine
from circuitkit.loggers import JsonlLogger
from circuitkit.methods import IterativePruning
from circuitkit.metrics import LogitDiff
from circuitkit.models import HookedModel, ModelMap, hooked, load_model
from circuitkit.models.model_map import Addend, Block, Heads, Projection
from circuitkit.models.zoo import zoo_path
from circuitkit.patchers import Mean
from circuitkit.runner import Runner
from circuitkit.storage import load
from circuitkit.tasks import Months

EIGHT_HEADS, FOUR_HEADS = (0, 16, 32, 48, 64, 80, 96, 112), (0, 16, 32, 48)


def block(path: str) -> Block:
    """As anyone would write it who reads the source of Llama: eight heads of 16, four of keys and values."""
    return Block(
        module=path,
        attention=Addend(module=f"{path}.self_attn", item=0, n_items=2, norm=f"{path}.input_layernorm"),
        heads=Heads(
            out_proj=f"{path}.self_attn.o_proj",
            n_heads=8,
            n_kv_heads=4,
            d_head=16,
            d_value=16,
            queries=Projection(f"{path}.self_attn.q_proj", EIGHT_HEADS, 16),
            keys=Projection(f"{path}.self_attn.k_proj", FOUR_HEADS, 16),
            values=Projection(f"{path}.self_attn.v_proj", FOUR_HEADS, 16),
        ),
        mlp=Addend(module=f"{path}.mlp", norm=f"{path}.post_attention_layernorm"),
        neurons=f"{path}.mlp.down_proj",
    )


BY_HAND = ModelMap(
    family="llama",
    blocks=(block("model.layers.0"), block("model.layers.1"), block("model.layers.2"), block("model.layers.3")),
    embed="model.embed_tokens",
    final_norm="model.norm",
    unembed="lm_head",
)


def given_by_hand(monkeypatch: pytest.MonkeyPatch) -> HookedModel:
    """The embedded model as transformers loads it, with nothing searched for.

    Without gradients for weights, as ``load_model`` has it: else torch takes another kernel for the logits, and their last bits differ.
    """
    folder = zoo_path("tiny_llama")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.delattr(hooked, "resolve")
        return HookedModel(hf, tokenizer, map=BY_HAND, name="tiny_llama")


def searched(model: HookedModel, folder: Path) -> str:
    """The circuit file of a search. So many rows to a pass: left to free memory, the last bits of the score would move with it."""
    task, engine = Months(n=4, templates=("names", "lost")), partial(PackedEngine, max_rows=64)
    method = IterativePruning(threshold=0.8)
    Runner([JsonlLogger(folder)]).run(model=model, task=task, method=method, patcher=Mean(), metric=LogitDiff(), engine=engine)
    return (folder / "circuit.json").read_text(encoding="utf-8")


def test_a_map_by_hand_and_one_found_give_the_same_circuit_file(tmp_path, monkeypatch):
    found, by_hand = load_model("tiny_llama"), given_by_hand(monkeypatch)
    assert by_hand.map is BY_HAND and found.map is not BY_HAND
    assert found.map == BY_HAND
    texts = [searched(model, tmp_path / name) for name, model in (("found", found), ("by_hand", by_hand))]
    circuit = load(Circuit, tmp_path / "by_hand" / "circuit.json")
    assert 0 < len(circuit.nodes) < len(found.universe), "a circuit of all or nothing shows nothing"
    assert texts[0] == texts[1]
