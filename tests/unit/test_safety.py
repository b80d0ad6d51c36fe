"""What a file from elsewhere may not do: run code, write outside of its folder, or carry secrets away."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from models_for_tests import planted_model, planted_prompts
from omegaconf import OmegaConf

import circuitkit
from circuitkit.config import build, file_name, function
from circuitkit.core.errors import ConfigError
from circuitkit.loggers import JsonlLogger, redacted
from circuitkit.methods import Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Patcher, Zero
from circuitkit.runner import Runner
from circuitkit.tasks import Task

PACKAGE = Path(circuitkit.__file__).parent

# Modules that run what they read, and calls that do so unless they are told not to.
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle", "pickletools"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system",
    "distributed.broadcast_object_list", "distributed.all_gather_object", "distributed.gather_object",
    "distributed.scatter_object_list", "distributed.send_object_list",
}  # fmt: skip


def faults(source: str) -> list[str]:
    """What a source text does that may run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in PICKLES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            forbidden = {name, name.removeprefix("torch.")} & FORBIDDEN_CALLS
            found += [name] if forbidden or name.endswith(("read_pickle", "to_pickle")) else []
            found += [
                f"{keyword.arg} in {name}"
                for keyword in node.keywords
                if (keyword.arg, getattr(keyword.value, "value", None)) in {("allow_pickle", True), ("trust_remote_code", True),
                                                                             ("use_safetensors", False), ("shell", True)}
            ]  # fmt: skip
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_in_the_package_runs_what_it_reads(path):
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "torch.load(x)", "numpy.memmap(p, allow_pickle=True)", "yaml.load(t)", "exec(t)",
     "df.to_pickle(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)", "import dill.source",
     "torch.distributed.all_gather_object(a, b)"],
)  # fmt: skip
def test_the_search_for_such_code_finds_it(source):
    assert len(faults(source)) == 1


# Names of code in configurations

ESCAPES = (
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "circuitkit",
    "circuitkit.patchers",
    "circuitkit.jobs.find.Path",
    "circuitkit.jobs.find.Path.unlink",
    "circuitkit.loggers.jsonl.os.system",
    "circuitkit.loggers.jsonl.os.remove",
    "circuitkit.loggers.jsonl.os.path.join",
    "circuitkit.loggers.jsonl.json.loads",
    "circuitkit.core.errors.__builtins__",
    "circuitkit.core.errors.__builtins__.eval",
    "circuitkit.core.errors.__loader__.load_module",
    "circuitkit.config.get_method",
    "circuitkit.config.instantiate",
    "circuitkit.config.importlib.import_module",
    "circuitkit.models.loading.torch.load",
    "circuitkit.models.loading.AutoModelForCausalLM.from_pretrained",
    "circuitkit.patchers.Mean.__init__",
    "circuitkit.patchers.Mean.__init__.__globals__",
    "circuitkit.patchers.Mean.__subclasses__",
    "circuitkit.patchers.Mean.register",
    "circuitkit.patchers.base.ABC",
    "circuitkit.cli.log.error",
    "circuitkit.cli.signal.raise_signal",
    "circuitkit..patchers.Mean",
    "circuitkit.patchers.Mean ",
    "circuitkit/patchers/Mean",
    ".patchers.Mean",
    "",
    "circuitkit.patchers.Mean.__init__.__globals__.get",
)


def configured(part) -> OmegaConf:
    return OmegaConf.create({"patcher": part, "allow_targets": []}).patcher


@pytest.mark.parametrize("target", ESCAPES)
@pytest.mark.parametrize(
    "around",
    [
        lambda part: part,
        lambda part: {**part, "_partial_": True},
        lambda part: {"_target_": "circuitkit.patchers.Mean", "pool": part},
        lambda part: {"_target_": "circuitkit.patchers.Mean", "pool": [1, {"deep": [part]}]},
        lambda part: {"_target_": "circuitkit.patchers.Mean", "_args_": [part]},
        lambda part: {"_target_": "circuitkit.patchers.Mean", "_recursive_": False, "pool": part},
    ],
    ids=["itself", "partial", "nested", "in a list", "positional", "not recursive"],
)
def test_names_that_lead_out_of_the_package_are_refused(target, around):
    """Before anything is made: the error names the name."""
    with pytest.raises(ConfigError, match=r"_target_ is "):
        build(configured(around({"_target_": target})), object)


@pytest.mark.parametrize("target", ESCAPES)
def test_a_job_cannot_be_such_a_name_either(target):
    with pytest.raises(ConfigError, match="_target_ is "):
        function(OmegaConf.create({"job": {"_target_": target}, "allow_targets": []}).job)


def test_an_interpolated_name_is_looked_at_as_what_it_becomes():
    whole = OmegaConf.create({"evil": "os.getcwd", "patcher": {"_target_": "${evil}"}, "allow_targets": []})
    with pytest.raises(ConfigError, match="outside of circuitkit"):
        build(whole.patcher, object)


@pytest.mark.parametrize("target", [3, None, ["os.system"], {"a": 1}, True])
def test_a_target_that_is_no_text(target):
    with pytest.raises(ConfigError, match="_target_ is "):
        build(configured({"_target_": target}), object)


@pytest.mark.parametrize("target", ["circuitkit.patchers.Zero", "circuitkit.patchers.zero.Zero"])
def test_own_names_are_taken_however_they_are_reached(target):
    assert isinstance(build(configured({"_target_": target}), Patcher), Zero)


def test_a_class_s_own_constructor_function_is_taken():
    assert function(configured({"_target_": "circuitkit.core.circuit.Circuit.from_json"})).__name__ == "from_json"


def test_a_trusted_package_is_taken_with_all_it_imports():
    metric = {"_target_": "json.decoder.JSONDecodeError", "msg": "m", "doc": "d", "pos": 0}
    whole = OmegaConf.create({"metric": metric, "allow_targets": ["json"]})
    assert isinstance(build(whole.metric, ValueError), ValueError)


# Folders


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".", "", "~/x", "a\\b", "x\n/y", "\0", "....//x", "é/ü", "-rf"])
def test_the_name_of_a_run_names_one_file(name, tmp_path):
    made = file_name(name)
    assert made and "/" not in made and "\\" not in made and not made.startswith((".", "-", "~"))
    assert (tmp_path / "runs" / f"now_{made}").resolve().parent == tmp_path / "runs"


# Secrets

SECRETS = {
    "token": "abc-very-secret-1",
    "api_key": "abc-very-secret-2",
    "nested": [{"wandbApiKey": "abc-very-secret-3"}, "password=abc-very-secret-4"],
    "url": "https://me:abc-very-secret-5@host/path",
    "note": "with hf_abcverysecret6abcverysecret in the middle",
    "env": {"HF_TOKEN": "abc-very-secret-7", "GITHUB": "ghp_abcverysecret8abcverysecret"},
    "cloud": "AKIAABCDEFGHIJKLMNOP",
    "model": "sk-abcverysecret9abcverysecret",
}


def test_secrets_are_removed_by_name_and_by_look():
    text = json.dumps(redacted(SECRETS))
    assert "secret" not in text.replace("very", "") and "verysecret" not in text and "AKIA" not in text
    assert text.count("<removed>") == 10
    assert redacted(SECRETS)["url"] == "https://<removed>@host/path" and redacted(SECRETS)["note"].startswith("with <removed> in")


@pytest.mark.parametrize("text", ["hf_home", "task-months", "sk-learn", "https://host:8080/a@b", "git@github.com:a/b", "ghp_short", "AKIA"])
def test_what_only_looks_a_little_like_a_secret_stays(text):
    assert redacted(text) == text


class Secretive(Mean):
    """A patcher whose settings hold secrets."""

    def __init__(self, token: str = "", note: str = "") -> None:
        super().__init__()
        self.token = token
        self.note = note


class Planted(Task):
    """The prompts that the planted model can do."""

    name, filter, seed = "planted", False, 0

    def prompts(self, tokenizer, *, n=None, seed=None, accept=None):
        return planted_prompts()


@pytest.mark.parametrize("method", [Knockout()], ids=["scores"])
def test_no_file_of_a_run_holds_a_secret(tmp_path, method):
    patcher = Secretive(SECRETS["token"], SECRETS["note"])
    Runner(loggers=[JsonlLogger(tmp_path)]).run(
        model=planted_model(), task=Planted(), method=method, patcher=patcher, metric=LogitDiff(), settings=SECRETS
    )
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"config.yaml", "scores.json", "metrics.jsonl"} <= files.keys()
    for name, content in files.items():
        assert b"very" not in content and b"AKIA" not in content, name
    provenance = json.loads(files["scores.json"])["provenance"]
    assert provenance["settings"]["patcher"]["token"] == "<removed>"
    assert yaml.safe_load(files["config.yaml"])["api_key"] == "<removed>"
