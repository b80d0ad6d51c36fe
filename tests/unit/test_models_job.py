"""job=models: which types are asked for, and how checks become a verdict."""

from __future__ import annotations

import json
import math
import signal
import time

import pytest
from rich.console import Console

from circuitkit.core.errors import ConfigError, ModelError
from circuitkit.core.findings import Finding
from circuitkit.jobs import models
from circuitkit.jobs.models import TimeUp, TypeReport, chosen, examine_type, finding, judged, show, within
from circuitkit.models.checks import Check
from circuitkit.models.tiny import causal_types

PASSED = Check("heads_sum", "a = b", 1e-7, 1e-3, passed=True)
FAILED = Check("edges", "a = b", 0.4, 1e-3, passed=False)
RAISED = Check("gradients", "a = b", math.nan, 0.0, passed=False, detail="refused: no metric")


def test_types_are_chosen_by_name_or_all():
    assert chosen("all") == causal_types()
    assert chosen("llama") == ("llama",) and chosen(["llama", "gpt2"]) == ("llama", "gpt2")
    with pytest.raises(ConfigError, match="'lama'.*Did you mean 'llama'"):
        chosen(["gpt2", "lama"])
    with pytest.raises(ConfigError, match="No type"):
        chosen([])


@pytest.mark.parametrize(
    ("found", "verdict", "says"),
    [
        ([(PASSED, "")], "proved", ""),
        ([(PASSED, ""), (RAISED, "refused")], "in part", "gradients: refused: no metric"),
        ([(RAISED, "refused"), (FAILED, "")], "failed", "edges: 4.0e-01"),
        ([(RAISED, "bug"), (FAILED, "")], "bug", "gradients: refused: no metric"),
    ],
)
def test_the_worst_check_decides(found, verdict, says):
    assert judged(found) == (verdict, says)


@pytest.mark.parametrize(
    ("error", "verdict", "why"),
    [(ModelError("A sentence."), "refused", "A sentence."), (KeyError("layers"), "bug", "not resolved: KeyError: 'layers'")],
)
def test_what_resolution_raises_is_told_apart(monkeypatch, error, verdict, why):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(models, "HookedModel", refuse)
    report = examine_type("gpt2")
    assert (report.verdict, report.why, report.checks) == (verdict, why, ())


def test_a_type_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(models, "tiny_model", lambda _: time.sleep(60))
    before = signal.getsignal(signal.SIGALRM)
    report = examine_type("gpt2", seconds=0.05)
    assert (report.verdict, report.why) == ("bug", "not done within 0.05 s, after nothing")
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_block_in_time_rings_no_bell():
    with within(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert issubclass(TimeUp, BaseException) and not issubclass(TimeUp, Exception)


def test_the_table_and_the_file_say_the_same(capsys):
    reports = [
        TypeReport("llama", "proved", checks=(PASSED,)),
        TypeReport("bloom", "in part", "gradients: refused: no metric", (PASSED, RAISED)),
    ]
    show(reports, Console(width=200))
    shown = capsys.readouterr().out
    assert "llama" in shown and "1/2" in shown and "1 in part" in shown
    kept = Finding.from_json(finding(reports).to_json())
    assert kept.kind == "models" and [each["verdict"] for each in kept.body["types"]] == ["proved", "in part"]
    assert kept.body["types"][1]["checks"][1]["difference"] is None and json.dumps(kept.body)
    assert {"torch", "transformers"} <= set(kept.provenance["versions"])
