"""A sweep skips a job just where the very same run has finished: three ways in which it was wrong, and what else makes another run."""

import json
import textwrap

import pytest
from commands_for_tests import circuitkit

SHORT = ["task=months", "task.n=4", "logger=jsonl", "allow_targets=[ck_mine]", "finished_in=finished"]

FILES = {
    "ck_mine/__init__.py": "",
    "ck_mine/helper.py": "FACTOR = 1.0",
    "ck_mine/parts.py": """
        from circuitkit.metrics import LogitDiff
        from circuitkit.patchers import Mean
        from ck_mine.helper import FACTOR

        class Hidden(Mean):
            def __init__(self, scale: float = 1.0):
                super().__init__()
                self._scale = scale

        class Scaled(Mean):
            gives_source = False

            def __init__(self, scale: float = 1.0):
                super().__init__()
                self.scale = scale

            def patch(self, act, source, site):
                return source * self.scale * FACTOR

        class Named(LogitDiff):
            def __init__(self, token: str = ""):
                self.token = token
        """,
    "conf/patcher/hidden.yaml": "_target_: ck_mine.parts.Hidden\nscale: 1.0",
    "conf/patcher/scaled.yaml": "_target_: ck_mine.parts.Scaled\nscale: 1.0",
    "conf/metric/named.yaml": "_target_: ck_mine.parts.Named\ntoken: ''",
}


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text).strip() + "\n")


@pytest.fixture
def mine(tmp_path):
    for name, text in FILES.items():
        write(tmp_path, name, text)
    return tmp_path


def sweep(folder, name, *args, fails=False):
    """The status of each job, and what was said."""
    env = {"HOME": str(folder), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = circuitkit("-m", "--config-dir", "conf", *SHORT, *args, f"dir={name}", cwd=folder, **env)
    assert (done.returncode == 2) == fails, done.stderr
    jobs = sorted((json.loads(path.read_text()) for path in folder.glob(f"{name}/*/job.json")), key=lambda job: job["number"])
    return [job["status"] for job in jobs], done.stderr


@pytest.mark.slow
def test_settings_of_a_plugin_that_differ_make_another_run(mine):
    """One that it does not keep is refused; one that it keeps counts, also where its name looks like a secret; and so does its source."""
    statuses, told = sweep(mine, "hidden", "patcher=hidden", "patcher.scale=0.5,0.9", fails=True)
    assert statuses == ["failed", "failed"]
    assert "Hidden takes the argument scale" in told and "Add self.scale = scale to its __init__." in told and "Traceback" not in told
    parts = ["patcher=scaled", "metric=named", "method.max_sweeps=1"]
    statuses, _ = sweep(mine, "one", *parts, "patcher.scale=0.5,0.9", "metric.token=Mary,John")
    assert statuses == ["finished"] * 4
    statuses, told = sweep(mine, "two", *parts, "patcher.scale=0.5", "metric.token=Mary,Anna")
    assert statuses == ["skipped", "finished"] and told.count("Skipped: the same run") == 1
    write(mine, "ck_mine/helper.py", "FACTOR = 0.0")
    statuses, told = sweep(mine, "three", *parts, "patcher.scale=0.5", "metric.token=Mary,Anna")
    assert statuses == ["finished"] * 2 and "Skipped" not in told
    assert not [path for path in mine.rglob("*") if path.is_file() and any(name in path.read_bytes() for name in (b"Mary", b"John"))]


@pytest.mark.slow
def test_a_file_that_differs_makes_another_run(mine):
    """By what is in it and not by where it lies."""
    from circuitkit import Circuit
    from circuitkit.storage import load, save

    def circuit(name, n_members):
        full = load(Circuit, mine / "found/0_months-tiny_gpt2-iterative_pruning/circuit.json")
        save(Circuit(full.nodes[:n_members], full.n_layers, full.n_heads, full.model), mine / name)

    sweep(mine, "found", "method.max_sweeps=1")
    circuit("c.json", 3)
    for name, path, expected in (("a", "c.json", "finished"), ("b", "c.json", "skipped")):
        assert sweep(mine, name, "method=knockout", f"method.circuit={path}")[0] == [expected]
    circuit("c.json", 2)
    circuit("d.json", 3)
    assert sweep(mine, "c", "method=knockout", "method.circuit=c.json,d.json")[0] == ["finished", "skipped"]
