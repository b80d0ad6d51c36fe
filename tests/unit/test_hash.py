"""Equal hash, equal result: whatever a part was made with, what is in its files and its code are in the hash, or it is refused."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import linecache
import pickle
import pkgutil
import sys
import textwrap
from dataclasses import InitVar, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models_for_tests import planted_model
from test_runner import Toy, run

import circuitkit
from circuitkit.callbacks import Journal
from circuitkit.core import sources as sources_module
from circuitkit.core.circuit import Circuit
from circuitkit.core.contents import content
from circuitkit.core.describe import describe, identity
from circuitkit.core.errors import ConfigError, MeasurementError
from circuitkit.core.node import Level, Node
from circuitkit.core.part import Part, kept
from circuitkit.core.sources import sources
from circuitkit.engine import Engine, PackedEngine
from circuitkit.engine.cost import DryEngine
from circuitkit.engine.distributed import DistributedEngine
from circuitkit.engine.units import Attentions
from circuitkit.featurizers.activations import TopK
from circuitkit.loggers import JsonlLogger
from circuitkit.methods import EdgePruning, Knockout, RandomCircuit
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean, Zero
from circuitkit.runner import Runner
from circuitkit.storage import save
from circuitkit.storage.journal import JOURNAL, read
from circuitkit.tasks import FromFile
from circuitkit.testing import ONLY, PatcherConformance, variants

FULL = Circuit((), 4, 4)


def settings_of(thing):
    return identity({"it": thing}).settings["it"]


# What is refused when it is made


class Hidden(Zero):
    def __init__(self, scale):
        self._scale = scale


class Shadowed(Zero):
    scale = 1.0

    def __init__(self, scale):
        self._scale = scale


class Swallowed(Zero):
    def __init__(self, **options):
        self.scale = options["scale"]


class PassedOn(Mean):
    def __init__(self, *args, scale=1.0):
        super().__init__(*args)
        self.scale = scale


class OnlyPositional(Zero):
    def __init__(self, scale, /):
        self.factor = scale


@dataclass
class Consumed(Zero):
    scale: InitVar[float] = 1.0

    def __post_init__(self, scale):
        self.factor = scale


class MethodOfThatName(Zero):
    def __init__(self, scale):
        self.factor = scale

    def scale(self):
        return self.factor


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Hidden(2.0), "scale"),
        (lambda: Shadowed(2.0), "scale"),
        (lambda: Swallowed(scale=2.0), "options"),
        (lambda: PassedOn("conditional"), "args"),
        (lambda: OnlyPositional(2.0), "scale"),
        (lambda: Consumed(2.0), "scale"),
        (lambda: MethodOfThatName(2.0), "scale"),
    ],
    ids=["private", "class attribute", "keywords", "passed on", "positional", "InitVar", "method"],
)
def test_a_part_that_does_not_keep_an_argument_is_refused_when_it_is_made(make, argument):
    with pytest.raises(ConfigError, match=rf"takes the argument \**{argument}.*Add self\.{argument} = {argument} to its __init__"):
        make()


def test_the_refusal_names_class_argument_and_what_was_found():
    with pytest.raises(ConfigError) as told:
        Hidden(2.0)
    assert str(told.value) == (
        "Hidden takes the argument scale, but an object of it does not keep it as an attribute of that name (found: _scale), so two that "
        "differ in it would pass for the same. Add self.scale = scale to its __init__."
    )


class AsProperty(Zero):
    def __init__(self, scale):
        self._scale = scale

    @property
    def scale(self):
        return self._scale


class KeptStars(Zero):
    def __init__(self, *sites, **options):
        self.sites, self.options = sites, options


class WithoutParent(Mean):
    def __init__(self, scale=1.0):  # super().__init__ is not called: a bug of its own, but all is kept
        self.scale = scale


class Heir(AsProperty):
    pass


@dataclass(frozen=True, slots=True)
class Slotted(Zero):
    scale: float = 1.0

    def patch(self, act, source, site):
        return act * self.scale


class Learned(Zero, torch.nn.Module):
    def __init__(self, width=2):
        torch.nn.Module.__init__(self)
        self.width = width
        self.weight = torch.nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: AsProperty(2.0), {"scale": 2.0}),
        (lambda: KeptStars(1, 2, a=3), {"sites": (1, 2), "options": {"a": 3}}),
        (lambda: WithoutParent(2.0), {"scale": 2.0}),
        (lambda: Heir(2.0), {"scale": 2.0}),
        (lambda: Slotted(2.0), {"scale": 2.0}),
        (lambda: Learned(3), {"width": 3}),
        (lambda: Zero(), {}),
    ],
    ids=["property", "stars", "without parent", "heir", "slots", "module", "nothing"],
)
def test_what_keeps_its_arguments_is_made_copied_and_pickled(make, expected):
    part = make()
    assert kept(part) == expected
    for other in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert settings_of(other) == settings_of(part)


def test_constructors_look_as_they_did():
    """Configuration, help and editors go by the signature."""
    assert str(inspect.signature(Mean)).startswith("(means:") and list(inspect.signature(Zero).parameters) == []
    assert list(inspect.signature(Slotted).parameters) == ["scale"]
    with pytest.raises(TypeError, match="abstract"):
        Engine()
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        Mean(scale=1)


def test_what_is_declared_of_files_is_checked(tmp_path):
    class Misspelt(Zero):
        reads_files = ("pth",)

        def __init__(self, path):
            self.path = path

    class Silent(Zero):
        def __init__(self, path):
            self.path = path

    with pytest.raises(ConfigError, match="Misspelt.reads_files names 'pth', which is no argument of its constructor. Choices: path"):
        Misspelt("x")
    with pytest.raises(ConfigError, match=r"does not say whether it reads what is there. Add reads_files = \('path',\)"):
        Silent(tmp_path)


# Every part that is shipped


def shipped():
    """Every concrete class that a run can be put together from."""
    for module in pkgutil.walk_packages(circuitkit.__path__, "circuitkit."):
        if not module.name.startswith(("circuitkit.report", "circuitkit.conf")):
            importlib.import_module(module.name)
    waiting, found = [Part], set()
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith("circuitkit.") and not inspect.isabstract(cls):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


@pytest.fixture
def circuits(tmp_path):
    return [str(save(Circuit(nodes, 4, 4), tmp_path / f"{place}.json")) for place, nodes in enumerate([(), FULL.nodes])]


def made(cls, folder):
    """One of a class, and other values of what cannot be guessed."""
    first, second = (str(save(Circuit((), layers, 4), folder / f"{layers}.json")) for layers in (3, 4))
    (folder / "p.jsonl").write_text("{}")
    three, few = torch.arange(6.0).view(2, 3), torch.zeros(3)
    matrices = {"encoder": three, "decoder": three.T, "encoder_bias": few, "decoder_bias": torch.zeros(2)}
    given = {
        "EdgePruning": {"circuit": first},
        "RandomCircuit": {"n_heads": 1, "n_mlps": 1},
        "FromFile": {"path": f"{folder}/p.jsonl"},
        "Features": {"dictionaries": [first]},
        "Dictionary": matrices,
        "JumpReLU": {"threshold": few},
        "TopK": {"k": 2},
        "Identity": {"width": 2},
        "Rotation": {"width": 3, "n_features": 2},
        "PCA": {"mean": few, "directions": three},
        "Soft": {"patcher": Zero(), "mask": {Node.of_head(0, 1): 0.5}},
    }
    others = {
        "EdgePruning": {"circuit": second, "edge_patcher": Zero()},
        "Knockout": {"circuit": first, "positions": "all", "units": Attentions()},
        "RandomCircuit": {"like": (RandomCircuit(first), RandomCircuit(second)), "exclude": ["m0"], "units": Attentions()},
        "IterativePruning": {"order": "forward", "keep": ["m0"], "units": Attentions()},
        "Neurons": {"layers": [0]},
        "Features": {"dictionaries": [second]},
        "Dictionary": {name: value + 1 for name, value in matrices.items()} | {"activation": TopK(1)},
        "JumpReLU": {"threshold": few + 1},
        "PCA": {"mean": few + 1, "directions": three + 1},
        "FromFile": {"path": first},
        "Soft": {"patcher": Mean(), "mask": {Node.of_head(0, 1): 0.25}},
        "NextWord": {"vocabulary": "days"},
    }.get(cls.__name__, {})
    others = {"corruption": "repeat_last"} | others
    if cls.__name__.startswith("Bare"):
        others["templates"] = ONLY
    return cls(**given.get(cls.__name__, {})), others


@pytest.mark.parametrize("cls", [cls for cls in shipped() if not issubclass(cls, Engine)], ids=lambda cls: cls.__name__)
def test_every_argument_of_every_part_changes_the_hash(cls, tmp_path):
    part, others = made(cls, tmp_path)
    seen = set()
    for name, one, other in variants(part, others):
        assert settings_of(one) != settings_of(other), name
        seen.add(name)
    only = {name for name in kept(part) if others.get(name) is ONLY}
    assert seen | only == set(inspect.signature(cls).parameters)


def test_no_part_is_missing_from_the_walk():
    """The walk itself finds what is there, and engines leave out just what is hashed elsewhere or moves a score by rounding alone."""
    names = {cls.__name__ for cls in shipped()}
    assert {"Mean", "LogitDiff", "Months", "FromFile", "MonthList", "Knockout", "EdgePruning", "PackedEngine"} <= names
    own = {cls: set(inspect.signature(cls).parameters) - set(cls.unhashed) for cls in shipped() if issubclass(cls, Engine)}
    assert own.pop(DryEngine) == {"assume", "featurizers"} and set().union(*own.values()) == {"featurizers"}
    assert DistributedEngine in own


def test_an_engine_of_ones_own_counts_with_its_options():
    class Coarse(PackedEngine):
        def __init__(self, model, prompts, patcher, metric, universe=None, *, bits=8, max_rows=None):
            super().__init__(model, prompts, patcher, metric, universe, max_rows=max_rows)
            self.bits = bits

    hashes = [run(engine=engine).info.content_hash for engine in (Coarse, partial(Coarse, bits=4), partial(Coarse, max_rows=3))]
    assert hashes[0] == hashes[2] != hashes[1]


# What settings may hold


def scaled(factor):
    def inner(shown):
        return shown * factor

    return inner


def one(shown):
    return shown


class Helper:
    def __init__(self, factor):
        self.factor = factor

    def method(self, shown):
        return shown


class Stateful:
    """Without arguments, but not without state."""


def stateful(value):
    thing = Stateful()
    thing.value = value
    return thing


def linear(value):
    module = torch.nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(value)
        module.bias.fill_(0.0)
    return module


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (scaled(2), scaled(3)),
        (partial(one, 1), partial(one, 2)),
        (Helper(1).method, Helper(2).method),
        (Helper(1), Helper(2)),
        (stateful(1), stateful(2)),
        (linear(1.0), linear(2.0)),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.tensor([0.5]).bfloat16(), torch.tensor([0.25]).bfloat16()),
        (torch.tensor(1.0).numpy(), torch.tensor(2.0).numpy()),
        ({1: "a"}, {"1": "a"}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (b"a", b"b"),
        (range(3), range(4)),
        (Level.NODE, Level.EDGE),
        (True, 1),
        (None, "None"),
        (one, scaled),
        (max, min),
        ("abc".join, "d".join),
    ],
)
def test_values_that_differ_are_described_differently(first, second):
    texts = [json.dumps(settings_of(each)) for each in (first, second)]
    assert texts[0] != texts[1]
    assert [json.dumps(settings_of(copy.deepcopy(each))) for each in (first, second)] == texts


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (lambda: 1, "a function without a name"),
        (torch.Generator(), "does not say what it was made with"),
        (SimpleNamespace(partial=lambda: 1), "without a name|does not say|takes the argument"),
        (open, None),
    ],
    ids=["lambda", "written in C", "nested", "builtin"],
)
def test_what_cannot_be_described_is_refused_in_a_sentence(thing, told):
    if told is None:
        assert settings_of(thing)
        return
    with pytest.raises(ConfigError, match=told):
        identity({"it": {"nested": [thing]}})


def test_what_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="holds itself"):
        describe(loop)


def test_weights_that_were_learned_since_count():
    part = Learned()
    before = settings_of(part)
    with torch.no_grad():
        part.weight += 1
    assert settings_of(part) != before


# Files


def test_a_file_counts_by_what_is_in_it(tmp_path):
    one, two, three = (str(tmp_path / name) for name in ("one.json", "two.json", "three.json"))
    save(Circuit((), 3, 4), one), save(Circuit((), 3, 4), two), save(Circuit((), 4, 4), three)
    hashes = [settings_of(Knockout(path)) for path in (one, two, three)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert describe(Knockout(one))["circuit"] == one, "as logged it is still the path"
    found = identity({"method": EdgePruning(Path(one)), "task": FromFile(two)})
    assert set(found.files) == {"method.circuit", "task.path"} and found.files["method.circuit"] == content(one)
    before = settings_of(Knockout(one))
    save(Circuit((), 5, 4), one)
    assert settings_of(Knockout(one)) != before


def test_a_folder_counts_by_names_and_contents(tmp_path):
    hashes = [content(str(tmp_path))]
    for name, text in (("a", "x"), ("b/c", "y"), ("a", "z")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        hashes.append(content(str(tmp_path)))
    (tmp_path / "a").rename(tmp_path / "d")
    hashes.append(content(str(tmp_path)))
    assert len(set(hashes)) == 5
    assert content(str(tmp_path / "none")) is None


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path):
    """Right after it was written, its time of change does not tell."""
    seen = set()
    for text in "abcdefgh":
        (tmp_path / "file").write_text(text)
        seen.add(content(str(tmp_path / "file")))
    assert len(seen) == 8


def prompts_file(folder, name="Mary"):
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"clean": "a", "corrupt": "b", "answer": f" {name}", "wrong": " x"}) + "\n")
    return path


class Reads(Toy):
    """Reads a file when its prompts are made."""

    reads_files = ("path",)

    def __init__(self, path, meanwhile=None):
        super().__init__()
        self.path, self.meanwhile = path, meanwhile

    def prompts(self, tokenizer, **settings):
        assert Path(self.path).read_text()
        return super().prompts(tokenizer, **settings)


def test_a_file_that_changes_between_making_and_running_is_noticed(tmp_path):
    task = Reads(str(prompts_file(tmp_path)))
    assert run(task=task).circuit is not None
    prompts_file(tmp_path, "John")
    with pytest.raises(MeasurementError, match=r"prompts.jsonl \(task.path\) has changed since it was given"):
        run(task=task)


def test_a_file_that_changes_during_a_run_is_noticed_before_anything_is_written(tmp_path):
    path = prompts_file(tmp_path)

    class Edits(JsonlLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics(metrics, step)
            if step == 3:
                prompts_file(tmp_path, "John")

    with pytest.raises(MeasurementError, match="has changed since it was given"):
        run(task=Reads(str(path)), loggers=[Edits(tmp_path / "run")])
    assert not (tmp_path / "run/circuit.json").exists()


def test_where_the_files_were_and_what_was_in_them_is_in_the_provenance(tmp_path):
    path = prompts_file(tmp_path)
    provenance = run(task=Reads(str(path))).info.provenance
    assert provenance["settings"]["task"]["path"] == str(path) and provenance["files"] == {"task.path": content(str(path))}
    other = path.rename(tmp_path / "elsewhere.jsonl")
    assert run(task=Reads(str(other))).info.content_hash == provenance["content_hash"]


# Secrets


class Named(LogitDiff):
    def __init__(self, token):
        self.token = token


def test_what_is_redacted_is_hashed_as_it_is_and_written_nowhere(tmp_path):
    names = ["Mary", "Mary", "John"]
    mary, again, john = (run(metric=Named(name), loggers=[JsonlLogger(tmp_path / f"{n}")]) for n, name in enumerate(names))
    assert mary.info.content_hash == again.info.content_hash != john.info.content_hash
    assert mary.info.provenance["settings"] == john.info.provenance["settings"]
    assert mary.info.provenance["settings"]["metric"]["token"] == "<removed>"
    assert not [file for file in tmp_path.rglob("*.*") if b"Mary" in file.read_bytes() or b"John" in file.read_bytes()]


def test_a_secret_is_stretched(monkeypatch):
    """Trying short ones against a published hash is made slow; without a secret nothing is."""
    calls = []
    real = circuitkit.results.hashlib.pbkdf2_hmac
    monkeypatch.setattr("circuitkit.results.hashlib.pbkdf2_hmac", lambda *args: calls.append(args[3]) or real(*args))
    run()
    assert not calls
    assert len(run(metric=Named("Mary")).info.content_hash) == 64
    assert calls == [200_000]


# Code


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a package of two modules, or changes one, and gives its class as a new process would have it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(package="ck_of_a_user", **files):
        for name, text in files.items():
            file = tmp_path / package / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text))
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.patcher").Twice

    yield load
    for name in [name for name in sys.modules if name.startswith("ck_of_a_user")]:
        del sys.modules[name]


PATCHER = """
    from circuitkit.patchers import Zero
    from ck_of_a_user.helper import FACTOR

    class Twice(Zero):
        reads_activation = True

        def patch(self, act, source, site):
            return act * FACTOR
"""


def test_a_plugin_whose_source_changes_has_another_hash(plugin):
    first = plugin(__init__="", patcher=PATCHER, helper="FACTOR = 2")
    hashes = [identity({"it": first()}), identity({"it": plugin()()}), identity({"it": plugin(helper="FACTOR = 3")()})]
    assert hashes[0] == hashes[1] != hashes[2]
    assert set(hashes[0].code) == {"circuitkit", "ck_of_a_user"} and hashes[0].code["circuitkit"] == hashes[2].code["circuitkit"]
    assert hashes[0] == identity({"it": first()}), "what is loaded already is what it was"


def test_the_run_takes_the_source_into_its_hash(plugin):
    hashes = [run(patcher=plugin(__init__="", patcher=PATCHER, helper=f"FACTOR = {n}")()).info.content_hash for n in (0.5, 0.5, 0.25)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_base_or_a_function_from_outside_counts_too(plugin):
    base = plugin(__init__="", patcher=PATCHER, helper="FACTOR = 2\ndef one(shown): return shown")

    class Heir(base):
        pass

    function = importlib.import_module("ck_of_a_user.helper").one
    assert set(sources([Heir])) == {"circuitkit", "ck_of_a_user", __name__}
    assert set(sources([function])) == {"circuitkit", "ck_of_a_user"}
    assert set(sources([Mean, torch.nn.Linear, dict, partial])) == {"circuitkit"}


def test_a_class_in_a_notebook_counts_with_its_cell():
    def cell(number, factor):
        text = f"class Cell(Zero):\n    def patch(self, act, source, site):\n        return act * {factor}\n"
        file = f"<cell {number}>"
        linecache.cache[file] = len(text), None, text.splitlines(True), file
        names = {"Zero": Zero, "__name__": "ck_of_a_user_notebook"}
        exec(compile(text, file, "exec"), names)
        return names["Cell"]

    first, second, third = cell(1, 2), cell(2, 2), cell(3, 3)
    assert sources([first]) == sources([second]) != sources([third])
    assert set(sources([first])) == {"circuitkit", "ck_of_a_user_notebook"}


def test_a_class_without_a_source_is_refused_when_a_run_starts():
    names = {"Zero": Zero, "__name__": "ck_of_a_user_nowhere"}
    exec("class Lost(Zero): pass", names)
    lost = names["Lost"]()
    with pytest.raises(ConfigError, match=r"ck_of_a_user_nowhere.Lost has no source.*Put it into a file"):
        run(patcher=lost)


def test_a_folder_of_much_else_counts_with_the_file_alone(plugin, monkeypatch):
    monkeypatch.setattr(sources_module, "_MOST_BYTES", 10)
    hashes = [sources([plugin(__init__="", patcher=PATCHER, helper=f"FACTOR = {n}")]) for n in (2, 3)]
    assert hashes[0] == hashes[1] != sources([plugin(patcher=PATCHER + "\n    # edited")])


def test_an_edited_checkout_has_another_hash(monkeypatch):
    before = run().info
    monkeypatch.setattr(sources_module, "_own", lambda: "edited")
    after = run().info
    assert before.content_hash != after.content_hash and after.provenance["code"]["circuitkit"] == "edited"


def test_the_own_hash_covers_what_changes_numbers_and_not_what_tells(tmp_path, monkeypatch):
    package = tmp_path / "circuitkit"
    for name in ("core/sources.py", "engine/base.py", "report/page.py", "jobs/find.py", "runner.py", "a_new_room/x.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr(sources_module, "__file__", str(package / "core/sources.py"))

    def now():
        return sources_module._own.__wrapped__()

    first = now()
    for name, counts in (("report/page.py", False), ("jobs/find.py", False), ("engine/base.py", True), ("a_new_room/x.py", True)):
        (package / name).write_text("2")
        assert (now() != first) == counts, name
        (package / name).write_text("1")


def test_a_model_whose_weights_are_the_same_and_whose_configuration_is_not():
    other = planted_model()
    other.hf.config.rms_norm_eps *= 10
    assert run(model=other).info.content_hash != run(model=planted_model()).info.content_hash


# Who rests on it


def test_a_run_goes_on_only_with_the_same_secret_file_and_code(tmp_path, monkeypatch):
    def stopped(**parts):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run(callbacks=[Journal(folder)], **parts)
        return read(folder / JOURNAL)

    def resumed(recorded, task=None, **parts):
        settings = {"patcher": Mean(), "metric": LogitDiff(), **parts}
        task, method = task or Toy(), circuitkit.methods.IterativePruning()
        return Runner().run(model=planted_model(), task=task, method=method, resume=recorded, **settings)

    recorded = stopped(metric=Named("Mary"))
    assert resumed(recorded, metric=Named("Mary")).circuit is not None
    with pytest.raises(ConfigError, match="this has changed since: a setting that is not written down, such as a secret"):
        resumed(recorded, metric=Named("John"))
    path = str(prompts_file(tmp_path))
    recorded = stopped(task=Reads(path))
    prompts_file(tmp_path, "John")
    with pytest.raises(ConfigError, match="this has changed since: files.task.path was '"):
        resumed(recorded, task=Reads(path))
    recorded = stopped()
    before = {key: value for key, value in recorded.header["provenance"].items() if key != "code"}
    old = replace(recorded, header={**recorded.header, "provenance": before})
    monkeypatch.setattr(sources_module, "_own", lambda: "edited")
    with pytest.raises(ConfigError, match="this has changed since: code.circuitkit was '.*, is 'edited'"):
        resumed(recorded)
    with pytest.raises(ConfigError, match="started by an earlier version of circuitkit.*Start a new run in another folder"):
        resumed(old)


def test_processes_meet_over_the_same_description(monkeypatch):
    """What a process brings to the meeting differs in a secret, in an engine's option and in a plugin's source."""
    brought = []
    monkeypatch.setattr("circuitkit.engine.distributed._meet", lambda work, launched: brought.append(work))

    class Fine(PackedEngine):
        def __init__(self, model, prompts, patcher, metric, universe=None, *, bits=8):
            super().__init__(model, prompts, patcher, metric, universe)
            self.bits = bits

    prompts = Toy().prompts(None)
    for metric, bits in ((Named("Mary"), 8), (Named("Mary"), 8), (Named("John"), 8), (Named("Mary"), 4)):
        DistributedEngine(Fine(planted_model(), prompts, Mean(), metric, bits=bits), SimpleNamespace(count=2, index=0, is_first=True))
    monkeypatch.setattr(sources_module, "_own", lambda: "edited")
    DistributedEngine(Fine(planted_model(), prompts, Mean(), Named("Mary")), SimpleNamespace(count=2, index=0, is_first=True))
    assert brought[0] == brought[1] and len(set(brought)) == 4


# The suites notice


class Rounded(Zero):
    """Keeps its argument, but not as it was given."""

    def __init__(self, scale=1):
        self.scale = min(scale, 1)


def test_the_suite_notices_an_argument_that_is_kept_otherwise():
    class Case(PatcherConformance):
        __test__ = False

        def make(self):
            return Rounded()

        def others(self):
            return {"scale": 2}

    with pytest.raises(AssertionError, match="two objects that differ in scale have the same hash"):
        Case().test_every_argument_changes_the_hash()


def test_the_suite_asks_for_a_value_that_it_cannot_guess():
    class Labelled(Zero):
        def __init__(self, label: str = "a"):
            self.label = label

    with pytest.raises(AssertionError, match=r"no other value than 'a' was found that label can have: give one in others\(\)"):
        list(variants(Labelled(), {}))
    assert [name for name, *_ in variants(Labelled(), {"label": "b"})] == ["label"]


def test_the_suite_notices_a_path_that_is_not_declared(tmp_path):
    class Forgetful(Zero):
        def __init__(self, path: str | Path = ""):
            self.path = path

    class Case(PatcherConformance):
        __test__ = False

        def make(self):
            return Forgetful()

    with pytest.raises(AssertionError, match="path takes a path: add it to reads_files"):
        Case().test_what_is_in_a_file_changes_the_hash(tmp_path)
