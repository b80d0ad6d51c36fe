"""Runs a joblib sweep of many tiny jobs, collects it, and watches the memory of its processes.

    python scripts/bench/sweep.py --jobs 200

Prints rows collected, time, and the resident memory of the workers over the sweep; writes report.json into the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pyarrow import parquet

CLI = (sys.executable, "-m", "circuitkit.cli")
THRESHOLDS = (0.8, 0.9)
MIB = 2**20


def main() -> None:
    """Runs, collects, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="jobs of the sweep, an even number")
    parser.add_argument("--workers", type=int, default=2, help="processes of joblib")
    parser.add_argument("--folder", type=Path, help="where to; a temporary one if it is not given")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="circuitkit-sweep-"))
    folder.mkdir(parents=True, exist_ok=True)
    samples, seconds, code = watch(command(options.jobs, options.workers, folder / "sweep"), folder)
    subprocess.run([*CLI, "job=collect", f"dir={folder / 'sweep'}"], check=True, stdout=subprocess.DEVNULL)
    rows = parquet.read_table(folder / "sweep/collect.parquet").to_pylist()
    report = {"jobs": options.jobs, "exit_code": code, "seconds": round(seconds, 1), **counts(rows), **memory(samples)}
    (folder / "report.json").write_text(json.dumps({**report, "samples": samples}, indent=2) + "\n", encoding="utf-8")
    show(report, folder)


def command(jobs: int, workers: int, folder: Path) -> list[str]:
    """The sweep: seeds x thresholds."""
    seeds = ",".join(map(str, range(jobs // len(THRESHOLDS))))
    thresholds = ",".join(map(str, THRESHOLDS))
    tiny = ["model=tiny_gpt2", "task.n=2", "task.filter=false", "method.max_sweeps=1", "logger=jsonl"]
    swept = [f"task.seed={seeds}", f"method.threshold={thresholds}", f"dir={folder}"]
    return [*CLI, "-m", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}", *tiny, *swept]


def watch(arguments: list[str], folder: Path) -> tuple[list[dict[str, Any]], float, int]:
    """Runs the sweep; a few times a second, how many of its jobs are done, and the memory of each worker."""
    samples: list[dict[str, Any]] = []
    started = time.monotonic()
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            done = sum(1 for _ in (folder / "sweep").glob("*/circuit.json"))
            samples.append({"seconds": round(time.monotonic() - started, 1), "done": done, "rss_mib": resident(process.pid)})
            time.sleep(0.5)
    return samples, time.monotonic() - started, process.returncode


def resident(pid: int) -> dict[str, int]:
    """Resident memory in MiB of the processes below one, by their id."""
    found = {}
    try:
        for child in psutil.Process(pid).children(recursive=True):
            found[str(child.pid)] = child.memory_info().rss // MIB
    except psutil.NoSuchProcess:
        pass
    return {pid: rss for pid, rss in found.items() if rss > 100}  # those that have loaded torch; loky's own helpers are small


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Rows of the collected table."""
    return {"rows": len(rows), "finished": sum(row["status"] == "finished" for row in rows)}


def memory(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest worker when a share of the jobs was done, and how much it grew after the first tenth."""
    total = max((sample["done"] for sample in samples), default=0)
    shares = {}
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        at = [max(sample["rss_mib"].values()) for sample in samples if sample["done"] >= share * total > 0 and sample["rss_mib"]]
        shares[f"{share:.0%}"] = at[0] if at else 0
    late = [max(sample["rss_mib"].values()) for sample in samples if sample["done"] >= 0.1 * total > 0 and sample["rss_mib"]]
    workers = {pid for sample in samples for pid in sample["rss_mib"]}
    return {"largest_worker_mib": shares, "growth_mib": max(late, default=0) - shares["10%"], "processes": len(workers)}


def show(report: dict[str, Any], folder: Path) -> None:
    """Prints the figures."""
    print(f"{report['finished']} of {report['jobs']} jobs finished, {report['rows']} rows collected, {report['seconds']} s")
    shares = ", ".join(f"{share} {mib}" for share, mib in report["largest_worker_mib"].items())
    print(f"memory of the largest worker in MiB, by share of jobs done: {shares}; growth after the first tenth {report['growth_mib']}")
    print(f"written: {folder / 'report.json'}")


if __name__ == "__main__":
    main()
