"""Every type of causal language model that transformers has: what was found in it and proved, or why it is refused.

    python scripts/bench/run.py models                  # all types, one process
    python scripts/bench/run.py models --write          # and puts the table into scripts/bench/MODELS.md

No seconds are measured but how long a type takes; the checks are those of `circuitkit job=models`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from bench.measure import Options, Table, say
from circuitkit.jobs.doctor import number
from circuitkit.jobs.models import VERDICTS, TypeReport, examine_type, made_with
from circuitkit.models.checks import Check
from circuitkit.models.tiny import causal_types

QUICK = ("gpt2", "gemma2", "mamba")


def table(options: Options) -> Table:
    """A row a type."""
    reports: list[TypeReport] = []
    with torch.enable_grad():  # the command line turns gradients off, and they are among the checks
        for model_type in QUICK if options.quick else causal_types():
            reports.append(examine_type(model_type))
            say(f"{model_type}: {reports[-1].verdict} {reports[-1].why[:200]}")
    return as_table(reports)


def as_table(reports: Sequence[TypeReport]) -> Table:
    """The reports in markdown: a column a check."""
    names = list(dict.fromkeys(check.name for report in reports for check in report.checks))
    rows = [
        {
            "type": f"`{report.model_type}`",
            "": report.verdict,
            **{name: next((cell(check) for check in report.checks if check.name == name), "") for name in names},
            "why": report.why.replace("|", "\\|").replace("\n", " "),
        }
        for report in reports
    ]
    counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in VERDICTS}
    notes = [f"{len(reports)} types; " + "; ".join(f"**{count} {verdict}** ({VERDICTS[verdict]})" for verdict, count in counts.items())]
    notes.append(
        f"{made_with()}, Python {sys.version.split()[0]}; tiny random models in float32 on the CPU. Numbers are the largest difference, "
        "relative to the spread of what is expected, or how many things are wrong; 0 is equal bit for bit."
    )
    return Table("Types of causal language models", rows, notes)


def cell(check: Check) -> str:
    """A check in one word: its difference, or that it is refused, failed or broken."""
    if check.difference != check.difference:
        return "refused" if check.detail.startswith("refused") else "error"
    return number(check.difference) if check.passed else f"**{number(check.difference)}**"
