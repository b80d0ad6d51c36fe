"""Loading: from folders that save_pretrained wrote, from a hub (a small one, served here) and its cache, and every refusal."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
from architecture_table import ARCHITECTURES
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from circuitkit.config import build, conf_dir
from circuitkit.core.errors import ConfigError, ModelError
from circuitkit.models import hub as hub_client
from circuitkit.models.hooked import HookedModel
from circuitkit.models.loading import HUB_MODELS, load_model
from circuitkit.models.zoo import ZOO, zoo_path

WORDS = ("<unk>", *"one two three four five six seven eight nine ten eleven".split())
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[1, 2, 3, 4], [5, 4, 3, 2]])


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """Writes a small random model and a word-level tokenizer into a folder."""
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    if family != "gpt2":
        size["intermediate_size"] = 48
    if family not in ("gpt2", "gpt_neox"):
        size["num_key_value_heads"] = 2
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**size, **ends, **changes}), dtype=dtype).eval()
    hf.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return hf


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; returns a function that puts a model into it."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(repo: str, **options) -> None:
        home = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        save(home / "snapshots" / COMMIT, **options)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)

    return put


class Hub:
    """The few answers of the hub that loading needs, over HTTP on this machine.

    Attributes:
        folder: The files of its only model, ``lab/tiny``.
        refusal: HTTP status and error code with which files are refused, as the hub does for gated models.
        asked: Paths of all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refusal: tuple[int, str] | None = None
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(path)
        path = path.partition("?")[0]
        if "lab/tiny" not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "/revision/" in path and not path.endswith(("/main", COMMIT)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in self.folder.rglob("*") if file.is_file()}
        if "/tree/" in path:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        if path.startswith("/api/"):
            info = {"id": "lab/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b""
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(name))}"'}, files[name]


@pytest.fixture
def hub(folder, cache, monkeypatch):
    """A hub that can be reached, with one model."""
    served = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            return body

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, server.server_port)
    yield served
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, port: int) -> None:
    """Lets the hub client use a server on this machine."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# --- Folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_folder_of_every_family(tmp_path, family):
    hf = save(tmp_path / family, family)
    model = load_model(str(tmp_path / family), device_map="cpu")
    assert isinstance(model, HookedModel)
    assert (model.map.family, model.name, model.revision, model.dtype) == (family, family, None, torch.float32)
    assert not model.hf.training and not any(weight.requires_grad for weight in model.hf.parameters())
    assert model.tokenizer("two one")["input_ids"] == [2, 1]
    hf.set_attn_implementation(model.hf.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(model.hf(IDS).logits, hf(IDS).logits)


def test_path_and_name(folder, monkeypatch):
    assert load_model(path=folder).name == "tiny"
    assert load_model("mine", path=folder).name == "mine"
    monkeypatch.chdir(folder.parent)
    assert load_model("tiny/").name == "tiny"
    monkeypatch.chdir(folder)
    assert load_model(".").name == "tiny"
    monkeypatch.chdir(folder.parent)
    (folder.parent / "gpt2").mkdir()  # A folder that happens to have a short name does not hide the model of that name.
    with pytest.raises(ModelError, match="openai-community/gpt2"):
        load_model("gpt2")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(path="gpt2")


@pytest.mark.parametrize("name", ZOO)
def test_embedded_models_load_silently(name, capfd):
    transformers_logging.enable_progress_bar()
    level = transformers_logging.get_verbosity()
    model = load_model(name)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert (model.name, model.dtype) == (name, torch.float32)
    assert transformers_logging.get_verbosity() == level and transformers_logging.is_progress_bar_enabled()


def test_dtype(tmp_path, folder):
    save(tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(str(tmp_path / "half")).dtype == torch.bfloat16  # auto: as stored
    assert load_model(str(tmp_path / "half"), dtype="float32").dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    with torch.no_grad():
        assert load_model(str(folder), dtype="bfloat16").hf(IDS).logits.isfinite().all()


def test_attention_of_capped_models(tmp_path, folder):
    save(tmp_path / "capped", "gemma2")
    assert load_model(str(tmp_path / "capped")).hf.config._attn_implementation == "eager"
    assert load_model(str(folder)).hf.config._attn_implementation == "sdpa"
    assert load_model(str(folder), attention="eager").hf.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="attention=eager or auto"):
        load_model(str(tmp_path / "capped"), attention="sdpa")


def test_layers_on_disk_change_nothing(tmp_path):
    """Also under an edit: what nnsight does to a model that Accelerate feeds from disk."""
    save(tmp_path / "tiny", num_hidden_layers=4)
    whole = load_model(str(tmp_path / "tiny"), device_map="cpu")
    weights = sum(weight.nbytes for weight in whole.hf.parameters())
    spread = load_model(
        str(tmp_path / "tiny"), device_map="auto", max_memory={"cpu": weights // 2}, offload_folder=tmp_path / "offload"
    )  # fmt: skip
    assert "disk" in spread.hf.hf_device_map.values() and spread.hf.get_parameter("model.layers.3.mlp.up_proj.weight").is_meta
    assert torch.equal(spread.run(IDS, keep=0), whole.run(IDS, keep=0))

    def without_head(layer):
        z = layer.z.clone()
        z[:, :, 1] = 0
        layer.z = z

    edited = whole.run(IDS, without_head)
    assert torch.equal(spread.run(IDS, without_head), edited) and not torch.equal(edited, whole.run(IDS))


# --- The hub ----------------------------------------------------------------------------------


def test_download_takes_safetensors_only(hub):
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "model.safetensors").write_bytes(b"again")
    model = load_model("lab/tiny")
    assert (model.name, model.revision, model.n_layers) == ("tiny", COMMIT, 3)
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert any(path.endswith("model.safetensors") for path in fetched)
    assert not any("pytorch_model.bin" in path or "original" in path for path in fetched)
    hub.asked.clear()
    assert load_model("lab/tiny", local_files_only=True).revision == COMMIT
    assert hub.asked == []


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((403, "GatedRepo"), "lab/tiny is gated and .* https://huggingface.co/lab/tiny, then log in with `hf auth login`"),
        ((403, ""), "and the download failed .*403"),
    ],
)
def test_refused_download(hub, refusal, sentence):
    hub.refusal = refusal
    with pytest.raises(ModelError, match=sentence):
        load_model("lab/tiny")


def test_unknown_repository_and_revision(hub):
    with pytest.raises(ModelError, match="There is no model lab/huge on the hub, or it is private"):
        load_model("lab/huge")
    with pytest.raises(ModelError, match="lab/tiny has no revision 'nine'"):
        load_model("lab/tiny", revision="nine")


def test_hub_that_never_answers(cache, monkeypatch):
    """As behind a firewall that drops packets, where the hub client itself would wait for ever."""
    monkeypatch.setattr(hub_client, "_HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, silent.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(ModelError, match="openai-community/gpt2 is not .* the hub does not answer, .* model=local model.path="):
            load_model("gpt2")
        assert time.monotonic() - start < 10
        cache("openai-community/gpt2", family="gpt2")
        assert load_model("gpt2").revision == COMMIT


def test_offline_machine_uses_its_cache(cache):
    with pytest.raises(ModelError, match="lab/tiny at revision 'v1' .* HF_HUB_OFFLINE is set"):
        load_model("lab/tiny", revision="v1")
    with pytest.raises(ModelError, match="only local files may be used"):
        load_model("lab/tiny", local_files_only=True)
    cache("lab/tiny")
    assert load_model("lab/tiny").revision == load_model("lab/tiny", revision=COMMIT).revision == COMMIT


def test_default_dtype_of_short_names(cache):
    cache(HUB_MODELS["gpt2"].repo, family="gpt2", dtype=torch.float16)
    cache(HUB_MODELS["llama2_7b"].repo)
    assert load_model("gpt2").dtype == torch.float32
    assert load_model("llama2_7b").dtype == torch.bfloat16
    assert load_model("llama2_7b", dtype="float32").dtype == torch.float32


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "gpt2_lrge"}, "no model named 'gpt2_lrge'. Did you mean 'gpt2_large'"),
        ({"name": "nothing_like_it"}, "Choices: bloom_560m, .* tiny_gpt2, .* hub id"),
        ({"name": None}, "No model is named"),
        ({"name": "./nowhere"}, r"There is no folder \./nowhere"),
        ({"name": "a/b/c"}, "There is no folder a/b/c, and it is not a hub id"),
        ({"name": "tiny_gpt2", "dtype": "int8"}, "no dtype named 'int8'. Choices: auto, bfloat16, float16, float32"),
        ({"name": "tiny_gpt2", "attention": "sdp"}, "no attention implementation named 'sdp'. Did you mean 'sdpa'"),
        ({"name": "tiny_gpt2", "device_map": "nowhere"}, "transformers cannot load tiny_gpt2: ValueError: .*device"),
    ],
)
def test_wrong_settings(settings, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", {"": 0}])
def test_gpu_that_is_not_there(device_map):
    with pytest.raises(ModelError, match="There is no CUDA device here"):
        load_model("tiny_gpt2", device_map=device_map)


def edit_config(folder: Path, **changes) -> None:
    """Changes entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BREAK = {
    r"holds no config\.json": lambda folder: (folder / "config.json").unlink(),
    "not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config.json .* cannot be used": lambda folder: edit_config(folder, hidden_size="wide"),
    "weights that config.json of .* are missing .* such as bert": lambda folder: edit_config(folder, model_type="bert"),
    "config.json of .* cannot be used: .* model type `brand_new`": lambda folder: edit_config(folder, model_type="brand_new"),
    "asks to run Python code .* say model.trust_remote_code=true": lambda folder: edit_config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}
    ),
    "has no weights": lambda folder: (folder / "model.safetensors").unlink(),
    r"has only pytorch_model\.bin\. Expected model\.safetensors": lambda folder: (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    ),
    "damaged": lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
    "9 weights .* such as model.layers.3.input_layernorm": lambda folder: edit_config(folder, num_hidden_layers=4),
    "weights .* of another size": lambda folder: edit_config(folder, intermediate_size=40),
    "has no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "The tokenizer .* cannot be loaded": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("sentence", BREAK)
def test_broken_folder(folder, sentence):
    BREAK[sentence](folder)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_folder_with_revision(folder):
    for source in (str(folder), "tiny_gpt2"):
        with pytest.raises(ModelError, match="Only models on the hub have revisions, found revision='v2'"):
            load_model(source, revision="v2")


# --- Configuration ----------------------------------------------------------------------------


def test_a_file_for_every_model():
    names = {file.stem for file in (conf_dir() / "model").glob("*.yaml")}
    assert names == {*ZOO, *HUB_MODELS, "local"}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in sorted(names - {"local"}):
            assert compose(overrides=[f"+model={name}"]).model.name == name
        with pytest.raises(ConfigError, match=r"path must be given\. Set it with model\.path="):
            build(compose(overrides=["+model=local"]).model, HookedModel)


@pytest.mark.parametrize("choice", ["tiny_gpt2", "local"])
def test_model_from_configuration(choice):
    overrides = [f"+model={choice}", "model.dtype=bfloat16", "model.device_map=auto", "+model.max_memory={cpu: 1GB}"]
    if choice == "local":
        overrides.append(f"model.path={zoo_path('tiny_gpt2')}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        model = build(compose(overrides=overrides).model, HookedModel)
    assert (model.name, model.dtype, model.n_layers) == ("tiny_gpt2", torch.bfloat16, 4)
