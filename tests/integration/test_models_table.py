"""Thirty types of models, each quirk once: taken apart and proved, or refused with a reason. Never a wrong number, never a traceback."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from circuitkit.jobs.models import examine_type


@dataclass(frozen=True)
class Expected:
    """What must come out for a type.

    Attributes:
        model_type: As transformers names it.
        quirk: Why it is here.
        verdict: As in ``models.VERDICTS``.
        says: A part of the reason.
        defect: What is known to be wrong today, so that something else comes out; empty where nothing is. To be emptied when it is mended.
    """

    model_type: str
    quirk: str
    verdict: str = "refused"
    says: str = ""
    defect: str = ""


TABLE = (
    Expected("gpt2", "learned positions; queries, keys and values in one table, its inputs first", "proved"),
    Expected("gpt_neox", "parallel; one table for queries, keys and values, head by head", "proved"),
    Expected("llama", "grouped heads, wider than the stream divided among them", "proved"),
    Expected("mistral", "sliding window", "proved"),
    Expected("qwen2", "biases of queries, keys and values", "proved"),
    Expected("qwen3", "queries and keys are normalised", "proved"),
    Expected("gemma2", "norms before and behind, soft caps, windows in every other layer", "proved"),
    Expected("gemma3_text", "two rotations by kind of layer", "proved"),
    Expected("olmo2", "norms behind attention and MLP only", "proved"),
    Expected("glm4", "norms before and behind, one table for gate and up", "proved"),
    Expected("cohere2", "parallel, one norm, logits scaled", "proved"),
    Expected("phi", "parallel, rotation of a part", "proved"),
    Expected("phi3", "one table for queries, keys and values, grouped", "proved"),
    Expected("falcon", "one key and value for all heads, parallel", "proved"),
    Expected("gpt_bigcode", "one key and value for all heads, in one table with the queries", "proved"),
    Expected("bloom", "ALiBi, a norm behind the embedding", "proved"),
    Expected("mpt", "ALiBi, one table", "proved"),
    Expected("gptj", "attention of its own, parallel", "proved"),
    Expected("opt", "learned positions with an offset; rows and positions are one axis in the MLP", "refused", "as one axis"),
    Expected("gpt_neo", "attention of its own, not scaled; local layers", "proved"),
    Expected("codegen", "attention of its own, one table in an order of its own", "proved"),
    Expected("granite", "multipliers of embedding, residual stream, attention and logits", "proved"),
    Expected("mixtral", "mixture of experts", "proved"),
    Expected("gpt_oss", "sinks, experts, windows", "proved"),
    Expected("deepseek_v3", "latent attention, dense and routed layers", "proved"),
    Expected("llama4_text", "chunked attention, experts give rows and positions as one axis", "refused", "as one axis"),
    Expected("mamba", "no attention at all", "proved"),
    Expected("jamba", "state space and attention in turns", "proved"),
    Expected("qwen3_next", "gated attention, linear attention in turns", "proved"),
    Expected("diffllama", "attention twice, heads mixed behind it", "refused", "found 2 times"),
)


def test_there_are_thirty_and_none_is_there_twice():
    assert len({each.model_type for each in TABLE}) == len(TABLE) == 30


@pytest.mark.parametrize("expected", TABLE, ids=lambda each: each.model_type)
def test_a_type_is_proved_or_refused(expected, request):
    if expected.defect:
        request.applymarker(pytest.mark.xfail(reason=expected.defect))
    with torch.enable_grad():
        report = examine_type(expected.model_type, seconds=900)
    assert report.verdict == expected.verdict, f"{expected.quirk}: {report.why}"
    assert expected.says in report.why
    assert bool(report.why) == (report.verdict != "proved")
    if report.verdict == "proved":
        assert all(check.passed for check in report.checks) and len(report.checks) > 10
