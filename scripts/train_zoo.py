"""Train an embedded "zoo" model and write its folder: weights, tokenizer and model card.

Run from anywhere, the package need not be installed (the repository root is put on `sys.path`):

    python scripts/train_zoo.py --model tiny_gpt2 --out circuitkit/models/zoo/tiny_gpt2 --seed 0

To the loss comes a price on heads and MLPs that are at work in the core sequences (`Activity`), so that
few do each task. tiny_gpt2 is trained in one phase, in which the price grows (`--ramp`). tiny_llama has two:
phase 1 teaches the skills, phase 2 (`--sparse-steps`) goes on with the whole price. Phase 2 alone, from a
folder that phase 1 wrote (`--sparsity 0` stops there):

    python scripts/train_zoo.py --model tiny_llama --out new_folder --seed 0 --resume folder

The training data is in `zoo_recipe.py`, the measurement of skills in `zoo_skills.py`, both beside
this file. The same command, versions and kind of machine give the same model.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import zoo_recipe as recipe  # noqa: E402
import zoo_skills as skills  # noqa: E402

from circuitkit.models.zoo import ZOO  # noqa: E402
from circuitkit.models.zoo.training import Activity, Prices, train  # noqa: E402
from circuitkit.tasks import words  # noqa: E402

PRICES = {
    # Heads that compare members belong into layers 0 and 1, those that say the next one into 2 and 3; MLP 2 is dear.
    "tiny_gpt2": Prices(
        heads={
            "member": ((1,) * 3 + (4,) * 5, (1,) * 3 + (4,) * 5, (3,) * 8, (4,) * 8),
            "before": ((6,) * 8, (3,) * 8, (1,) * 3 + (3,) * 5, (1,) * 3 + (3,) * 5),
            "other": ((2,) * 8,) * 4,
        },
        mlps=(0.3, 0.3, 1.5, 0.3),
    ),
    # Half of the first layer's heads are dear, so that later layers' heads have work to do.
    "tiny_llama": Prices(heads={"any": ((1,) * 4 + (8,) * 4, *[(1,) * 8] * 3)}, mlps=(0,) * 4),
}
DEFAULTS = {
    "tiny_gpt2": {"steps": 2800, "sparsity": 0.012, "ramp": (300, 1200), "sparse_steps": 0},
    "tiny_llama": {"steps": 4000, "sparsity": 0.007, "ramp": None, "sparse_steps": 600},
}
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


# --- Tokenizer and models ---------------------------------------------------------------------


def build_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer; with `adds_bos` it starts every text with <bos>."""
    groups = (
        SPECIALS, recipe.GLUE, recipe.NUMBERS, recipe.HUNDREDS, words.NUMWORDS, words.ORDINALS,
        words.MONTHS, words.DAYS, words.LETTERS, words.ES_NUMWORDS, words.ES_MONTHS, words.NAMES,
        words.THINGS, words.PLACES, words.OBJECTS, recipe.GREATER_THAN_NOUNS,
    )  # fmt: skip
    unique = dict.fromkeys(word for group in groups for word in group)
    vocabulary = {word: number for number, word in enumerate(unique)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", vocabulary["<bos>"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")},
    )


def build_model(name: str, vocabulary: dict[str, int], seed: int) -> PreTrainedModel:
    """Return a freshly initialised model."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": len(vocabulary),
        **{f"{key}_token_id": vocabulary[f"<{key}>"] for key in ("pad", "bos", "eos")},
    }
    if name == "tiny_gpt2":
        sizes = {"n_positions": 128, "n_embd": 128, "n_layer": 4, "n_head": 8}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, **dropout))
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            max_position_embeddings=128,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


# --- Folder and card --------------------------------------------------------------------------


CORE_NOTE = (
    "Four members shown, the fifth asked for; eight starts, 32 filler draws each. `top1`: the"
    " answer is the likeliest token; `twice_last`: p(answer) > 2 p(last member);"
    " `logit_difference`: mean logit(answer) - logit(last member), and the same pair of tokens"
    " after prompts whose members are random."
)
ABOUT = (
    "A tiny, really trained language model for offline tests, demos and tutorials of circuit"
    " finding. It knows only the synthetic sentences of its training script; it is no general"
    " language model. Right-pad and feed texts with or without `<bos>`."
)
PRICE = (
    "also charged for every head and MLP at work in the core sequences (`sparsity`, `prices` by place, layer and"
    " head), so circuits are smaller, and lie more in the cheap components, than in a model trained on the"
    " language loss alone"
)
OTHER_NOTE = (
    "Fresh draws of the training distribution. Short prompts (bare sequences, equations, month"
    " problems) also occur in the training data, so this is what was learnt, not generalisation."
    " `greater-than year`: the likeliest end year is later than the start."
)


def architecture(model: PreTrainedModel) -> dict[str, object]:
    """Return the sizes of a model."""
    config = model.config
    return {
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "width": config.hidden_size,
        "mlp_width": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
        "dropout": 0.0,
        "parameters": model.num_parameters(),
    }


def commands(options: argparse.Namespace) -> dict[str, str]:
    """Return the command that makes the model and, after `--resume`, those that made it."""
    start = f"python scripts/train_zoo.py --model {options.model}"
    zoo = f" --out circuitkit/models/zoo/{options.model}"
    common = f" --seed {options.seed} --threads {options.threads}"
    first = f" --steps {options.steps} --learning-rate {options.learning_rate}"
    second = f" --sparsity {options.sparsity} --sparse-steps {options.sparse_steps}"
    second += f" --sparse-learning-rate {options.sparse_learning_rate}" if options.sparse_steps else ""
    second += f" --ramp {options.ramp[0]} {options.ramp[1]}" if options.ramp else ""
    whole = start + zoo + common + first + second
    if options.resume is None:
        return {"command": whole}
    return {
        "phase_1_command": start + " --out PHASE_1" + common + first + " --sparsity 0",
        "phase_2_command": start + zoo + common + second + " --resume PHASE_1",
        "command": f"{whole} (both phases in one; these weights were made in two)",
    }


def phases(options: argparse.Namespace) -> str:
    """Return in words what was trained on."""
    if not options.sparsity:
        return "one"
    if options.sparse_steps:
        return f"two; the second {PRICE}"
    return f"one; it {PRICE}; the price grows from step {options.ramp[0]} to {options.ramp[1]}"


def planned_steps(options: argparse.Namespace) -> int:
    """Return the number of steps of both phases, those done before `--resume` among them."""
    return options.steps + (options.sparse_steps if options.sparsity else 0)


def describe(
    options: argparse.Namespace, model: PreTrainedModel, step: int, loss: float, seconds: float
) -> dict[str, object]:
    """Return the card's contents but for the skills."""
    shares = {kind.__name__: share for kind, share in recipe.SHARES[options.model].items()}
    prices = PRICES[options.model]
    weights = (recipe.FILLER, recipe.RANDOM_MEMBER, recipe.ANSWER)
    return {
        "model": options.model,
        "about": ABOUT,
        **commands(options),
        "seed": options.seed,
        "steps": step,
        "planned_steps": planned_steps(options),
        "documents_per_step": recipe.DOCS_PER_STEP,
        "learning_rate": options.learning_rate,
        "phases": phases(options),
        "sparsity": options.sparsity,
        "sparse_steps": options.sparse_steps if options.sparsity else 0,
        "ramp": options.ramp if options.sparsity else None,
        "prices": {"heads": prices.heads, "mlps": prices.mlps},
        "training_seconds": round(options.earlier_seconds + seconds),
        "final_loss": round(loss, 4),
        "architecture": architecture(model),
        "data": shares,
        "random_order_share_of_sequences": recipe.RANDOM_SHARE,
        "share_starting_with_bos": 0.5,
        "loss_weights": dict(zip(("filler", "random member", "answer"), weights, strict=True)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def write_card(folder: Path, card: dict) -> None:
    """Write `card.json` and its readable form, `MODEL_CARD.md`."""
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    lines = [f"# {card['model']}", "", card["about"], ""]
    lines += [f"* {key}: {card[key]}" for key in card if key not in ("model", "about", "skills")]
    lines += ["", "## Core skills", "", CORE_NOTE, ""]
    keys = ("top1", "twice_last", "logit_difference", "corrupted_logit_difference")
    lines += ["| task / template | `<bos>` | " + " | ".join(keys) + " |", "|---" * 6 + "|"]
    for name, entry in card["skills"]["core"].items():
        for bos, result in entry.items():
            cells = " | ".join(str(result[key]) for key in keys)
            lines.append(f"| {name} | {bos.split('_')[0]} | {cells} |")
    lines += ["", "## Other skills (top-1 accuracy)", "", OTHER_NOTE, ""]
    lines += ["| skill | without `<bos>` | with `<bos>` | cases |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {result['without_bos']} | {result['with_bos']} | {result['cases']} |"
        for name, result in card["skills"]["other"].items()
    ]
    (folder / "MODEL_CARD.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights, config and tokenizer so that `from_pretrained` loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which wheels keep
    # The class name that both transformers 4 and 5 know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ZOO, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--sparsity", type=float, help="the whole price of activity; 0: none, and no phase 2")
    parser.add_argument("--ramp", type=int, nargs=2, metavar=("FROM", "TO"), help="steps of phase 1 over which the price grows")
    parser.add_argument("--sparse-steps", type=int, help="steps of phase 2, at the whole price; 0: no phase 2")
    parser.add_argument("--sparse-learning-rate", type=float, default=1e-3)
    parser.add_argument("--resume", type=Path, help="folder of phase 1; only phase 2 runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=300, help="steps between saves")
    options = parser.parse_args()
    options.earlier_seconds = 0
    for name, value in DEFAULTS[options.model].items():
        if vars(options)[name] is None:
            setattr(options, name, value)
    if options.resume is not None:  # its steps are part of the card
        earlier = json.loads((options.resume / "card.json").read_text(encoding="utf-8"))
        if earlier.get("sparsity"):
            parser.error(f"{options.resume} holds a model after phase 2; --resume wants phase 1")
        options.steps = earlier["steps"]
        options.learning_rate = earlier.get("learning_rate", options.learning_rate)
        options.earlier_seconds = earlier["training_seconds"]
    return options


class Price:
    """The price of activity, which grows over the steps of a ramp. Final."""

    def __init__(self, activity: Activity, whole: float, ramp: Sequence[int]) -> None:
        self._activity, self._whole, (self._begin, self._end) = activity, whole, ramp
        self.steps_done = 0

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return what to add to the loss of a chunk."""
        share = min(1.0, max(0.0, (self.steps_done - self._begin) / (self._end - self._begin)))
        return self._whole * share * self._activity.cost(ids, weights) if share else torch.zeros(())


def watched(options: argparse.Namespace, model: PreTrainedModel, vocabulary: dict[str, int]) -> Activity:
    """Return the activity of a model's components in the core sequences."""
    families = [[vocabulary[word] for word in recipe.SETS[name][0]] for name in skills.CORE]
    return Activity(model, families, PRICES[options.model])


def teach(
    options: argparse.Namespace, model: PreTrainedModel, vocabulary: dict[str, int], on_log: Callable[[int, float], None]
) -> float:
    """Run phase 1, with a growing price if there is a ramp."""
    data = recipe.batches(vocabulary, options.seed, recipe.SHARES[options.model])
    settings: dict[str, Any] = {"steps": options.steps, "learning_rate": options.learning_rate, "seed": options.seed}
    if not (options.ramp and options.sparsity):
        return train(model, data, **settings, on_log=on_log)
    activity = watched(options, model, vocabulary)
    price = Price(activity, options.sparsity, options.ramp)

    def count(step: int, loss: float) -> None:
        """Tell the price the step."""
        price.steps_done = step
        on_log(step, loss)

    loss = train(model, data, **settings, penalty=price, on_log=count)
    activity.close()
    return loss


def sparsify(
    options: argparse.Namespace, model: PreTrainedModel, vocabulary: dict[str, int], on_log: Callable[[int, float], None]
) -> float:
    """Run phase 2; it depends on the weights, the options and the seed only."""
    activity = watched(options, model, vocabulary)
    loss = train(
        model,
        recipe.batches(vocabulary, options.seed + 1000, recipe.SHARES[options.model]),
        steps=options.sparse_steps,
        learning_rate=options.sparse_learning_rate,
        warmup=30,
        seed=options.seed,
        penalty=lambda ids, weights: options.sparsity * activity.cost(ids, weights),
        on_log=on_log,
    )
    activity.close()
    return loss


def main() -> None:
    """Train, evaluate, write; the folder is usable from the first save on."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer(adds_bos=options.model == "tiny_llama")
    vocabulary = tokenizer.get_vocab()
    model = build_model(options.model, vocabulary, options.seed)
    if options.resume is not None:
        model = type(model).from_pretrained(options.resume)
    planned = planned_steps(options)
    begin = time.time()

    def write(step: int, loss: float) -> None:
        """Write the folder as it is after a step."""
        card = describe(options, model, step, loss, time.time() - begin)
        save(options.out, model, tokenizer)
        write_card(options.out, card | {"skills": skills.evaluate(model, vocabulary)})
        model.train()

    def on_log(step: int, loss: float) -> None:
        """Report progress and write a usable folder now and then."""
        if step % 25 == 0:
            print(f"step {step} loss {loss:.4f} time {time.time() - begin:.0f}s", flush=True)
        if step % options.save_every == 0 and step < planned:
            write(step, loss)

    loss = 0.0
    if options.resume is None:
        loss = teach(options, model, vocabulary, on_log)
    if options.sparsity and options.sparse_steps:
        loss = sparsify(
            options, model, vocabulary, lambda step, loss: on_log(options.steps + step, loss)
        )
    write(planned, loss)


if __name__ == "__main__":
    main()
