"""Breaks runs in every way we know and sees what is left: kill -9, signals, a full disk. Prints a table in markdown.

    python scripts/bench/resilience.py                  # 50 kills, 20 signals, a full disk, start-up and overhead: about five minutes
    python scripts/bench/resilience.py --kills 5 --signals 2

Every run is the command line itself (`cli.main`) in a process of its own, forked from one that has imported what it needs, so that what
is killed is the run and not Python's start. Half of the moments are drawn evenly from the length of an unbroken run, half lie just after
a decision that is drawn evenly from all. A run that had finished by then does not count, and another one is started. Whatever is
expected and not found ends the script with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as parquet
import torch

from circuitkit import cli
from circuitkit.callbacks import Journal
from circuitkit.core.records import Step
from circuitkit.jobs import find
from circuitkit.storage.journal import JOURNAL, read

TINY = ("task.n=2", "logger=jsonl")


def start(*arguments: str, log: Path) -> int:
    """Runs the command line in a process of its own, and returns its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["circuitkit", *arguments]
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def finish(process: int) -> int:
    """Waits, and returns how it ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def expect(condition: bool, what: str) -> None:
    """Ends the script where something is not as it must be."""
    if not condition:
        raise SystemExit(f"not as expected: {what}")


class Breaker:
    """A folder of broken runs, and the unbroken one that each is compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.whole = folder / "whole"
        times = []
        for _ in range(3):
            began = time.perf_counter()
            code = finish(start(f"dir={self.whole}", "overwrite=true", *TINY, log=folder / "whole.log"))
            times.append(time.perf_counter() - began)
            expect(code == 0, f"an unbroken run; see {folder}/whole.log")
        self.seconds = sorted(times)[1]
        self.steps = read(self.whole / JOURNAL).steps

    def stop(self, name: str, how: signal.Signals) -> tuple[Path, int, int]:
        """Starts a run and stops it at a random moment. Returns its folder, how it ended and how many decisions it had recorded."""
        for attempt in range(100):
            run = self.folder / f"{name}-{attempt}"
            process = start(f"dir={run}", *TINY, log=run.with_suffix(".log"))
            if self.random.random() < 0.5:
                time.sleep(self.random.uniform(0, self.seconds))
            else:
                decision = self.random.randrange(len(self.steps))
                while not (run / JOURNAL).exists() or (run / JOURNAL).read_bytes().count(b"\n") <= decision:
                    time.sleep(0.0005)
                time.sleep(self.random.uniform(0, 0.01))
            os.kill(process, how)  # not yet waited for, so nobody else has its id
            code = finish(process)
            if code != 0:
                recorded = read(run / JOURNAL)
                return run, code, 0 if recorded is None else len(recorded.steps)
        raise SystemExit("not as expected: a run that is stopped before its end")

    def resume(self, run: Path, before: int) -> str:
        """Goes on with a run and compares all that it leaves with the unbroken one. Says in which state it was found."""
        log = run.with_suffix(".log")
        is_there, done = (run / "config.yaml").exists(), (run / "circuit.json").exists()
        arguments = (f"resume={run}",) if is_there else (f"dir={run}", *TINY)
        expect(finish(start(*arguments, log=log)) == 0, f"{run.name} can be gone on with; see {log}")
        expect((run / "circuit.json").read_bytes() == (self.whole / "circuit.json").read_bytes(), f"{run.name}: the same circuit.json")
        tables = [parquet.read_table(each / "scores.parquet").to_pylist() for each in (run, self.whole)]
        expect(tables[0] == tables[1], f"{run.name}: the same scores.parquet")
        expect(read(run / JOURNAL).steps == self.steps, f"{run.name}: the same decisions in its journal")
        expect(self._made_again(run, before) == 0, f"{run.name}: no recorded decision made again")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        expect([row["step"] for row in rows if "step/score" in row] == [*range(len(self.steps))], f"{run.name}: each step logged once")
        return "before its settings" if not is_there else "after its last file" if done else "before" if before == 0 else "between"

    def _made_again(self, run: Path, before: int) -> int:
        """How many of the decisions recorded before are in the journal once more, or are gone."""
        kinds = [json.loads(line)["record"]["kind"] for line in (run / JOURNAL).read_text().splitlines()]
        return abs(kinds.count("step") - len(self.steps)) + (before > kinds.count("step"))


def kills(breaker: Breaker, n: int) -> str:
    """kill -9 at random moments."""
    found: dict[str, int] = {}
    for number in range(n):
        run, _, before = breaker.stop(f"kill{number}", signal.SIGKILL)
        state = breaker.resume(run, before)
        found[state] = found.get(state, 0) + 1
    where = ", ".join(f"{count} {state}" for state, count in sorted(found.items()))
    return f"{n} identical circuits and score files, 0 lost records, 0 decisions made or logged twice (killed: {where} decisions)"


def signals(breaker: Breaker, n: int) -> str:
    """Ctrl-C and SIGTERM at random moments: code, status, and going on."""
    counted = early = 0
    for number in range(n):
        how = (signal.SIGINT, signal.SIGTERM)[number % 2]
        run, code, before = breaker.stop(f"signal{number}", how)
        deaf = code == -how or (how == signal.SIGINT and code == 70)  # the command line had not yet begun to listen
        early += deaf
        expect(deaf or code == {signal.SIGINT: 130, signal.SIGTERM: 143}[how], f"{run.name} ended with {code}")
        if before or (run / "status.json").exists():
            counted += 1
            status = json.loads((run / "status.json").read_text())["status"]
            expect(status == "interrupted" or (run / "circuit.json").exists(), f"{run.name} left the status {status}")
        breaker.resume(run, before)
    return (
        f"{n - early} of {n} runs ended with 130 or 143 ({early} were stopped before the command line listened); all {counted} with "
        "settings said `interrupted`; all were gone on with to the identical circuit"
    )


def full_disk(breaker: Breaker) -> str:
    """A run on a file system that is too small for it."""
    disk = breaker.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        return f"not measured: no tmpfs can be mounted here ({mounted.stderr.strip()})"
    try:
        log, run = breaker.folder / "disk.log", disk / "run"
        code = finish(start(f"dir={run}", *TINY, log=log))
        expect(code == 1 and "No space left on device" in log.read_text() and "Traceback" not in log.read_text(), "a sentence")
        before = len(read(run / JOURNAL).steps)
        expect(read(run / JOURNAL).steps == breaker.steps[:before], "a journal that can be read")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        breaker.folder = disk
        (disk / "run.log").write_text("")
        breaker.resume(run, before)
        return f"exit 1 and one sentence after {before} decisions; the journal is whole; with more space, resumed to the identical circuit"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        breaker.folder = disk.parent


def start_up(breaker: Breaker, rounds: int = 5) -> str:
    """Time from the start of ``cli.main`` to the record that says that the run goes on, and to its first new decision."""
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        run = breaker.folder / f"start{number}"
        shutil.copytree(breaker.whole, run)
        lines = (run / JOURNAL).read_text().splitlines(keepends=True)
        (run / JOURNAL).write_text("".join(lines[:20]))
        (run / "status.json").write_text(json.dumps({"status": "running"}))
        began, seen = time.perf_counter(), []
        process = start(f"resume={run}", log=breaker.folder / f"start{number}.log")
        for more in (1, 2):
            while (run / JOURNAL).read_text().count("\n") < 20 + more:
                time.sleep(0.001)
            seen.append(time.perf_counter() - began)
        expect(finish(process) == 0, f"start{number} goes on")
        times.append((seen[0], seen[1]))
    goes_on, decides = (sorted(column)[rounds // 2] for column in zip(*times, strict=True))
    return f"{goes_on:.2f} s until it goes on, {decides:.2f} s until the first new decision (median of {rounds}, without imports)"


def overhead(breaker: Breaker) -> str:
    """Time spent in the journal, as a share of the run."""
    spent: list[float] = []

    class Timed(Journal):
        def on_step(self, step: Step) -> None:
            began = time.perf_counter()
            super().on_step(step)
            spent.append(time.perf_counter() - began)

    output = breaker.folder / "overhead.json"

    def timed(*arguments: str) -> None:
        process = os.fork()
        if process:
            expect(finish(process) == 0, "a timed run")
            return
        find.Journal = Timed
        sys.argv = ["circuitkit", *arguments]
        with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            cli.main()
        output.write_text(json.dumps(spent))
        os._exit(0)

    timed(f"dir={breaker.folder}/timed", *TINY)
    spent = json.loads(output.read_text())
    rows = [json.loads(line) for line in (breaker.folder / "timed/metrics.jsonl").read_text().splitlines()]
    search = next(row["run/seconds"] for row in rows if "run/seconds" in row)
    whole = json.loads((breaker.folder / "timed/status.json").read_text())["duration"]
    a_write = 1e6 * sorted(spent)[len(spent) // 2]
    return (
        f"{len(spent)} records, {a_write:.0f} us each (median), {1000 * sum(spent):.1f} ms in all: {100 * sum(spent) / search:.2f} % of "
        f"the search ({search:.2f} s), {100 * sum(spent) / whole:.2f} % of the run"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the broken runs; without it they are removed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="circuitkit-resilience-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        breaker = Breaker(folder, chosen.seed)
        print(f"| what | found |\n|---|---|\n| an unbroken run | {len(breaker.steps)} decisions in {breaker.seconds:.2f} s |", flush=True)
        for what, found in (
            ("start-up of a resume", start_up),
            ("journal", overhead),
            ("full disk", full_disk),
            ("Ctrl-C and SIGTERM", lambda broken: signals(broken, chosen.signals)),
            ("kill -9", lambda broken: kills(broken, chosen.kills)),
        ):
            print(f"| {what} | {found(breaker)} |", flush=True)
    finally:
        if chosen.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
