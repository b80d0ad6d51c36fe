"""Mutation testing of engine/ and methods/ with mutmut: changes one thing at a time and asks whether a test notices. Not part of CI.

A full run takes hours, so a sample is drawn. What survives is printed and written to mutants/survivors.md, each with its change.
MUTATION.md beside this file says what became of those that were found.

    pip install -e '.[test,mutation]' -c constraints.txt
    python scripts/mutation.py --sample 100 --seed 0 --minutes 25
    python scripts/mutation.py --only 'circuitkit.engine.oracle.*' --tests tests/unit/test_edges.py
    python scripts/mutation.py --again     # what survived last time, against all tests of [mutmut] in setup.cfg
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
from collections import Counter
from contextlib import redirect_stdout
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: every mutant is a process

from mutmut.__main__ import _run, collect_source_file_mutation_data, create_mutants
from mutmut.configuration import config
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir

ROOT = Path(__file__).parents[1]
OUT = Path("mutants")
UNNOTICED = ("survived", "no tests", "suspicious")
STRING = re.compile(r"""[rbf]*("(\\.|[^"\\])*"|'(\\.|[^'\\])*')""", re.IGNORECASE)


def all_mutants() -> dict[str, tuple[str, Path]]:
    """Every mutant's status and the file that it is in."""
    mutants, _ = collect_source_file_mutation_data(mutant_names=())
    return {name: (status_by_exit_code[code], Path(data.path)) for data, name, code in mutants}


def generate(processes: int) -> dict[str, tuple[str, Path]]:
    """Writes all mutants, as ``mutmut run`` does when it begins."""
    OUT.mkdir(exist_ok=True)
    with redirect_stdout(StringIO()):  # names of files, one by one
        copy_src_dir()
        copy_also_copy_files()
        create_mutants(processes)
    return all_mutants()


def changes(name: str, path: Path) -> str:
    """The lines that a mutant changes, - before and + after."""
    lines = get_diff_for_mutant(name, path=path).splitlines()
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---") and "def " not in line)


def only_words(change: str) -> bool:
    """Whether nothing but the text of strings is changed: messages, which tests do not hold to the letter."""
    before, after = ([STRING.sub("''", line[1:]) for line in change.splitlines() if line[0] == sign] for sign in "-+")
    return before == after


def drawn(options: argparse.Namespace) -> list[str]:
    """The mutants that are to be tested."""
    known = all_mutants() if options.again else generate(options.processes)
    if options.again:
        return [name for name, (status, _) in known.items() if status in UNNOTICED]
    names = sorted(name for name in known if fnmatch(name, options.only))
    random.Random(options.seed).shuffle(names)
    some: list[str] = []
    for name in names:
        if options.sample and len(some) == options.sample:
            break
        if not only_words(changes(name, known[name][1])):
            some.append(name)
    return some


def told(names: list[str]) -> str:
    """What became of some mutants, and the changes that nobody noticed."""
    known = all_mutants()
    counts = Counter(known[name][0] for name in names)
    parts = [", ".join(f"{count} {status}" for status, count in sorted(counts.items()))]
    for name in sorted(names):
        status, path = known[name]
        if status in UNNOTICED:
            parts.append(f"{name}: {status}\n\n```diff\n{changes(name, path)}\n```")
    return "\n\n".join(parts) + "\n"


def stop(*_: Any) -> None:
    """What Ctrl-C does: mutmut ends its workers and keeps what is known."""
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, default=100, help="how many mutants, 0 for all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="which sample (default: 0)")
    parser.add_argument("--minutes", type=float, default=25.0, help="when to stop, with what is known by then (default: 25)")
    parser.add_argument("--only", default="*", help="pattern for names of mutants, such as 'circuitkit.methods.*'")
    parser.add_argument("--tests", nargs="*", help="test files, instead of those under [mutmut] in setup.cfg")
    parser.add_argument("--again", action="store_true", help="those that survived last time, instead of a new sample")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args()
    os.chdir(ROOT)
    os.nice(10)
    if options.tests:
        config().pytest_add_cli_args_test_selection = options.tests
    signal.signal(signal.SIGALRM, stop)
    names = drawn(options)
    if not names:
        raise SystemExit("No mutant is to be tested: none survived, or none has a name like --only.")
    print(f"{len(names)} mutants, {options.minutes:g} minutes")
    signal.alarm(round(60 * options.minutes))
    try:
        _run(names, options.processes)
    except KeyboardInterrupt:
        print("\nTime is up before the first mutant: the tests themselves took it all. Name fewer with --tests, or give more --minutes.")
    signal.alarm(0)
    report = told(names)
    (OUT / "survivors.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
