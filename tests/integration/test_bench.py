"""The bench: every table runs, its competitors compute the same scores, and the counted FLOPs are as promised. No seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import knockout, limits, positions, run, search, subjects
from bench.by_hand import ByHand
from bench.competitors import PlainHooks, PublishedLoop
from bench.measure import Options, Table, flops, interleaved, peak_bytes, write_section

from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.metrics import LogitDiff
from circuitkit.patchers import Mean

TABLES = ("knockout", "search", "edges", "overhead", "packing", "positions", "gpu", "models")


@pytest.fixture(autouse=True)
def _threads_and_gradients():
    threads = torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small():
    """A tiny model, and prompts for it."""
    model = subjects.gpt2(quick=True)
    return model, subjects.prompts(model, 3, n_pos=7)


@pytest.fixture(scope="module")
def real():
    """The shape of GPT-2 Small, and one prompt: FLOPs a prompt do not depend on how many there are."""
    model = subjects.gpt2()
    return model, subjects.prompts(model, 1)


# Every table runs


@pytest.mark.parametrize("name", TABLES)
def test_a_table_runs_and_has_rows(name, capsys):
    run.main([name, "--quick", "--threads", "1", "--no-peer"])
    shown = capsys.readouterr().out
    assert "###" in shown
    skipped = name == "gpu" and not torch.cuda.is_available()
    assert ("Skipped" in shown) if skipped else ("| --- |" in shown)


def test_results_are_written_under_their_heading_and_leave_others_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    for name, text in (("one", "first"), ("two", "second"), ("three", "third"), ("two", Table("Again", [{"a": "1"}]).markdown())):
        write_section(path, name, text)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## one", "## two", "## three"]
    assert "second" not in text and "first" in text and "third" in text and "| 1 |" in text


# Competitors compute what we compute


def test_plain_hooks_score_what_the_engine_scores(small):
    model, prompts = small
    naive = PlainHooks(model, prompts)
    naive.prepare()
    ours = subjects.engine(model, prompts).score(subjects.single_masks(model.universe))
    torch.testing.assert_close(ours, torch.stack([naive.score([node]) for node in model.universe.nodes]), atol=1e-5, rtol=1e-5)


def test_plain_hooks_at_a_position_score_what_the_engine_scores(small):
    model, prompts = small
    graph = model.universe.at(range(prompts.n_pos))
    naive = PlainHooks(model, prompts)
    naive.prepare()
    ours = subjects.engine(model, prompts, graph=graph).score(subjects.single_masks(graph))
    torch.testing.assert_close(ours, torch.stack([naive.score_at(node) for node in graph.nodes]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("means", search.MEANS)
def test_the_published_loop_scores_what_the_oracle_scores(small, means):
    model, prompts = small
    masks = torch.rand(6, len(model.universe), generator=torch.Generator().manual_seed(1)) < 0.6
    loop = PublishedLoop(model, prompts, conditional=means == "conditional")
    found = torch.stack([loop.evaluate(model.universe.members(~mask)) for mask in masks])
    oracle = ReferenceEngine(model, prompts, Mean(means), LogitDiff()).score(masks)
    torch.testing.assert_close(found, oracle, atol=1e-5, rtol=1e-5)


def test_the_map_by_hand_has_the_scores_and_the_flops_of_the_engine(small):
    model, prompts = small
    engine, by_hand = subjects.engine(model, prompts), ByHand(model.hf, prompts, 6)
    masks = subjects.single_masks(model.universe)
    torch.testing.assert_close(by_hand(), engine.score(masks), atol=1e-5, rtol=1e-5)
    again = subjects.engine(model, prompts)
    ours = flops(lambda: (again.score(model.universe.empty()[None]), again.score(masks, model.universe.full())))
    assert flops(by_hand) == pytest.approx(ours, rel=0.01)


# Counting


def test_flops_are_the_same_whether_products_are_computed_or_not(small):
    model, prompts = small
    circuit = next(iter(subjects.circuits(model.universe).values()))
    for means in search.MEANS:
        counted = [flops(lambda: subjects.search(model, prompts, circuit, means), compute=compute) for compute in (True, False)]  # noqa: B023
        assert counted[0] == counted[1] > 0


def test_the_costs_of_a_forward_pass_are_those_that_are_counted(real):
    model, prompts = real
    counted = flops(lambda: model.hf(prompts.clean, use_cache=False))
    assert counted == limits.Costs.of(model).forward(prompts.n_pos)


def test_the_limit_charges_a_state_once(small):
    model, prompts = small
    mask = model.universe.without(model.universe.full(), ["a1.h0"])
    for n_tokens in (None, 3):
        once, twice = (limits.scoring(model, prompts.n_pos, [mask] * times, n_tokens=n_tokens) for times in (1, 2))
        assert twice - once == limits.Costs.of(model, n_tokens).unembed
    assert limits.Costs.of(model, 3).unembed == 2 * 3 * model.d_model


def test_rounds_take_turns_and_parts_are_scaled():
    order = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}
    taken = interleaved(contenders, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert taken.ratio("b", "a") > 0


def test_peak_memory_sees_what_was_freed_again():
    peak = peak_bytes(lambda: torch.ones(2**24))
    assert peak is None or peak >= 0.9 * 2**26


# What was promised, counted on the real shape


def test_the_single_node_map_is_near_its_limit(real):
    counted = knockout.counts(*real)
    assert counted["hooks"] / counted["ours"] >= 2.8
    assert counted["limit"] / counted["ours"] >= 0.92
    assert counted["limit"] <= counted["ours"]


@pytest.mark.parametrize("task", ["numerals", "numwords", "months"])
@pytest.mark.parametrize(("means", "least"), [("plain", 8.0), ("conditional", 4.0)])
def test_a_search_takes_a_fraction_of_the_published_loop(real, task, means, least):
    model, prompts = real
    counted, asked = search.counts(model, prompts, subjects.circuits(model.universe)[task], means)
    assert len(asked) == {"numerals": 181, "numwords": 187, "months": 179}[task]
    assert counted["published"] / counted["ours"] >= least
    assert counted["limit"] <= counted["ours"]


def test_positions_take_fewer_flops_than_plain_hooks(small):
    counted = positions.counts(*small)
    assert counted["limit"] <= counted["circuitkit"] < counted["plain hooks"]


def test_options_give_quick_runs_few_prompts():
    assert (Options(quick=True).n_prompts(8), Options().n_prompts(8), Options(prompts=5).n_prompts(8)) == (2, 8, 5)
