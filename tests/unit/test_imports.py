"""Who may know whom: the rooms of the package, and who may name which third party."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "circuitkit"

SEARCHERS = {"core", "storage", "models", "engine", "patchers.base", "metrics.base", "tasks.base"}
EVERYTHING = {"core", "models", "featurizers", "engine", "patchers", "metrics", "tasks", "methods", "evaluation", "analysis", "callbacks",
              "loggers", "storage"}  # fmt: skip

# Room (or file) -> what it may import from circuitkit. A room always knows itself.
MAY_KNOW = {
    "core": set(),
    "storage": {"core"},
    "patchers": {"core"},
    "metrics": {"core"},
    "tasks": {"core", "storage.reading"},  # what comes from elsewhere is read through that door, whoever reads it
    "models": {"core", "storage.reading"},
    "featurizers": {"core", "storage.reading"},
    "engine": {"core", "models", "featurizers", "patchers.base", "metrics.base", "metrics.functional"},
    "methods": SEARCHERS,
    "evaluation": SEARCHERS,
    "analysis": SEARCHERS,
    "callbacks": {"core", "storage"},
    "loggers": {"core", "storage"},
    "report": {"core", "storage"},
    "testing": EVERYTHING,
    "results": {"", *EVERYTHING},
    "runner": {"", "results", *EVERYTHING},
    "plugins": {"core.errors"},
    "targets": {"core.errors", "plugins"},
    "config": {"core.errors", "targets"},
    "arguments": {"core.errors"},
    "cli": {"core.errors", "arguments", "config", "plugins", "jobs"},
    "jobs": {"", "config", "core", *EVERYTHING, "report", "results", "runner"},
    "__init__": {"config", "results", "runner", *EVERYTHING},
}

# Third party -> where it may be imported. Those not named here may be imported anywhere.
OWNERS = {
    "nnsight": ("models/",),
    "transformers": ("models/",),
    "accelerate": ("models/",),
    "tokenizers": ("models/",),
    "huggingface_hub": ("models/",),
    "wandb": ("loggers/wandb.py",),
    "mlflow": ("loggers/mlflow.py",),
    "tensorboard": ("loggers/tensorboard.py",),
    "hydra": ("cli.py", "config.py", "plugins.py", "jobs/"),
    "omegaconf": ("cli.py", "config.py", "plugins.py", "jobs/"),
    "plotly": ("report/",),
    "pandas": ("report/",),
    "jinja2": ("report/",),
    "networkx": ("storage/",),
    "rich": ("callbacks/", "cli.py", "plugins.py", "jobs/"),
}

# In the standard library only since Python 3.11, while the package supports 3.10.
TOO_NEW = {"tomllib", "enum.StrEnum", "typing.Self", "typing.assert_never", "datetime.UTC", "importlib.resources.abc", "itertools.batched"}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def imported(tree):
    """Every import as (dotted name, whether it is for type checkers only)."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(path):
    return relative(path).partition("/")[0].removesuffix(".py")


def is_allowed(name, room):
    inner = name.removeprefix("circuitkit").lstrip(".")
    if inner.partition(".")[0] == room:
        return True
    first = inner.partition(".")[0]
    if first not in MAY_KNOW:  # a public name of the package itself, such as circuitkit.Runner or __version__
        return "" in MAY_KNOW[room] or first.startswith("__")
    return any(inner == known or inner.startswith(f"{known}.") for known in MAY_KNOW[room] if known)


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_rooms_know_only_whom_they_may(path):
    room = room_of(path)
    assert room in MAY_KNOW, f"{room} is a new room: say in MAY_KNOW what it may import"
    strays = [
        name for name, _ in imported(ast.parse(path.read_text())) if name.partition(".")[0] == "circuitkit" and not is_allowed(name, room)
    ]
    assert not strays, f"{relative(path)} may not know {strays}"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_third_parties_stay_in_their_rooms(path):
    strays = [
        name
        for name, _ in imported(ast.parse(path.read_text()))
        if not relative(path).startswith(OWNERS.get(name.partition(".")[0], ("",)))
    ]
    assert not strays, f"{relative(path)} imports {strays}"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_nothing_newer_than_python_310(path):
    strays = [
        name
        for name, typing_only in imported(ast.parse(path.read_text()))
        if not typing_only and any(name == new or name.startswith(f"{new}.") for new in TOO_NEW)
    ]
    assert not strays, f"{relative(path)} imports {strays}"


def test_the_table_catches_a_stray(tmp_path):
    assert not is_allowed("circuitkit.engine.base.Engine", "core")
    assert not is_allowed("circuitkit.patchers.mean.Mean", "methods")
    assert is_allowed("circuitkit.patchers.base.Patcher", "methods")
    assert is_allowed("circuitkit.core.errors.ConfigError", "tasks")
    assert not is_allowed("circuitkit.Runner", "callbacks")


def loaded_after(code):
    """Names of the top-level modules that a fresh interpreter holds after running the code."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("code", ["import circuitkit; dir(circuitkit)", "import circuitkit.cli"])
def test_importing_loads_nothing_heavy(code):
    assert not loaded_after(code) & {"torch", "transformers", "nnsight", "wandb", "pandas", "pyarrow"}


def test_every_public_name_is_there():
    import circuitkit

    assert set(circuitkit.__all__) <= set(dir(circuitkit))
    assert set(circuitkit._HOMES) | set(circuitkit._ROOMS) | {"__version__"} == set(circuitkit.__all__)
    for name in circuitkit.__all__:
        assert getattr(circuitkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Runer'"):
        circuitkit.Runer  # noqa: B018


def touches_the_disk(code):
    """Lines that read or write files, or import what does."""
    doors = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "save", "load"}
    modules = {"os", "io", "shutil", "tempfile", "socket", "subprocess", "yaml", "safetensors", "pyarrow", "networkx", "logging"}
    tree = ast.parse(code)
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = [(call.lineno, call.id if isinstance(call, ast.Name) else getattr(call, "attr", "")) for call in calls]
    return [line for line, name in called if name in doors] + [name for name, _ in imported(tree) if name.partition(".")[0] in modules]


# What a part was made with is hashed when it is made, files and sources among it; and parts (patchers, metrics) know core alone.
HASHES = {"core/contents.py", "core/sources.py"}


@pytest.mark.parametrize("path", sorted(each for each in (PACKAGE / "core").rglob("*.py") if relative(each) not in HASHES), ids=relative)
def test_core_touches_no_disk(path):
    assert not touches_the_disk(path.read_text())


@pytest.mark.parametrize("code", ["import os", "from shutil import copy", "open(p)", "Path(p).read_text()", "torch.load(p)"])
def test_what_touches_the_disk_is_seen(code):
    assert touches_the_disk(code)


def test_no_print_in_the_package():
    for path in sources():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], relative(path)
