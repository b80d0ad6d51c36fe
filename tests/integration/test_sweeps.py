"""Sweeps: every launcher, jobs that need not be done again, and a sweeper that minimises."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from commands_for_tests import circuitkit, fresh

SHORT = ["task=months", "task.n=4", "method.max_sweeps=1", "logger=jsonl", "dir=sweep"]


def jobs_of(folder):
    found = [json.loads(path.read_text()) | {"folder": path.parent} for path in folder.glob("*/job.json")]
    return sorted(found, key=lambda job: job["number"])


def circuit_of(job):
    return json.loads((job["folder"] / "circuit.json").read_text())


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    """A sweep of two with the launcher that Hydra brings, both jobs in one process."""
    folder = tmp_path_factory.mktemp("basic")
    done = circuitkit("-m", *SHORT, "method.threshold=0.8,0.9", "+hub_token=hush-hush", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_jobs_of_one_process_share_the_model(basic):
    folder, done = basic
    assert done.stderr.count("The model of the last job is used again") == 1
    first, second = jobs_of(folder / "sweep")
    assert (first["status"], second["status"]) == ("finished", "finished")
    assert len(circuit_of(first)["nodes"]) < len(circuit_of(second)["nodes"])
    assert "method.threshold=0.9" in second["overrides"] and "task=months" in second["overrides"]


@pytest.mark.slow
def test_a_sweep_keeps_no_secret(basic):
    folder, _ = basic
    assert "+hub_token=<removed>" in jobs_of(folder / "sweep")[0]["overrides"]
    assert not [path for path in (folder / "sweep").rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]


@pytest.mark.slow
def test_a_job_that_has_finished_is_skipped(basic):
    folder, _ = basic
    before = {path: path.read_bytes() for path in folder.glob("sweep/*/circuit.json")}
    done = circuitkit("-m", *SHORT[:-1], "method.threshold=0.9,0.7", "dir=again", "finished_in=sweep", cwd=folder)
    assert done.returncode == 0, done.stderr
    skipped, new = jobs_of(folder / "again")
    assert (skipped["status"], new["status"]) == ("skipped", "finished")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Skipped: "))
    assert "sweep/1_months-tiny_gpt2-iterative_pruning" in line and "rerun=true" in line
    assert {path.name for path in skipped["folder"].iterdir()} == {"job.json", "run.log"}
    assert (skipped["folder"] / skipped["same_as"]).resolve() == jobs_of(folder / "sweep")[1]["folder"]
    insisted = circuitkit("-m", *SHORT, "method.threshold=0.8,0.9", "rerun=true", cwd=folder)
    assert insisted.returncode == 0, insisted.stderr
    assert "Skipped" not in insisted.stderr
    for path, content in before.items():
        assert json.loads(path.read_text())["nodes"] == json.loads(content)["nodes"]
        assert (path.parent / "previous-1/circuit.json").read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers(launcher, basic, tmp_path):
    """One of two jobs fails, alone, in another process; the other finds what it finds in this one."""
    options = {"joblib": ["hydra.launcher.n_jobs=2"], "ray": ["+hydra.launcher.ray.init.include_dashboard=false"]}.get(launcher, [])
    home = {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}  # Ray keeps a token of its own in the home folder
    done = fresh("-m", f"hydra/launcher={launcher}", *options, *SHORT, "method.threshold=1.5,0.8", cwd=tmp_path, **home)
    assert done.returncode == 2, done.stderr
    # Not always the last line: Ray passes on what its workers say when it gets to it.
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("1 of the sweep's jobs failed, the others are done."))
    assert "The first failure: method.threshold must be in (0, 1], found 1.5." in told
    assert "Traceback" not in done.stderr
    failed, finished = jobs_of(tmp_path / "sweep")
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert failed["error"].startswith("method.threshold must be in (0, 1]") and failed["exit_code"] == 2
    expected = jobs_of(basic[0] / "sweep")[0]
    assert finished["content_hash"] == expected["content_hash"]
    assert circuit_of(finished)["nodes"] == circuit_of(expected)["nodes"]
    assert json.loads((tmp_path / "sweep/finished.jsonl").read_text())["folder"] == finished["folder"].name


def test_a_launcher_that_is_not_there_is_named_with_its_extra(tmp_path):
    done = circuitkit("-m", "hydra/launcher=jobli", *SHORT, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("There is no hydra/launcher named 'jobli'. Did you mean 'joblib'?")
    assert last.endswith("More come with `pip install circuitkit-nnsight[sweep]`.")


def test_the_slurm_launcher_is_one_that_submitit_accepts(tmp_path, monkeypatch):
    import submitit
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from circuitkit.config import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        launcher = compose("config", overrides=["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], return_hydra_config=True)
    settings = OmegaConf.to_container(launcher.hydra.launcher, resolve=False)
    assert settings["_target_"] == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm", slurm_max_num_timeout=settings.pop("max_num_timeout"))
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout"}
    drop = {"_target_", "submitit_folder", "name"}
    given = {key if key in common else f"slurm_{key}": value for key, value in settings.items() if key not in drop}
    executor.update_parameters(**given)
    assert executor._executor.parameters["partition"] == "gpu"


@pytest.mark.slow
def test_optuna_looks_for_the_smallest_circuit(tmp_path):
    """Trials that fail are left out, and told at the end."""
    trials = ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1", "method.threshold=choice(0.8,0.9,1.5)", "objective.score=85"]
    done = circuitkit("-m", "sweep=smallest_circuit", *trials, *SHORT, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    jobs = jobs_of(tmp_path / "sweep")
    finished = [job for job in jobs if job["status"] == "finished"]
    n_failed = [job["status"] for job in jobs].count("failed")
    assert len(jobs) == 3 and 0 < n_failed < 3, jobs
    assert done.stderr.strip().splitlines()[-1].startswith(f"{n_failed} of the sweep's jobs failed, the others are done.")
    values = [len(each["nodes"]) if each["score"] >= 85 else 1e6 + 85 - each["score"] for each in map(circuit_of, finished)]
    found = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert found["best_value"] == pytest.approx(min(values))
    assert set(found["best_params"]) == {"method.threshold", "method.order", "patcher"}
    assert "alembic" not in done.stderr


@pytest.mark.slow
def test_memory_stays_flat_in_a_joblib_sweep(tmp_path):
    """The bench of 200 jobs, with 4."""
    script = os.path.join(os.path.dirname(__file__), "../../scripts/bench/sweep.py")
    command = [sys.executable, script, "--jobs", "4", "--folder", str(tmp_path / "bench")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench/report.json").read_text())
    assert (report["rows"], report["finished"]) == (4, 4)
    assert report["growth_mib"] < 150, report
    assert re.search(r"4 of 4 jobs finished, 4 rows collected", done.stdout)
