"""The command line, as a user types it."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml
from commands_for_tests import circuitkit, fresh, last_line, started

from circuitkit.core.circuit import Circuit
from circuitkit.core.findings import Finding
from circuitkit.storage import load

SMALL = ["task.n=4", "method.max_sweeps=1", "logger=jsonl"]  # a whole run, as short as it gets


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the main job ran once, in ``runs/a``."""
    folder = tmp_path_factory.mktemp("finished")
    done = fresh("dir=runs/a", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_help_is_fast_and_loads_no_torch(tmp_path):
    code = "import sys, circuitkit.cli as cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "circuitkit -m task=numerals,numwords,months" in done.stdout
    assert re.search(r"^task: .*months", done.stdout, re.MULTILINE)
    # Time of the processor: the wall's own depends on what else the machine does.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0
    assert not list(tmp_path.iterdir())


def test_list_shows_everything_without_torch(tmp_path):
    code = "import sys, circuitkit.cli as cli\ncli.main()\nassert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "job=list"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    groups = re.findall(r"^(\w+)=$", done.stdout, re.MULTILINE)
    assert groups == ["job", "model", "task", "question", "patcher", "metric", "method", "units", "engine", "callback", "logger", "sweep"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert all(len(line.split()) > 2 for line in lines), "each choice says what it is"
    for name in ("find", "tiny_llama", "gpt2_xl", "numwords", "mean", "kl", "knockout", "reference", "wandb"):
        assert any(line.split()[0] == name for line in lines), name
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_the_main_job_leaves_its_files(finished):
    folder, done = finished
    files = {path.name for path in (folder / "runs/a").iterdir()}
    assert files == {"circuit.json", "config.yaml", "journal.jsonl", "metrics.jsonl", "run.log", "scores.parquet", "status.json"}
    assert [path.name for path in folder.iterdir()] == ["runs"]
    circuit = json.loads((folder / "runs/a/circuit.json").read_text())
    assert circuit["model"] == "tiny_gpt2"
    assert circuit["score"] >= 80
    config = yaml.safe_load((folder / "runs/a/config.yaml").read_text())
    assert config["task"]["n"] == 4
    assert config["method"]["threshold"] == 0.8
    assert config["name"] == "months-tiny_gpt2-iterative_pruning"
    for word in ("baseline", "score", "heads", "MLPs", circuit["nodes"][0], str(folder / "runs/a"), "circuit.json"):
        assert word in done.stdout, word


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model=gtp2", "There is no model named 'gtp2'. Did you mean 'gpt2'? Choices: "),
        ("task=montsh", "There is no task named 'montsh'. Did you mean 'months'? Choices: "),
        ("patcher=maen", "There is no patcher named 'maen'. Did you mean 'mean'? Choices: "),
        ("metric=logitdiff", "There is no metric named 'logitdiff'. Did you mean 'logit_diff'? Choices: "),
        ("method=prune", "There is no method named 'prune'."),
        ("job=fnd", "There is no job named 'fnd'. Did you mean 'find'? Choices: "),
        ("metod.threshold=0.8", "There is no setting named 'metod'. Did you mean 'method'? Choices: "),
        ("method.treshold=0.8", "There is no setting of method named 'treshold'. Did you mean 'threshold'? Choices: "),
        ("method.threshold", "The setting 'method.threshold' cannot be read"),
        ("job=compare", "circuits must be given. Set it with circuits=..."),
    ],
)
def test_a_wrong_setting_gets_a_sentence(setting, sentence, tmp_path):
    done = circuitkit(setting, cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith(sentence)
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["method.threshold=1.5"], "method.threshold must be in (0, 1], found 1.5."),
        (["method.threshold=high"], "method.threshold is 'high', a str. Expected a number."),
        (["patcher._target_=os.system"], "patcher._target_ is 'os.system', which is outside of circuitkit."),
        (["name=日本", "metric.nope=é"], "There is no setting of metric named 'nope'."),
        (["~logger", "method.threshold=2"], "method.threshold must be in (0, 1], found 2."),
        (["--config-dir", ".", "method.threshold=2"], "method.threshold must be in (0, 1], found 2."),
    ],
)
def test_a_wrong_value_gets_a_sentence(settings, sentence, tmp_path):
    done = circuitkit(*settings, *SMALL, "dir=here", cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith(sentence)
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir()), "it leaves no folder behind"


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "/dev/null"])
def test_a_folder_that_cannot_be_made_gets_a_sentence(place, tmp_path):
    (tmp_path / "file").write_text("")
    done = circuitkit(f"dir={place}", *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith(f"Expected to be able to write the folder of the run, but {place} cannot be made (")
    assert "Traceback" not in done.stderr + done.stdout


def test_debug_keeps_the_traceback(tmp_path):
    done = circuitkit("method.threshold=1.5", "debug=true", *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert last_line(done.stderr).startswith("method.threshold must be in (0, 1]")
    early = circuitkit("task=montsh", "debug=true", cwd=tmp_path)
    assert "Traceback" in early.stderr
    assert last_line(early.stderr).startswith("There is no task named 'montsh'.")


def test_a_finished_folder_is_left_alone(finished):
    folder, _ = finished
    before = {name: (folder / "runs/a" / name).read_bytes() for name in ("circuit.json", "metrics.jsonl", "scores.parquet", "config.yaml")}
    done = fresh("dir=runs/a", *SMALL, cwd=folder)
    assert done.returncode == 2
    assert "holds 'months-tiny_gpt2-iterative_pruning'" in last_line(done.stderr)
    assert "overwrite=true" in last_line(done.stderr)
    assert "Traceback" not in done.stderr
    assert before == {name: (folder / "runs/a" / name).read_bytes() for name in before}


def test_compare(finished):
    folder, _ = finished
    circuit = folder / "runs/a/circuit.json"
    other = folder / "runs/b/circuit.json"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(circuit.read_bytes())
    done = circuitkit("job=compare", f"circuits=[{circuit},{other}]", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "a & b" in done.stdout
    assert "1.00" in done.stdout
    assert not (folder / "compare.json").exists()
    done = circuitkit("job=compare", f"circuits=[{circuit},{other}]", "dir=both", cwd=folder)
    found = load(Finding, folder / "both/compare.json").body
    (pair,) = found["pairs"]
    assert 0 < pair.pop("p_value") < 1
    assert pair == {"a": "a", "b": "b", "shared": len(found["shared_by_all"]), "jaccard": 1.0, "containment": 1.0}
    assert found["shared_by_all"] == json.loads(circuit.read_text())["nodes"]
    assert load(Circuit, folder / "both/shared.json").nodes == load(Circuit, circuit).nodes


def test_compare_refuses_a_circuit_cut_in_half(finished):
    folder, _ = finished
    whole = (folder / "runs/a/circuit.json").read_text()
    (folder / "half.json").write_text(whole[: len(whole) // 2])
    done = circuitkit("job=compare", "circuits=[runs/a/circuit.json,half.json]", cwd=folder)
    assert done.returncode == 1
    assert last_line(done.stderr).startswith("half.json is not a whole JSON file")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_of_two(tmp_path):
    done = circuitkit("-m", "task=numerals,months", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    circuits = sorted(tmp_path.glob("multirun/*/*/*/circuit.json"))
    assert [path.parent.name for path in circuits] == ["0_numerals-tiny_gpt2-iterative_pruning", "1_months-tiny_gpt2-iterative_pruning"]
    assert all((path.parent / "run.log").is_file() for path in circuits)
    assert done.stdout.count("baseline") == 2


@pytest.mark.slow
def test_a_failing_job_of_a_sweep_fails_alone(tmp_path):
    done = circuitkit("-m", "method.threshold=1.5,0.8", *SMALL, "dir=sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert last_line(done.stderr).startswith(
        "1 of the sweep's jobs failed, the others are done. The first failure: method.threshold must be"
    )
    assert "Traceback" not in done.stderr
    assert [path.parent.name[0] for path in tmp_path.glob("sweep/*/circuit.json")] == ["1"]


@pytest.mark.slow
def test_a_sweep_is_one_group_of_wandb(tmp_path):
    arguments = ["-m", "task=numerals,months", *SMALL[:2], "logger=wandb", "logger.wandb.folder=wb"]
    done = circuitkit(*arguments, cwd=tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path / "wb"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wb/wandb").glob("offline-run-*"))) == 2
    groups = {yaml.safe_load(path.read_text())["logger"]["wandb"]["group"] for path in tmp_path.glob("multirun/*/*/*/config.yaml")}
    (group,) = groups
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", group)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_so(stop, code, tmp_path):
    process = started("logger=jsonl", "engine=reference", "task.n=64", "dir=here", cwd=tmp_path)
    metrics = tmp_path / "here/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and "step/score" in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "it ended or hung before it was stopped"
        time.sleep(0.05)
    process.send_signal(stop)
    done = process.finished(timeout=120)
    assert done.returncode == code
    assert last_line(done.stderr).startswith("Stopped before the end.")
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "here/status.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_the_demo(tmp_path):
    done = circuitkit("job=demo", "dir=demo", *SMALL[:2], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load(Finding, tmp_path / "demo/compare.json").body
    assert list(found["circuits"]) == ["numerals", "numwords", "months"]
    assert len(found["pairs"]) == 3
    for task in found["circuits"]:
        config = yaml.safe_load((tmp_path / "demo" / task / "config.yaml").read_text())
        assert config["task"]["_target_"].rpartition(".")[2].lower() == task
        assert config["task"]["n"] == 4
    assert "shared by all" in done.stdout
    assert "compare.json" in done.stdout


PLUGIN = {
    "setup.cfg": """
        [metadata]
        name = ck-plugin-demo
        version = 0.3
        [options]
        packages =
            ck_plugin_demo
            ck_plugin_demo.conf
        [options.package_data]
        ck_plugin_demo.conf = **/*.yaml
        [options.entry_points]
        circuitkit.conf =
            demo = ck_plugin_demo.conf
        """,
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        """,
    "ck_plugin_demo/__init__.py": "",
    "ck_plugin_demo/conf/__init__.py": "",
    "ck_plugin_demo/twice.py": '''
        from circuitkit.patchers import Needs, Patcher


        class Twice(Patcher):
            """Doubles what a component says."""

            needs = Needs()

            def patch(self, act, source, site):
                return act * 2
        ''',
    "ck_plugin_demo/conf/patcher/twice.yaml": """
        # Double what a component says.
        _target_: ck_plugin_demo.twice.Twice
        """,
    "ck_plugin_demo/conf/patcher/zero.yaml": """
        # A plugin cannot take the place of what is there.
        _target_: ck_plugin_demo.twice.Twice
        """,
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Folder into which a small plugin distribution was installed with pip."""
    source, target = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    for name, text in PLUGIN.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(textwrap.dedent(text).lstrip())
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True)
    return str(target)


@pytest.mark.slow
def test_a_plugin_adds_a_patcher(plugin, tmp_path):
    listed = circuitkit("job=list", cwd=tmp_path, PYTHONPATH=plugin)
    assert re.search(r"^  twice +Double what a component says\.$", listed.stdout, re.MULTILINE), listed.stderr
    assert "A plugin cannot take the place" not in listed.stdout
    done = circuitkit("patcher=twice", "metric=kl", *SMALL, "dir=here", cwd=tmp_path, PYTHONPATH=plugin)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "here/config.yaml").read_text())["patcher"]["_target_"] == "ck_plugin_demo.twice.Twice"
    told = subprocess.run(
        [sys.executable, "-m", "circuitkit.plugins"], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": plugin}
    )
    assert told.stdout.strip() == "demo (ck-plugin-demo 0.3): patcher/twice, patcher/zero"


@pytest.mark.slow
def test_a_package_of_one_s_own_is_trusted_by_the_command_line_alone(tmp_path):
    """The command of the README; what it leaves is gone on with only where the package is trusted again."""
    (tmp_path / "mypackage.py").write_text(textwrap.dedent(PLUGIN["ck_plugin_demo/twice.py"]))
    (tmp_path / "myconf/patcher").mkdir(parents=True)
    (tmp_path / "myconf/patcher/twice.yaml").write_text("_target_: mypackage.Twice\nallow_targets: [mypackage]\n")
    flags = ["patcher=twice", "--config-dir", "./myconf", *SMALL, "metric=kl", "dir=here"]
    env = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}
    refused = circuitkit(*flags, **env)
    assert refused.returncode == 2 and "add allow_targets=[mypackage] to this command" in last_line(refused.stderr)
    (tmp_path / "myconf/patcher/twice.yaml").write_text("_target_: mypackage.Twice\n")
    done = circuitkit(*flags, "allow_targets=[mypackage]", **env)
    assert done.returncode == 0, done.stderr
    (tmp_path / "here/status.json").unlink()
    refused = circuitkit("resume=here", **env)
    assert refused.returncode == 2 and "no file can say so, nor the folder of a run" in last_line(refused.stderr)
    done = circuitkit("resume=here", "allow_targets=[mypackage]", **env)
    assert done.returncode == 0, done.stderr


def test_two_plugins_may_not_share_a_name(plugin, tmp_path):
    again = tmp_path / "again-1.dist-info"
    again.mkdir()
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: again\nVersion: 1\n")
    (again / "entry_points.txt").write_text("[circuitkit.conf]\nagain = ck_plugin_demo.conf\n")
    done = circuitkit("--help", cwd=tmp_path, PYTHONPATH=os.pathsep.join([plugin, str(tmp_path)]))
    assert done.returncode == 2
    assert last_line(done.stderr).startswith("The plugins 'again' and 'demo' both provide 'patcher/twice'")


def test_without_plugins_that_is_what_it_says():
    told = subprocess.run([sys.executable, "-m", "circuitkit.plugins"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("No plugins are installed")
