"""What is built is what works: the wheel has every file, and runs from another folder in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source") / "circuitkit", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("circuitkit", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(target), str(source)]
    subprocess.run(command, check=True, cwd=target)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of programs of a fresh environment that has the wheel, and sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # Behind the wheel's own files, and without the editable install of this checkout, which is itself a .pth file there.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(installed, *command, cwd):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([str(installed / "python"), *command], cwd=cwd, capture_output=True, text=True, env=env, timeout=600)


def test_the_wheel_has_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "circuitkit").rglob("*.py")}
    conf = {f"circuitkit/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    zoo = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "circuitkit/models/zoo").glob("*/*")
        if path.is_file() and path.suffix in (".json", ".safetensors", ".md")
    }
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "circuitkit/report/templates").iterdir()}
    assert code | conf | zoo | templates | {"circuitkit/py.typed", "circuitkit/conf/__init__.py"} <= names
    assert {f"circuitkit/models/zoo/{name}/model.safetensors" for name in ("tiny_gpt2", "tiny_llama")} <= zoo
    assert not [name for name in names if name.startswith(("tests", "scripts", "experiments", "conf"))]


def test_the_wheel_s_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert "Name: circuitkit-nnsight" in metadata
    assert "Requires-Python: >=3.10" in metadata
    (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "circuitkit = circuitkit.cli:main" in archive.read(points).decode()


def test_the_version_is_written_twice_and_agrees():
    import circuitkit

    assert f"version = {circuitkit.__version__}\n" in (ROOT / "setup.cfg").read_text()


def test_the_wheel_runs_the_main_job_from_another_folder(installed, tmp_path):
    where = run(installed, "-c", "import circuitkit; print(circuitkit.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where.stdout, "the wheel's own files are used"
    arguments = ["task.n=4", "method.max_sweeps=1", "logger=jsonl", "dir=here"]
    done = run(installed, "-m", "circuitkit.cli", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "here/circuit.json").read_text())["nodes"]
