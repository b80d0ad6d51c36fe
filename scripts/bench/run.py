"""Measures circuitkit's engine against other ways to do the same work. One table a command:

    python scripts/bench/run.py knockout            # prints a table in markdown
    python scripts/bench/run.py knockout --write    # and puts it into scripts/bench/RESULTS.md
    python scripts/bench/run.py all --quick         # sees that every table runs

    python scripts/bench/run.py models --write      # what works for every type of model, into scripts/bench/MODELS.md

Every row is timed in turns with its competitors in one process, on the same weights, prompts and threads. FLOPs are counted in runs
of their own by torch's flop counter; limits are computed from shapes (limits.py says what they assume).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.measure import Options, heading, say, write_section

TABLES = ("knockout", "search", "edges", "gradients", "overhead", "packing", "positions", "gpu", "models")
RESULTS = Path(__file__).with_name("RESULTS.md")
MODELS = Path(__file__).with_name("MODELS.md")
"""Where the table of models goes; it is long, and says nothing about speed."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for everyone")
    parser.add_argument("--rounds", type=int, help="how often each contender is timed (3)")
    parser.add_argument("--prompts", type=int, help="instead of the table's own number")
    parser.add_argument("--part", type=float, default=0.25, help="of its candidates that a slow competitor runs a round (0.25)")
    parser.add_argument("--no-peer", action="store_true", help="without TransformerLens")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.name}, or {MODELS.name}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_grad_enabled(False)
    rounds = chosen.rounds or (1 if chosen.quick else 3)
    options = Options(chosen.quick, rounds, chosen.prompts, chosen.part, peer=not chosen.no_peer)
    command = "python scripts/bench/run.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    for name in TABLES if chosen.table == "all" else (chosen.table,):
        start = time.perf_counter()
        table = importlib.import_module(f"bench.{name}").table(options)
        text = f"{heading(command)}\n\n{table.markdown()}"
        print(text)
        say(f"{name}: {time.perf_counter() - start:.0f} s")
        if chosen.write:
            write_section(MODELS if name == "models" else RESULTS, name, text)


if __name__ == "__main__":
    main()
