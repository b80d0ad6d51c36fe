"""What a file from elsewhere may not do: run code, write outside of its folder, or carry secrets away."""

from __future__ import annotations

import ast
import inspect
import json
import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from pydoc import locate

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from models_for_tests import planted_model, planted_prompts
from omegaconf import OmegaConf
from test_config import composed

import circuitkit
from circuitkit import targets
from circuitkit.callbacks import Callback
from circuitkit.config import allowed_on_command_line, build, build_each, conf_dir, file_name, function, run_to_resume
from circuitkit.core.errors import ConfigError
from circuitkit.engine import Engine
from circuitkit.jobs import collect, report
from circuitkit.jobs.objectives import Objective
from circuitkit.jobs.saved import saved
from circuitkit.loggers import JsonlLogger, Logger, redacted
from circuitkit.methods import Knockout, Method
from circuitkit.metrics import LogitDiff, Metric
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Patcher, Zero
from circuitkit.runner import Runner
from circuitkit.tasks import Task

PARTS = {"task": Task, "model": HookedModel, "method": Method, "patcher": Patcher, "metric": Metric, "engine": Engine}

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
    "circuitkit.config.build",
    "circuitkit.targets.looked_up",
    "circuitkit.targets.Part",
    "circuitkit.loggers.JsonlLogger.log_artifact",
    "circuitkit.storage.writing.write_text",
    "circuitkit.core.circuit.Circuit",
    "circuitkit.core.circuit.Circuit.load",
    "circuitkit.models.load_model",
    "circuitkit.cli.main",
    "circuitkit.jobs.run",
    "circuitkit.jobs.find.find",
    "circuitkit.jobs.find.load",
    "circuitkit.jobs.launch.arguments",
    "circuitkit.report.page.page",
    "circuitkit.patchers.Patcher",
    "circuitkit.metrics.LogitDiff.score",
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
    with pytest.raises(ConfigError, match=r"_target_ is |patcher has _"):
        build(configured(around({"_target_": target})), Patcher)


@pytest.mark.parametrize("target", [*ESCAPES, "circuitkit.patchers.Mean", "circuitkit.jobs.find"])
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


def test_every_job_can_be_reached_and_nothing_else_is_called_like_one():
    jobs = {path.stem for path in (PACKAGE / "jobs").glob("*.py") if "def run(config: DictConfig)" in path.read_text(encoding="utf-8")}
    assert jobs - {"__init__"} == {path.stem for path in (conf_dir() / "job").glob("*.yaml")}
    for name in jobs - {"__init__"}:
        assert callable(function(configured({"_target_": f"circuitkit.jobs.{name}.run"})))


def test_the_table_of_groups_is_that_of_the_yaml_files():
    assert set(targets.GROUPS) | {"model", "job"} >= {path.name for path in conf_dir().iterdir() if path.is_dir()} - {
        "hydra", "sweep", "__pycache__"
    }  # fmt: skip
    for target in (*targets.GROUPS.values(), targets.MODEL):
        found = locate(target)
        assert inspect.isclass(found) and f"{found.__module__}.{found.__qualname__}" == target, "where it is defined, and so compared"


class Tee(Patcher):
    """A patcher with another inside."""

    needs = Zero.needs

    def __init__(self, inner: Patcher, others: list[Patcher]) -> None:
        self.inner, self.others = inner, others

    def patch(self, act, source, site):
        return self.inner.patch(act, source, site)


def test_parts_may_hold_parts_of_a_group():
    zero, mean = ({"_target_": f"circuitkit.patchers.{name}"} for name in ("Zero", "Mean"))
    made = build({"_target_": f"{__name__}.Tee", "inner": zero, "others": [mean, zero]}, Patcher, allow_targets=[__name__])
    assert isinstance(made.inner, Zero) and [type(each) for each in made.others] == [Mean, Zero]
    with pytest.raises(ConfigError, match=rf"allow_targets=\[{__name__}\]"):
        build({"_target_": f"{__name__}.Tee", "inner": zero, "others": []}, Patcher)


def test_a_trusted_package_is_taken_with_all_it_imports_but_not_with_what_is_of_no_group():
    assert isinstance(build({"_target_": f"{__name__}.Zero"}, Patcher, allow_targets=[__name__]), Zero)
    with pytest.raises(ConfigError, match="a function, which would be called. Expected a Patcher"):
        build({"_target_": f"{__name__}.faults", "source": "1"}, Patcher, allow_targets=[__name__])


def own_loader(name: str) -> HookedModel:
    """A user's own way to a model."""
    return planted_model()


def test_a_trusted_package_may_load_models_with_a_function_that_says_so():
    made = build({"_target_": f"{__name__}.own_loader", "name": "x"}, HookedModel, allow_targets=[__name__])
    assert isinstance(made, HookedModel)
    for other in ("circuitkit.models.load_shape", "circuitkit.models.hooked.HookedModel", f"{__name__}.faults"):
        with pytest.raises(ConfigError, match="which loads no model. Expected circuitkit.models.load_model"):
            build({"_target_": other}, HookedModel, allow_targets=[__name__])


@pytest.mark.parametrize("where", ["root", "part"])
def test_a_file_cannot_say_whom_to_trust(where):
    trusting = {"allow_targets": ["os"]}
    part = {"_target_": "os.system", **(trusting if where == "part" else {})}
    with pytest.raises(ConfigError, match=r"allow_targets=\[os\] to this command: no file can say so"):
        build(OmegaConf.create({"patcher": part, **(trusting if where == "root" else {})}).patcher, Patcher)


def test_the_command_line_can():
    composed("patcher=zero", f"allow_targets=[{__name__}]")
    assert allowed_on_command_line() == {__name__}
    assert isinstance(build({"_target_": f"{__name__}.Zero"}, Patcher), Zero)
    composed("allow_targets=abc")
    with pytest.raises(ConfigError, match=r"allow_targets must be a list of packages by name, such as \[mypackage\]; found abc"):
        allowed_on_command_line()


# Folders


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".", "", "~/x", "a\\b", "x\n/y", "\0", "....//x", "é/ü", "-rf"])
def test_the_name_of_a_run_names_one_file(name, tmp_path):
    made = file_name(name)
    assert made and "/" not in made and "\\" not in made and not made.startswith((".", "-", "~"))
    assert (tmp_path / "runs" / f"now_{made}").resolve().parent == tmp_path / "runs"


# Run folders from elsewhere

HONEST = {
    "task": {"_target_": "circuitkit.tasks.Months", "n": 4},
    "model": {"_target_": "circuitkit.models.load_model", "name": "tiny_gpt2", "device_map": None},
    "method": {"_target_": "circuitkit.methods.IterativePruning", "threshold": 0.8},
    "patcher": {"_target_": "circuitkit.patchers.Mean", "pool": "group"},
    "metric": {"_target_": "circuitkit.metrics.LogitDiff"},
    "engine": {"_target_": "circuitkit.engine.PackedEngine", "_partial_": True, "max_rows": 8},
    "callback": {"nan_guard": {"_target_": "circuitkit.callbacks.NanGuard"}},
    "logger": {},
    "objective": None,
    "name": "from a friend",
}
SHELL = {"_target_": "subprocess.check_call", "args": ["touch", "canary"]}
WRITE = {"_target_": "circuitkit.storage.writing.write_text", "path": "canary", "text": "x"}
CALL = {"_target_": "circuitkit.jobs.launch.arguments"}
ZERO, MEAN = "circuitkit.patchers.Zero", "circuitkit.patchers.Mean"
JSONL, BOARD = "circuitkit.loggers.JsonlLogger", "circuitkit.loggers.TensorBoardLogger"
WANDB, MLFLOW = "circuitkit.loggers.WandbLogger", "circuitkit.loggers.MlflowLogger"
ELSEWHERE = r"cannot say what is written or sent outside .* say so yourself: resume=run "

# What the folder's settings say in place of the honest ones, and the sentence for it. A new escape is a line here.
FOLDERS = {
    "a shell that it allows itself": ({"task": SHELL, "allow_targets": ["subprocess"]}, r"task\._target_ .* no file can say so"),
    "a shell that the part allows": ({"patcher": {**SHELL, "allow_targets": ["subprocess"]}}, r"no file can say so, nor the folder"),
    "another build, with its own rules": (
        {"metric": {"_target_": "circuitkit.config.build", "node": {"a": SHELL, "allow_targets": ["subprocess"]}, "expect": "x"}},
        r"metric\._target_ is 'circuitkit\.config\.build', a function",
    ),
    "a build with trust as an argument": (
        {"metric": {"_target_": "circuitkit.config.build", "allow_targets": ["subprocess"], "node": "x", "expect": "x"}},
        "a function, which would be called. Expected a Metric",
    ),
    "a method of a class": ({"task": {"_target_": f"{JSONL}.log_artifact", "self": {"folder": "x"}, "artifact": {}}}, "Expected a Task"),
    "a function that writes": ({"metric": WRITE}, "Expected a Metric"),
    "a job in place of a method": ({"method": {"_target_": "circuitkit.jobs.find.run", "config": {}}}, "Expected a Method"),
    "the command line": ({"method": {"_target_": "circuitkit.cli.main", "arguments": ["dir=canary"]}}, "Expected a Method"),
    "a nested shell": ({"patcher": {"_target_": MEAN, "pool": SHELL}}, r"patcher\.pool\._target_ is 'subprocess\.check_call'"),
    "a shell in a list": ({"patcher": {"_target_": MEAN, "pool": [[{"a": SHELL}]]}}, r"patcher\.pool\[0\]\[0\]\.a\._target_ is"),
    "a nested function of ours": ({"callback": {"a": {"_target_": "circuitkit.callbacks.Progress", "every_seconds": CALL}}}, "a function"),
    "a class of another group": ({"metric": {"_target_": JSONL, "folder": "canary"}}, "makes a JsonlLogger. Expected a Metric"),
    "a class of no group": (
        {"patcher": {"_target_": MEAN, "pool": {"_target_": "circuitkit.storage.folder_lock.FolderLock"}}},
        "Expected a",
    ),
    "a class that only others are of": ({"patcher": {"_target_": "circuitkit.patchers.Patcher"}}, "have in common"),
    "a module": ({"patcher": {"_target_": "circuitkit.patchers"}}, "does not define itself"),
    "through a module": ({"patcher": {"_target_": "circuitkit.loggers.jsonl.os.system", "command": "touch canary"}}, "through the module"),
    "through double underscores": ({"patcher": {"_target_": f"{MEAN}.__init__.__globals__.get"}}, "Expected a public name"),
    "positional arguments": ({"patcher": {"_target_": MEAN, "_args_": [SHELL]}}, "patcher has _args_"),
    "not recursive": ({"patcher": {"_target_": MEAN, "_recursive_": False, "pool": SHELL}}, "patcher has _recursive_"),
    "converted otherwise": ({"patcher": {"_target_": MEAN, "_convert_": "object"}}, "patcher has _convert_"),
    "a factory": ({"patcher": {"_target_": MEAN, "_partial_": True}}, "patcher has _partial_, which is True"),
    "a factory inside": ({"patcher": {"_target_": MEAN, "pool": {"_target_": ZERO, "_partial_": True}}}, r"patcher\.pool has _partial_"),
    "a variable as a name": ({"patcher": {"_target_": "${oc.env:EVIL}"}}, r"_target_ is '\$\{oc\.env:EVIL\}', which is outside"),
    "a created node": ({"patcher": "${oc.create:{_target_: os.system}}"}, "found something else"),
    "a decoded node": ({"patcher": {"_target_": MEAN, "pool": "${oc.decode:${oc.env:EVIL}}"}}, r"patcher\.pool is '\$\{oc\.decode"),
    "our own resolver": ({"patcher": {"_target_": "${or:null,os.system}"}}, "which is outside of circuitkit"),
    "an objective that writes": ({"objective": WRITE, "name": "x"}, "Expected a Objective"),
    "a model by a shell": ({"model": {"_target_": "os.abort"}}, "outside of circuitkit"),
    "a model by another function": ({"model": {"_target_": "circuitkit.jobs.find.load"}}, "which loads no model"),
    "a model without its weights": ({"model": {"_target_": "circuitkit.models.load_shape", "name": "tiny_gpt2"}}, "loads no model"),
    "a model's own code": ({"model": {**HONEST["model"], "trust_remote_code": True}}, ELSEWHERE + "model.trust_remote_code=True"),
    "weights laid down elsewhere": ({"model": {**HONEST["model"], "offload_folder": "../canary"}}, ELSEWHERE + "model.offload_folder="),
    "a logger elsewhere": ({"logger": {"a": {"_target_": JSONL, "folder": "canary"}}}, ELSEWHERE + r"logger\.a\.folder=canary"),
    "a logger that is called name": ({"logger": {"name": {"_target_": JSONL, "folder": "canary"}}}, ELSEWHERE + r"logger\.name\.folder="),
    "a single logger": ({"logger": {"_target_": JSONL, "folder": "canary"}}, ELSEWHERE + r"logger\.folder=canary"),
    "a logger inside of tags": ({"logger": {"a": {"_target_": WANDB, "tags": {"_target_": JSONL, "folder": "canary"}}}}, ELSEWHERE),
    "a logger above": ({"logger": {"a": {"_target_": BOARD, "folder": "run/../canary"}}}, ELSEWHERE),
    "a logger at the root": ({"logger": {"a": {"_target_": BOARD, "folder": "/canary"}}}, ELSEWHERE + r"logger\.a\.folder=/canary"),
    "a folder with a zero byte": ({"logger": {"a": {"_target_": BOARD, "folder": "run/\0"}}}, "holds a NUL"),
    "a server of theirs": ({"logger": {"a": {"_target_": MLFLOW, "tracking_uri": "http://evil"}}}, ELSEWHERE + r"logger\.a\.tracking_uri="),
    "a team of theirs": ({"logger": {"a": {"_target_": WANDB, "entity": "evil"}}}, ELSEWHERE + r"logger\.a\.entity=evil"),
    "a journal elsewhere": ({"callback": {"a": {"_target_": "circuitkit.callbacks.Journal", "folder": "."}}}, ELSEWHERE),
    "a text in place of a part": ({"method": "os.system"}, "found something else"),
    "a list of loggers": ({"logger": [SHELL]}, "found something else"),
    "keys that are no texts": ({3: SHELL}, "found something else"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVIL", "os.system")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@cache
def read_once(*overrides):
    """Composing takes a third of a second."""
    return composed(*overrides), HydraConfig.instance().cfg


def command(*overrides):
    """The configuration of a command line, as a job is given it."""
    whole, HydraConfig.instance().cfg = read_once(*overrides)
    return deepcopy(whole)


def resumed(folder, values, *overrides):
    """What ``circuitkit resume=run`` does, up to the search."""
    text = values if isinstance(values, str) else yaml.safe_dump(values)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    whole = command("resume=run", *overrides)
    config = saved(whole)
    parts = [build(config[name], kind) for name, kind in PARTS.items()]
    return config, [*parts, *build_each(config.logger, Logger), *build_each(config.callback, Callback), *objectives(config)]


def objectives(config):
    return [] if config.objective is None else [build(config.objective, Objective)]


def test_an_honest_folder_is_gone_on_with(folder):
    config, made = resumed(folder, HONEST)
    assert [type(each).__name__ for each in made[1:]] == ["HookedModel", "IterativePruning", "Mean", "LogitDiff", "partial", "NanGuard"]
    assert (config.name, config.task.n, config.resume, config.job._target_) == ("from a friend", 4, None, "circuitkit.jobs.find.run")


@pytest.mark.parametrize("escape", FOLDERS)
def test_a_run_folder_is_data(escape, folder):
    change, sentence = FOLDERS[escape]
    with pytest.raises(ConfigError, match=sentence) as caught:
        resumed(folder, HONEST | change)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["config.yaml", "run"], "nothing ran, nothing was made"


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [touch canary]", "a: &a [*a]", "task: [", "- 1", "", "task: {1: 2}", "\ud800"],
    ids=["tag", "recursion", "cut off", "list", "nothing", "half", "surrogate"],
)
def test_what_is_no_configuration(text, folder):
    (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="Expected the settings of (the|a) run in run|The settings file run/config.yaml cannot be read"):
        saved(command("resume=run"))
    assert sorted(path.name for path in folder.parent.rglob("*")) == ["config.yaml", "run"]


@pytest.mark.parametrize("key", ["job", "hydra", "dir", "overwrite", "rerun", "finished_in", "debug", "allow_targets"])
def test_what_the_command_line_alone_says(key, folder):
    evil = {"job": SHELL, "hydra": {"callbacks": {"a": SHELL}}, "allow_targets": ["os"], "dir": "/canary", "finished_in": "/canary"}
    config, _ = resumed(folder, HONEST | {key: evil.get(key, True)})
    plain = command("resume=run")
    assert OmegaConf.select(config, key) == OmegaConf.select(plain, key)


@pytest.mark.parametrize("text", ["${oc.env:EVIL}", "${oc.decode:x}", "${oc.create:{a: 1}}", "${name}", "\\${name}", "${"])
def test_nothing_in_a_run_folder_is_looked_up(text, folder):
    config, made = resumed(folder, HONEST | {"name": text, "callback": None})
    assert config.name == text


def test_what_leads_elsewhere_may_be_said_again(folder):
    values = HONEST | {"logger": {"wandb": {"_target_": WANDB, "folder": "wb", "entity": "team", "id": "abc", "tags": ["a"]}}}
    with pytest.raises(ConfigError, match=r"say so yourself: resume=run logger\.wandb\.entity=team logger\.wandb\.folder=wb$"):
        resumed(folder, values)
    config, made = resumed(folder, values, "logger.wandb.folder=wb", "logger.wandb.entity=mine")
    assert (config.logger.wandb.folder, config.logger.wandb.entity, config.logger.wandb.id) == ("wb", "mine", "abc")
    config, made = resumed(folder, values, "logger=jsonl")
    assert not config.logger


@pytest.mark.parametrize("place", ["runs", "runs/x", "run", "run/tensorboard"])
def test_the_run_folder_and_runs_are_written_anyway(place, folder):
    for where in (place, str(folder.parent / place)):
        _, made = resumed(folder, HONEST | {"logger": {"a": {"_target_": BOARD, "folder": where}}})
        assert str(made[-2].folder) == where


def test_a_package_is_trusted_again_by_the_command_line(folder):
    values = HONEST | {"patcher": {"_target_": f"{__name__}.Zero"}, "allow_targets": [__name__]}
    with pytest.raises(ConfigError, match=rf"add allow_targets=\[{__name__}\] to this command: no file can say so, nor the"):
        resumed(folder, values)
    config, made = resumed(folder, values, f"allow_targets=[{__name__}]")
    assert isinstance(made[3], Zero) and config.allow_targets == [__name__]


@pytest.mark.parametrize("name", ["run.log", "status.json.partial", "config.yaml.partial", "deep/figure.svg", "tensorboard"])
def test_no_link_leads_out_of_a_run_folder(name, folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(HONEST))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "inner").symlink_to("config.yaml")
    assert run_to_resume("run") == "run", "a link that stays inside does no harm"
    (folder / name).symlink_to(folder.parent / "canary")
    with pytest.raises(ConfigError, match=rf"Expected plain files and folders in run, .* but {name} there is a link that leads out of it"):
        run_to_resume("run")
    assert not (folder.parent / "canary").exists()


def test_a_run_folder_holds_no_pipe_and_no_endless_link(folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(HONEST))
    (folder / "loop").symlink_to("loop")
    assert run_to_resume("run") == "run"
    os.mkfifo(folder / "run.log")
    with pytest.raises(ConfigError, match="run.log there is neither a file nor a folder"):
        run_to_resume("run")


@pytest.mark.parametrize("name", ["figures", "report.html", "report.html.partial", "figures/a.svg.partial"])
def test_a_report_is_not_written_elsewhere(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(folder.parent / "canary")
    with pytest.raises(ConfigError, match=f"but {name} there is a link that leads out of it"):
        report.run(OmegaConf.create({"run": "run", "logger": {}}))
    assert not (folder.parent / "canary").exists()


def test_a_table_of_a_sweep_is_not_written_elsewhere(folder):
    (folder / "collect.csv").symlink_to(folder.parent / "canary")
    with pytest.raises(ConfigError, match="but collect.csv there is a link that leads out of it"):
        collect.run(OmegaConf.create({"dir": "run"}))
    assert not (folder.parent / "canary").exists()


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
