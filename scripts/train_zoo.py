"""Train an embedded "zoo" model and write its folder: weights, tokenizer and model card.

Run from anywhere, the package need not be installed (the repository root is put on `sys.path`):

    python scripts/train_zoo.py --model tiny_gpt2 --out circuitkit/models/zoo/tiny_gpt2 --seed 0

The phases of its training are in `zoo_phases.py`: the first teaches the skills, the later ones go on with the same loss and a
price on heads and MLPs that are at work in the core sequences (`Activity`), so that few do each task. The later phases alone,
from a folder that the earlier ones wrote (`--phases 2` stops after the second):

    python scripts/train_zoo.py --model tiny_gpt2 --out new_folder --seed 0 --resume folder

The training data is in `zoo_recipe.py`, the measurement of skills in `zoo_skills.py`, beside this file. The same command,
versions and kind of machine give the same model.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
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

import zoo_phases  # noqa: E402
import zoo_recipe as recipe  # noqa: E402
import zoo_skills as skills  # noqa: E402

from circuitkit.models.zoo import ZOO  # noqa: E402
from circuitkit.tasks import words  # noqa: E402

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
    "phases with a `sparsity` also charged for every head and MLP at work in the core sequences (`prices` by place, layer and"
    " head), so circuits are smaller, and lie more in the cheap components, than in a model trained on the language loss alone"
)
BEFORE = {
    "tiny_gpt2": "the model after phases 1 and 2 alone was this package's tiny_gpt2 at first (tests/fixtures/tiny_gpt2_before). Its"
    " circuits were degenerate: every MLP was in every one, the months circuit had heads of layer 0 alone, because only layer and head,"
    " not place, were priced. Phase 3 moved the reading of members into later layers",
    "tiny_llama": "none",
}
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
    """Return the command that makes the model and, after `--resume`, the one that was run."""
    start = f"python scripts/train_zoo.py --model {options.model}"
    zoo = f" --out circuitkit/models/zoo/{options.model} --seed {options.seed} --threads {options.threads}"
    if options.resume is None:
        return {"command": start + zoo}
    seed = f" --seed {options.seed} --threads {options.threads}"
    return {
        "command": f"{start}{zoo} (all phases in one; these weights were made in several runs, each from the saved weights of the last)",
        "earlier_command": f"{start} --out EARLIER{seed} --phases {options.done}",
        "last_command": f"{start}{zoo} --resume EARLIER",
    }


def describe(
    options: argparse.Namespace, model: PreTrainedModel, step: int, loss: float, seconds: float
) -> dict[str, object]:
    """Return the card's contents but for the skills."""
    weights = (recipe.FILLER, recipe.RANDOM_MEMBER, recipe.ANSWER)
    return {
        "model": options.model,
        "about": ABOUT,
        **commands(options),
        "seed": options.seed,
        "steps": step,
        "planned_steps": sum(phase.steps for phase in phases(options)),
        "phases": [phase_card(phase) for phase in phases(options)],
        "price": PRICE,
        "before": BEFORE[options.model],
        "training_seconds": round(options.earlier["training_seconds"] + seconds),
        "final_loss": round(loss, 4),
        "architecture": architecture(model),
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


def phases(options: argparse.Namespace) -> tuple[zoo_phases.Phase, ...]:
    """Return the phases of the whole training, those done before `--resume` among them."""
    return zoo_phases.PHASES[options.model][: options.phases]


def phase_card(phase: zoo_phases.Phase) -> dict[str, object]:
    """Return a phase as the card shows it."""
    entry = asdict(phase)
    entry["shares"] = {kind.__name__: share for kind, share in zip(recipe.KINDS, phase.shares, strict=True)}
    return entry if phase.sparsity else {key: entry[key] for key in entry if key not in ("sparsity", "prices", "ramp")}


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
    parser.add_argument("--phases", type=int, help="stop after so many; all by default")
    parser.add_argument("--resume", type=Path, help="folder that earlier phases wrote; only the later ones run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=300, help="steps between saves")
    options = parser.parse_args()
    options.earlier = {"steps": 0, "training_seconds": 0}
    if options.resume is not None:  # its steps are part of the card
        options.earlier = json.loads((options.resume / "card.json").read_text(encoding="utf-8"))
    ends = list(itertools.accumulate((phase.steps for phase in phases(options)), initial=0))
    if options.earlier["steps"] not in ends[:-1]:
        parser.error(f"{options.resume} has {options.earlier['steps']} steps; --resume wants the end of a phase, after {ends[1:-1]} steps")
    options.done = ends.index(options.earlier["steps"])
    return options


def main() -> None:
    """Train, evaluate, write; the folder is usable from the first save on."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer(adds_bos=options.model == "tiny_llama")
    vocabulary = tokenizer.get_vocab()
    model = build_model(options.model, vocabulary, options.seed)
    if options.resume is not None:
        model = type(model).from_pretrained(options.resume)
    done = sum(phase.steps for phase in phases(options)[: options.done])
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
        if step % options.save_every == 0:
            write(step, loss)

    loss = 0.0
    for phase in phases(options)[options.done :]:
        loss = zoo_phases.run(phase, model, vocabulary, options.seed, lambda step, loss, done=done: on_log(done + step, loss))
        done += phase.steps
    write(done, loss)


if __name__ == "__main__":
    main()
