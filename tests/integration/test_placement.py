"""Models that Accelerate spreads, and what a run is said to need beforehand, held against what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from circuitkit.core.errors import ModelError
from circuitkit.core.prompts import PromptSet
from circuitkit.engine import PackedEngine, ReferenceEngine
from circuitkit.engine.cost import Memory
from circuitkit.engine.proof.quick import quick_check
from circuitkit.jobs import plan
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models import HookedModel, load_model, load_shape, loading
from circuitkit.models.checks import MODEL_CHECKS, random_prompts
from circuitkit.models.processes import Processes
from circuitkit.patchers import Mean, Needs, Patcher, Resample, Zero


class Halfway(Patcher):
    """Reads the activation, and does not name a device."""

    needs = Needs("mean", "group")
    reads_activation = True

    def patch(self, act, source, site):
        return 0.5 * act + 0.5 * source


PATCHERS = {
    "zero": Zero(),
    "resample": Resample(),
    "mean_all": Mean(),
    "conditional_all": Mean("conditional"),
    "conditional_group": Mean("conditional", "group"),
    "halfway": Halfway(),
}
POSITIONS = ("S1", "last")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama with grouped heads, its weights so large that every component matters."""
    folder = tmp_path_factory.mktemp("models") / "small"
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=23,
        max_position_embeddings=32, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in hf.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5) if weight.ndim > 1 else weight.add_(0.2 * noise)
    hf.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(folder) -> HookedModel:
    torch.set_num_threads(1)
    return load_model(path=folder, device_map="cpu")


@pytest.fixture(scope="module")
def split(whole, folder) -> HookedModel:
    """The first layers in memory, the others on disk."""
    weights = sum(weight.nbytes for weight in whole.hf.parameters())
    model = load_model(path=folder, device_map="auto", max_memory={"cpu": weights // 2}, offload_folder=folder.parent / "offload")
    assert {"cpu", "disk"} == set(model.hf.hf_device_map.values())
    assert model.hf.get_parameter("model.layers.3.mlp.up_proj.weight").is_meta
    return model


@pytest.fixture(scope="module")
def prompts(whole) -> PromptSet:
    drawn = random_prompts(whole, 6, 8)
    drawn.corrupt[:, :2] = drawn.clean[:, :2]
    clean, corrupt = (whole.run(ids)[:, -1] for ids in (drawn.clean, drawn.corrupt))
    answers, wrongs = clean.argmax(-1), (corrupt - clean).argmax(-1)
    return PromptSet(drawn.clean, drawn.corrupt, answers, wrongs, drawn.groups, drawn.group_names, {"S1": (2, 4)})


def found(model: HookedModel, prompts: PromptSet, name: str, method, *, engine=PackedEngine):
    """What a method returns, and every score on the way."""
    scorer = engine(model, prompts, PATCHERS[name], LogitDiff(), method.universe(model, prompts))
    if engine is PackedEngine:
        quick_check(scorer)
    steps = []
    result = method.discover(scorer, on_step=steps.append)
    return getattr(result, "values", getattr(result, "names", None)), [(step.node, step.score, step.kept) for step in steps]


@pytest.mark.parametrize("name", ["mean_all", "conditional_group", "resample", "halfway", "zero"])
def test_a_search_over_cpu_and_disk_decides_as_in_memory(whole, split, prompts, name):
    expected = found(whole, prompts, name, IterativePruning(0.5))
    assert found(split, prompts, name, IterativePruning(0.5)) == expected
    assert any(kept for _, _, kept in expected[1]) and not all(kept for _, _, kept in expected[1])


@pytest.mark.parametrize("name", ["mean_all", "conditional_all", "resample"])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all", "positions"])
def test_knock_outs_over_cpu_and_disk_score_as_in_memory(whole, split, prompts, name, positions):
    expected = found(whole, prompts, name, Knockout(positions=positions))
    assert found(split, prompts, name, Knockout(positions=positions)) == expected
    assert len({score for _, score, _ in expected[1]}) > 15


def test_the_cone_is_taken_over_cpu_and_disk_too(split, prompts):
    engine = PackedEngine(split, prompts, Mean(), LogitDiff(), split.universe.at(POSITIONS))
    engine.baseline()
    Knockout(positions=POSITIONS).discover(engine, on_step=lambda step: None)
    assert engine.holds_keys_values and engine.work.layer_tokens < engine.work.layer_rows * prompts.n_pos


def test_the_naive_path_over_cpu_and_disk_scores_as_in_memory(whole, split, prompts):
    method = IterativePruning(0.5, max_sweeps=1)
    expected = found(whole, prompts, "conditional_group", method, engine=ReferenceEngine)
    assert found(split, prompts, "conditional_group", method, engine=ReferenceEngine) == expected


@pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
def test_every_check_of_a_model_passes_over_cpu_and_disk(split, prompts, check):
    verdict = check(split, prompts)
    assert verdict.passed, verdict


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"": "cpu"}], ids=str)
def test_every_kind_of_device_map_is_taken(whole, folder, prompts, device_map):
    model = load_model(path=folder, device_map=device_map)
    assert torch.equal(model.run(prompts.clean), whole.run(prompts.clean))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here; test_devices.py has the logic on stand-ins")
def test_two_cards_decide_as_one_device(whole, folder, prompts):
    layers = {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    two = load_model(path=folder, device_map={**layers, **ends})
    for name in PATCHERS:
        names, steps = found(two, prompts, name, IterativePruning(0.5))
        expected_names, expected = found(whole, prompts, name, IterativePruning(0.5))
        assert names == expected_names
        assert [score for _, score, _ in steps] == pytest.approx([score for _, score, _ in expected], abs=0.05)


def test_a_launch_gives_each_process_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(loading, "processes", lambda: Processes(1, 2, torch.device("cuda:1")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading._placement(None, None, None) == {"device_map": torch.device("cuda:1")}
    with pytest.raises(ModelError, match="2 processes were launched, and device_map=auto would spread the model of each over all cards"):
        loading._placement("auto", None, None)


# What a run will need


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory) -> Path:
    """Llama-2-7B as the hub has it, without its weights."""
    folder = tmp_path_factory.mktemp("llama-2-7b")
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        max_position_embeddings=4096, dtype="float16",
    ).save_pretrained(folder)  # fmt: skip
    save_tokenizer(folder)
    return folder


def test_llama_2_7b_is_planned_from_its_configuration(llama_7b):
    model = load_shape(path=llama_7b)
    started = time.process_time()
    cost = plan.dry_run(model, random_prompts(model, 8, 20), Mean(), LogitDiff(), Knockout(), assume=100.0, max_rows=None)
    assert time.process_time() - started < 60
    assert cost.evaluations == 32 * 33
    assert cost.memory.weights == 6_738_415_616 * 2  # the published number of parameters, two bytes each
    assert cost.memory.weights < cost.memory.peak < 1.3 * cost.memory.weights
    # Two FLOPs a weight and token, for half of the layers on average: heads of layer l run the layers from l on.
    tokens, half = (1056 + 2) * 8 * 20, 0.5
    assert 0.7 < cost.flops / (2 * 6.5e9 * tokens * half) < 1.5
    assert cost.memory.fits({"cpu": 100 * 2**30}) == "yes, cpu"
    assert cost.memory.fits({"cuda:0": 8 * 2**30, "cuda:1": 12 * 2**30, "cpu": 2**30}).startswith("spread over all devices")
    assert cost.memory.fits({"cuda:0": 4 * 2**30, "cpu": 2**30}) == "no, 4.0 GiB are free on cuda:0, 1.0 GiB are free on cpu"


def test_positions_are_planned_too():
    model = load_shape("tiny_llama")
    drawn = random_prompts(model, 6, 8)
    costs = [
        plan.dry_run(model, drawn, Mean(), LogitDiff(), Knockout(positions=positions), assume=100.0, max_rows=None)
        for positions in (None, "all")
    ]
    assert [cost.evaluations for cost in costs] == [36, 36 * 8]
    assert costs[1].memory.states > costs[0].memory.states, "keys and values are held"


def test_the_parts_of_memory_sum_up():
    assert Memory(weights=100, slices=7, states=20, a_row=3, rows=4, logits=5).peak == 144


MEASURED = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from circuitkit.engine import PackedEngine
from circuitkit.engine.cost import DryEngine, memory
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import KL
from circuitkit.models import HookedModel
from circuitkit.models.checks import random_prompts
from circuitkit.patchers import Mean, Resample

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def config():
    return LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                       vocab_size=16000, pad_token_id=0, bos_token_id=0, eos_token_id=0)

with torch.device("meta"):
    shape = HookedModel(LlamaForCausalLM(config()), name="llama")
torch.manual_seed(0)
small = HookedModel(LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                                                          vocab_size=16000, pad_token_id=0)), name="small")
def search(model, n, rows, dry=False):
    prompts = random_prompts(model, n, 32)
    engine = (DryEngine if dry else PackedEngine)(model, prompts, Resample(), KL(), max_rows=rows)
    engine.baseline()
    Knockout().discover(engine, on_step=lambda step: None)
    return engine

search(small, 4, 8)  # code and libraries are loaded before the measurement
planned = memory(search(shape, 48, 192, dry=True))
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
model = HookedModel(LlamaForCausalLM(config()), name="llama")
search(model, 48, 192)
print(json.dumps({"planned": planned.peak, "weights": planned.weights, "measured": resident("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the high-water mark of a process")
def test_the_planned_peak_is_what_a_run_takes():
    """Within a factor of 1.6, for a run in which weights, states, passes and logits all count."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert 1 / 1.6 < seen["planned"] / seen["measured"] < 1.6, seen
    assert seen["measured"] > 1.5 * seen["weights"], "the test would otherwise only weigh the model"
