"""From a name to a model that is ready to be taken apart: where it lies, whether it may be trusted, in which dtype, on which device.

Everything ends as a local folder before transformers sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from circuitkit.core.errors import ModelError, unknown_choice
from circuitkit.models.adapters import SETTINGS, adapted
from circuitkit.models.files import settings_of
from circuitkit.models.hooked import HookedModel
from circuitkit.models.hub import SMALL_FILES, brief, is_hub_id, snapshot
from circuitkit.models.named import HUB_MODELS
from circuitkit.models.own_code import CODE, code_of
from circuitkit.models.processes import processes
from circuitkit.models.quantized import quantization_of, settle_quantized
from circuitkit.models.sharded import options_of, settle
from circuitkit.models.zoo import ZOO, zoo_path

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flex_attention")

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Its tokenizer takes the place of one that is not at hand.
_STAND_IN = "tiny_gpt2"
# What transformers raises for files and settings that it cannot use.
_REFUSALS = (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class _Found:
    """A model folder that may be opened.

    Attributes:
        source: What the user calls it.
        folder: Where it is.
        commit: On the hub, where known.
        config: Its configuration.
        code: Files of Python code that it brings along and that may be run, by SHA-256.
    """

    source: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    code: Mapping[str, str]

    def hooked(self, name: str | None, hf: PreTrainedModel, *, made_of: Mapping[str, Any] | None = None, **others: Any) -> HookedModel:
        """The model under its name: only the last part of a path, because names of files are made of it."""
        called = Path(name or self.source).name or Path(self.source).resolve().name
        origin = {**({"own_code": dict(self.code)} if self.code else {}), **(made_of or {})}
        return HookedModel(hf, _tokenizer(self), name=called, revision=self.commit, origin=origin, **others)


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
    trust_remote_code: bool | None = None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    tp_plan: str | None = None,
) -> HookedModel:
    """Loads a model and its tokenizer: evaluation mode, no gradients for weights, safetensors only.

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
        trust_remote_code: What to do with Python code that the model brings along: True runs it, False leaves it aside for the
            implementation of transformers, None refuses such a model.
        adapter: A folder or hub id of a LoRA that PEFT saved; it is merged into the weights in memory.
        quantization: ``bnb_4bit`` or ``bnb_8bit``: weights are rounded while they are loaded, by bitsandbytes.
        tp_plan: ``auto`` lays the model over the processes that ``torchrun`` started.

    Raises:
        ModelError: The model cannot be found, may not be loaded, or is of an unknown kind.
    """
    source = _source(name, path)
    for what, given, choices in (("dtype", dtype, DTYPES), ("attention implementation", attention, ATTENTIONS)):
        if given not in choices:
            raise ModelError(unknown_choice(what, given, choices))
    if source in HUB_MODELS and dtype == "auto":
        dtype = HUB_MODELS[source].dtype
    if tp_plan is not None and any(each is not None for each in (device_map, max_memory, offload_folder, quantization, adapter)):
        raise ModelError(
            "model.tp_plan places the model itself. Leave out device_map, max_memory, offload_folder, quantization and adapter."
        )
    placement = {} if tp_plan is not None else _placement(device_map, max_memory, offload_folder)
    found = _found(source, revision, local_files_only, trust_remote_code)
    if tp_plan is not None:
        return _over_processes(found, name, tp_plan, dtype, attention)
    made_of: dict[str, Any] = {}
    if quantization is not None:
        placement |= quantization_of(quantization, found.config, dtype)
        made_of["quantization"] = quantization
    hf = _weights(found, dtype=dtype, attn_implementation=_attention(attention, found.config), **placement)
    if quantization is not None:
        settle_quantized(hf)
    if adapter is not None:
        base = HUB_MODELS[source].repo if source in HUB_MODELS else source
        hf, told = adapted(hf, adapter, base, local_files_only=local_files_only)
        made_of |= told
    # Rounded weights give sums that hold only about: the map is proved on the same model before it was rounded.
    shape = None if quantization is None else HookedModel(_without_weights(found, "float32", attention)).map
    return found.hooked(name, hf, folder=found.folder, made_of=made_of, map=shape)


def _over_processes(found: _Found, name: str | None, plan: str, dtype: str, attention: str) -> HookedModel:
    """The model laid over the processes of this launch."""
    shape = _without_weights(found, "float32", attention)
    hf = _weights(found, dtype=dtype, attn_implementation=_attention(attention, found.config), **options_of(plan, shape))
    settle(hf)
    # Each process finds the map by itself, without passes that the others would have to make too.
    return found.hooked(name, hf, folder=found.folder, map=HookedModel(shape).map)


def load_shape(
    name: str | None = None,
    *,
    path: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attention: str = "auto",
    local_files_only: bool = False,
    trust_remote_code: bool | None = None,
) -> HookedModel:
    """The same model without its weights, on the ``meta`` device: for planning. Only the configuration and the tokenizer are fetched.

    Args: as for ``load_model``.

    Raises:
        ModelNotAtHand: The hub has it, and this machine cannot get it.
        ModelError: The model cannot be found or is of an unknown kind.
    """
    source = _source(name, path)
    found = _found(source, revision, local_files_only, trust_remote_code, weights=False)
    if dtype == "auto":
        dtype = HUB_MODELS[source].dtype if source in HUB_MODELS else str(found.config.dtype or "float32").removeprefix("torch.")
    return found.hooked(name, _without_weights(found, dtype, attention))


def known_shape(name: str, *, dtype: str = "auto", attention: str = "auto") -> HookedModel:
    """A model with a short name as the package knows it (``named.py``), without its files and with the tokenizer of ``tiny_gpt2``.

    Raises:
        ModelError: There is no such name, or the model is of an unknown kind.
    """
    if name not in HUB_MODELS:
        raise ModelError(unknown_choice("model of known shape", name, tuple(HUB_MODELS)))
    known = HUB_MODELS[name]
    config = AutoConfig.for_model(known.family, **{**known.config, "bos_token_id": None, "eos_token_id": None})
    found = _Found(_STAND_IN, zoo_path(_STAND_IN), None, config, {})
    return found.hooked(name, _without_weights(found, known.dtype if dtype == "auto" else dtype, attention))


def _without_weights(found: _Found, dtype: str, attention: str) -> PreTrainedModel:
    config = found.config
    config.pad_token_id = None  # with one, GPT-2 looks at the content of token ids
    options = {"dtype": getattr(torch, dtype), "attn_implementation": _attention(attention, config), "trust_remote_code": bool(found.code)}
    with torch.device("meta"), _quiet(found.source in ZOO), _worded(found, f"transformers cannot make {found.source}"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return made.requires_grad_(False).eval()


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


def _found(source: str, revision: str | None, local_files_only: bool, trust: bool | None, *, weights: bool = True) -> _Found:
    """The folder that holds a model, downloaded if need be, after all checks that need no weights."""
    if source in HUB_MODELS and trust is None and HUB_MODELS[source].own_code:
        trust = False
    patterns = (*SMALL_FILES, *(["*.safetensors"] if weights else []), *([CODE] if trust else []))
    folder, commit = _folder(source, revision, local_files_only, patterns)
    if (folder / SETTINGS).exists():  # transformers would load the base that it names, from wherever
        raise ModelError(f"{source} holds an adapter ({SETTINGS}). Give its base as the model, and this as model.adapter={source}.")
    settings = settings_of(folder, source)
    code = code_of(folder, settings, source, trust)
    if weights:
        _check_weights(folder, source)
    found = _Found(source, folder, commit, PreTrainedConfig(), code)
    with _worded(found, f"config.json of {source} cannot be used", " Correct it, or download the model again."):
        return replace(found, config=AutoConfig.from_pretrained(folder, trust_remote_code=bool(code), local_files_only=True))


def _folder(source: str, revision: str | None, local_files_only: bool, patterns: Sequence[str]) -> tuple[Path, str | None]:
    """The folder that holds a model, downloaded if need be, and the commit if it came from the hub."""
    if source in HUB_MODELS:
        return snapshot(HUB_MODELS[source].repo, revision, local_files_only, patterns)
    folder = zoo_path(source) if source in ZOO else Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"Only models on the hub have revisions, found revision={revision!r} for {source}. Leave it out.")
        return folder, None
    if is_hub_id(source):
        return snapshot(source, revision, local_files_only, patterns)
    if "/" in source or "\\" in source:
        raise ModelError(f"There is no folder {source}, and it is not a hub id, which looks like 'openai-community/gpt2'. Check the path.")
    remedy = "A folder or a hub id (with a slash) can be given as model=local model.path=..."
    raise ModelError(unknown_choice("model", source, (*ZOO, *HUB_MODELS), remedy))


@contextmanager
def _worded(found: _Found, failure: str, remedy: str = "") -> Iterator[None]:
    """Puts what transformers refuses into a sentence, and whatever goes wrong in a model's own code."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _REFUSALS) and not found.code:
            raise
        raise ModelError(f"{failure}: {brief(error)}{remedy}") from error


def _check_weights(folder: Path, source: str) -> None:
    """Only safetensors files are opened."""
    if not any((folder / file).exists() for file in _WEIGHTS):
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        found = f"only {', '.join(pickles[:3])}" if pickles else "no weights"
        raise ModelError(
            f"{source} has {found}. Expected model.safetensors: other formats can run code when they are opened, so they are not read. "
            "Convert a copy that you trust with from_pretrained and save_pretrained, or take a revision that has safetensors."
        )


def _tokenizer(found: _Found) -> Any:
    """The tokenizer that lies beside the weights. No padding token is needed: prompts of a batch have equal length."""
    folder, source = found.folder, found.source
    # Without its files some tokenizer classes come up empty instead of failing.
    if not any((folder / file).exists() for file in _TOKENIZERS):
        raise ModelError(
            f"{source} has no tokenizer. Expected one of {', '.join(_TOKENIZERS)} beside the weights: "
            "save it there with tokenizer.save_pretrained(folder)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(found.code), local_files_only=True)
        file = folder / "tokenizer.json"
        # For some families (qwen2) transformers takes that family's class whatever the file says, and a word-level tokenizer then
        # yields no tokens at all. The file is right.
        if file.exists() and type(Tokenizer.from_file(str(file)).model) is not type(getattr(tokenizer, "_tokenizer", tokenizer).model):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return tokenizer
    # The Rust tokenizers raise plain Exception for a file that they cannot read.
    except Exception as error:
        raise ModelError(f"The tokenizer of {source} cannot be loaded: {brief(error)} Save or download it again.") from error


def _attention(attention: str, config: PreTrainedConfig) -> str:
    """The implementation to use. Capping is left out by sdpa, without an error in some versions of transformers."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise ModelError("This model caps its attention scores, which attention=sdpa would leave out. Take attention=eager or auto.")
    if attention == "auto":
        return "eager" if capped else "sdpa"
    return attention


def _weights(found: _Found, **options: Any) -> PreTrainedModel:
    """The model itself, with every weight found in the files."""
    folder, source = found.folder, found.source
    fixed = {"use_safetensors": True, "trust_remote_code": bool(found.code), "local_files_only": True}
    try:
        with _quiet(source in ZOO):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, **fixed, **options, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise ModelError(f"The weights of {source} are damaged ({brief(error)}). Delete and download or save them again.") from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{source} does not fit the memory of the GPU. Take model.device_map=auto, which spreads it over devices and the main memory, "
            "model.dtype=bfloat16, or a smaller model."
        ) from error
    except Exception as error:
        if not isinstance(error, _REFUSALS) and not found.code:
            raise
        hint = " Give model.offload_folder=<folder>." if "offload" in str(error) else ""
        raise ModelError(f"transformers cannot load {source}: {brief(error)}{hint}") from error
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
