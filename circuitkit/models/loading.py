"""From a name to a model that is ready to be taken apart: where it lies, whether it may be trusted, in which dtype, on which device.

Everything ends as a local folder before transformers sees it. The hub is asked once and with a time limit, so that a machine
without a network says so at once instead of retrying for minutes, and uses what it has in its cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from circuitkit.core.errors import ModelError, unknown_choice
from circuitkit.models.architectures import architecture_of
from circuitkit.models.files import settings_of
from circuitkit.models.hooked import HookedModel
from circuitkit.models.processes import processes
from circuitkit.models.zoo import ZOO, zoo_path


@dataclass(frozen=True)
class HubModel:
    """A model that has a short name.

    Attributes:
        repo: Its id on the Hugging Face hub.
        dtype: What ``dtype="auto"`` means for it: float32 where that fits a common machine, bfloat16 from two billion parameters on.
    """

    repo: str
    dtype: str = "float32"


HUB_MODELS: dict[str, HubModel] = {
    "gpt2": HubModel("openai-community/gpt2"),
    "gpt2_medium": HubModel("openai-community/gpt2-medium"),
    "gpt2_large": HubModel("openai-community/gpt2-large"),
    "gpt2_xl": HubModel("openai-community/gpt2-xl"),
    "pythia_70m": HubModel("EleutherAI/pythia-70m"),
    "pythia_160m": HubModel("EleutherAI/pythia-160m"),
    "pythia_1b": HubModel("EleutherAI/pythia-1b"),
    "qwen2_5_0_5b": HubModel("Qwen/Qwen2.5-0.5B"),
    "tinyllama": HubModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "gemma2_2b": HubModel("google/gemma-2-2b", "bfloat16"),
    "llama2_7b": HubModel("meta-llama/Llama-2-7b-hf", "bfloat16"),
    "llama2_7b_chat": HubModel("meta-llama/Llama-2-7b-chat-hf", "bfloat16"),
    "llama3_8b": HubModel("meta-llama/Meta-Llama-3-8B", "bfloat16"),
    "mistral_7b": HubModel("mistralai/Mistral-7B-v0.1", "bfloat16"),
}
"""The models with a short name, besides those that ship in the package."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention")

_HUB_SECONDS = 10
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_FILES = [*_SMALL_FILES, "*.safetensors"]
# Sub-folders and consolidated files hold the same weights again, in formats of other tools.
_NOT_FILES = ["*/*", "consolidated*"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# What transformers raises for files and settings that it cannot use.
_REFUSALS = (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, StrictDataclassError)


def load_model(
    name: str | None = None,
    *,
    path: str | Path | None = None,
    dtype: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    attention: str = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    local_files_only: bool = False,
) -> HookedModel:
    """Loads a model and its tokenizer: evaluation mode, no gradients for weights, safetensors only, never a model's own code.

    Args:
        name: An embedded model (``tiny_gpt2``), a short name (``gpt2``), a hub id with a slash, or a folder. With ``path``, only what
            to call the model; None takes the last part of the path.
        path: A folder or hub id, when it is not given as ``name``. A folder wins over a short name here.
        dtype: ``float32``, ``bfloat16`` or ``float16``. ``auto`` is the default of the short name, or else what the weights are stored in.
        device_map: As in transformers: a device, ``auto`` to spread the model with Accelerate, or a table of modules. None takes the
            GPU if there is one.
        revision: Branch, tag or commit on the hub.
        attention: Implementation of attention. ``auto`` is ``sdpa``, or ``eager`` for models that cap attention scores.
        max_memory: Most memory to use on each device, such as ``{0: "20GiB", "cpu": "60GiB"}``, with ``device_map="auto"``.
        offload_folder: Where layers go that fit no memory.
        local_files_only: Do not ask the hub; use its cache on this machine.

    Raises:
        ModelError: The model cannot be found, may not be loaded, or is of an unknown kind.
    """
    source = _source(name, path)
    for what, found, choices in (("dtype", dtype, DTYPES), ("attention implementation", attention, ATTENTIONS)):
        if found not in choices:
            raise ModelError(unknown_choice(what, found, choices))
    if source in HUB_MODELS and dtype == "auto":
        dtype = HUB_MODELS[source].dtype
    placement = _placement(device_map, max_memory, offload_folder)
    folder, commit = _folder(source, revision, local_files_only)
    config = _config(folder, source)
    tokenizer = _tokenizer(folder, source)
    with _quiet(source in ZOO):
        hf = _weights(folder, source, dtype=dtype, attn_implementation=_attention(attention, config), **placement)
    # Only the last part, because names of files are made of it.
    return HookedModel(Path(name or source).name or Path(source).resolve().name, hf, tokenizer, revision=commit, folder=folder)


def load_shape(
    name: str | None = None,
    *,
    path: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str = "auto",
    local_files_only: bool = False,
) -> HookedModel:
    """The same model without its weights, on the ``meta`` device: for planning. Only the configuration and the tokenizer are fetched.

    Args: as for ``load_model``.

    Raises:
        ModelError: The model cannot be found or is of an unknown kind.
    """
    source = _source(name, path)
    folder, commit = _folder(source, revision, local_files_only, weights=False)
    config = _config(folder, source, weights=False)
    if dtype == "auto":
        dtype = HUB_MODELS[source].dtype if source in HUB_MODELS else str(config.dtype or "float32").removeprefix("torch.")
    config.pad_token_id = None  # with one, GPT-2 looks at the content of token ids
    with torch.device("meta"), _quiet(source in ZOO):
        hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=_attention(attention, config))
    shape = hf.requires_grad_(False).eval()
    return HookedModel(Path(name or source).name or Path(source).resolve().name, shape, _tokenizer(folder, source), revision=commit)


def _placement(device_map: Any, max_memory: Mapping[Any, Any] | None, offload_folder: str | Path | None) -> dict[str, Any]:
    """The arguments that tell Accelerate where layers go; none for a model that simply stays in the main memory."""
    launched = processes()
    if device_map is None:
        device_map = launched.device or ("cuda" if torch.cuda.is_available() else None)
    if launched.device is not None and device_map in _SPREADING:
        raise ModelError(
            f"{launched.count} processes were launched, and device_map={device_map} would spread the model of each over all cards. Leave "
            "it out to give each process a card of its own, or launch a single process for a model that needs several cards."
        )
    wanted = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if not torch.cuda.is_available() and any(isinstance(device, int) or str(device).startswith("cuda") for device in wanted):
        raise ModelError(f"There is no CUDA device here, found device_map={device_map!r}. Take model.device_map=cpu or null.")
    given = {
        "device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map,
        "max_memory": dict(max_memory) if max_memory else None,
        "offload_folder": str(offload_folder) if offload_folder else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _source(name: str | None, path: str | Path | None) -> str:
    """What to load: an embedded model, a short name, a folder or a hub id, as text."""
    if path is not None:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().is_dir() else str(path)
    if not name:
        raise ModelError("No model is named. Give model=gpt2 or another short name, or model=local model.path=<folder or hub id>.")
    return name


def _folder(source: str, revision: str | None, local_files_only: bool, *, weights: bool = True) -> tuple[Path, str | None]:
    """The folder that holds a model, downloaded if need be, and the commit if it came from the hub."""
    if source in HUB_MODELS:
        return _snapshot(HUB_MODELS[source].repo, revision, local_files_only, weights)
    folder = zoo_path(source) if source in ZOO else Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"Only models on the hub have revisions, found revision={revision!r} for {source}. Leave it out.")
        return folder, None
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return _snapshot(source, revision, local_files_only, weights)
    if "/" in source or "\\" in source:
        raise ModelError(f"There is no folder {source}, and it is not a hub id, which looks like 'openai-community/gpt2'. Check the path.")
    remedy = "A folder or a hub id (with a slash) can be given as model=local model.path=..."
    raise ModelError(unknown_choice("model", source, (*ZOO, *HUB_MODELS), remedy))


def _snapshot(repo: str, revision: str | None, local_files_only: bool, weights: bool) -> tuple[Path, str | None]:
    """The cached copy of a hub model, brought up to date if the hub answers."""
    at = f" at revision {revision!r}" if revision else ""
    offline = local_files_only or not _hub_answers(repo, revision)
    try:
        wanted = _FILES if weights else _SMALL_FILES
        folder = Path(snapshot_download(
            repo, revision=revision, local_files_only=offline, allow_patterns=wanted, ignore_patterns=_NOT_FILES
        ))  # fmt: skip
    except GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated and your account has no access. Accept its licence at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN; or take an open model such as tinyllama, qwen2_5_0_5b or gpt2."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}. Expected a branch, a tag or a commit of that repository.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {repo} on the hub, or it is private. Check the spelling; for a private one log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from error
    # Beside its own classes the hub client lets those of its HTTP library through (requests, httpx or httpx2, by version).
    except Exception as error:
        why = "only local files may be used" if local_files_only else "the hub does not answer, or HF_HUB_OFFLINE is set"
        why = why if offline else f"the download failed ({_brief(error.__cause__ or error).rstrip('.')})"
        raise ModelError(
            f"{repo}{at} is not (completely) in the cache of this machine, and {why}. Connect, or download it elsewhere with "
            f"`hf download {repo}` and give the folder: model=local model.path=<folder>. Without any download: {', '.join(ZOO)}."
        ) from error
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else None


def _hub_answers(repo: str, revision: str | None) -> bool:
    """Whether the hub can be reached, asked once with a time limit; the download itself has none and would hang behind a firewall."""
    try:
        HfApi().model_info(repo, revision=revision, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return True  # It answered, if only to refuse; the download says why.
    except Exception:  # No address, no route, no answer, HF_HUB_OFFLINE: classes of whichever HTTP library the client uses.
        return False
    return True


def _config(folder: Path, source: str, *, weights: bool = True) -> PreTrainedConfig:
    """The model's configuration, after all checks that need no weights."""
    settings = settings_of(folder, source)
    if settings.get("auto_map"):
        raise ModelError(
            f"{source} asks to run Python code that it brings along (auto_map in config.json), which circuitkit never does. Take a model "
            "that transformers itself implements; if it implements this one, remove auto_map from a local copy of config.json."
        )
    # Before transformers reads it, which may not know the family either.
    architecture_of(SimpleNamespace(model_type=settings.get("model_type")))
    if weights:
        _check_weights(folder, source)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except _REFUSALS as error:
        raise ModelError(f"config.json of {source} cannot be used: {_brief(error)} Correct it, or download the model again.") from error


def _check_weights(folder: Path, source: str) -> None:
    """Only safetensors files are opened."""
    if not any((folder / file).exists() for file in _WEIGHTS):
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        found = f"only {', '.join(pickles[:3])}" if pickles else "no weights"
        raise ModelError(
            f"{source} has {found}. Expected model.safetensors: other formats can run code when they are opened, so they are not read. "
            "Convert a copy that you trust with from_pretrained and save_pretrained, or take a revision that has safetensors."
        )


def _tokenizer(folder: Path, source: str) -> Any:
    """The tokenizer that lies beside the weights. No padding token is needed: prompts of a batch have equal length."""
    # Without its files some tokenizer classes come up empty instead of failing.
    if not any((folder / file).exists() for file in _TOKENIZERS):
        raise ModelError(
            f"{source} has no tokenizer. Expected one of {', '.join(_TOKENIZERS)} beside the weights: "
            "save it there with tokenizer.save_pretrained(folder)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        file = folder / "tokenizer.json"
        # For some families (qwen2) transformers takes that family's class whatever the file says, and a word-level tokenizer then
        # yields no tokens at all. The file is right.
        if file.exists() and type(Tokenizer.from_file(str(file)).model) is not type(getattr(tokenizer, "_tokenizer", tokenizer).model):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return tokenizer
    # The Rust tokenizers raise plain Exception for a file that they cannot read.
    except Exception as error:
        raise ModelError(f"The tokenizer of {source} cannot be loaded: {_brief(error)} Save or download it again.") from error


def _attention(attention: str, config: PreTrainedConfig) -> str:
    """The implementation to use. Capping is left out by sdpa, without an error in some versions of transformers."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise ModelError("This model caps its attention scores, which attention=sdpa would leave out. Take attention=eager or auto.")
    if attention == "auto":
        return "eager" if capped else "sdpa"
    return attention


def _weights(folder: Path, source: str, **options: Any) -> PreTrainedModel:
    """The model itself, with every weight found in the files."""
    fixed = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, **fixed, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ModelError(f"The weights of {source} are damaged ({_brief(error)}). Delete and download or save them again.") from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit the memory of the GPU. Take model.device_map=auto, which spreads it over devices and the main memory, "
            "model.dtype=bfloat16, or a smaller model."
        ) from error
    except _REFUSALS as error:
        hint = " Give model.offload_folder=<folder>." if "offload" in str(error) else ""
        raise ModelError(f"transformers cannot load {source}: {_brief(error)}{hint}") from error
    hf, report = loaded
    # transformers fills what is missing or of another size with random numbers, and only warns.
    unfit = sorted(str(key[0] if isinstance(key, tuple) else key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if unfit:
        raise ModelError(
            f"{len(unfit)} weights that config.json of {source} asks for are missing in its files or of another size, such as {unfit[0]}. "
            "Expected a complete causal language model; download or save it again."
        )
    return hf.requires_grad_(False).eval()


@contextmanager
def _quiet(silence: bool) -> Iterator[None]:
    """Keeps progress bars and advice of transformers away, for models too small to need either."""
    if not silence:
        yield
        return
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _brief(error: BaseException) -> str:
    """The first line of an error's text, as one sentence."""
    text = str(error).strip().split("\n", 1)[0][:300].rstrip()
    return f"{type(error).__name__}: {text}".rstrip(".: ") + "."
