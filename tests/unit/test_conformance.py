"""The conformance suites on everything that comes with the package, and on plugins that break each rule."""

from __future__ import annotations

import logging
from functools import lru_cache

import pytest
import torch
from models_for_tests import PATCHERS, Flipped, Halfway, planted_model, planted_prompts

from circuitkit import callbacks, loggers, methods, metrics, patchers, tasks
from circuitkit.callbacks import Callback, NanGuard, Progress
from circuitkit.core.circuit import Circuit
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.units import Attentions
from circuitkit.loggers import JsonlLogger
from circuitkit.methods import EdgePruning, IterativePruning, Knockout, Method, RandomCircuit
from circuitkit.metrics import KL, Accuracy, AnswerRank, LogitDiff, LogProb, Metric, ProbDiff
from circuitkit.patchers import Mean, Patcher, Resample, Zero
from circuitkit.storage import save
from circuitkit.testing import (
    ONLY,
    CallbackConformance,
    LoggerConformance,
    MethodConformance,
    MetricConformance,
    PatcherConformance,
    TaskConformance,
)


class TestPatchers(PatcherConformance):
    @pytest.fixture(autouse=True, params=sorted(PATCHERS))
    def _each(self, request):
        self.name = request.param

    def make(self):
        return PATCHERS[self.name]


class TestMetrics(MetricConformance):
    @pytest.fixture(autouse=True, params=[LogitDiff, ProbDiff, LogProb, KL, Accuracy, AnswerRank])
    def _each(self, request):
        self.make = request.param
        self.differentiable = request.param not in (Accuracy, AnswerRank)

    def make(self):
        raise NotImplementedError


def _some_of(model):
    """A circuit of a few of its nodes."""
    return Circuit.of(model.universe, torch.arange(len(model.universe)) % 3 > 0)


class TestMethods(MethodConformance):
    @pytest.fixture(
        autouse=True,
        params=[
            IterativePruning,
            lambda: IterativePruning(0.5, order="forward", max_sweeps=1, keep=["m3"], speculate=False),
            Knockout,
            lambda: RandomCircuit(n_heads=3, n_mlps=2, draws=4),
            lambda: EdgePruning(_some_of(planted_model())),
            lambda: EdgePruning(_some_of(planted_model()), rule="cumulative", split=False),
        ],
        ids=["pruning", "pruning_forward", "knockout", "random", "edges", "edges_cumulative"],
    )
    def _each(self, request):
        self.make = request.param

    def make(self):
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path):
        self.folder = tmp_path

    def others(self):
        first, second = (
            save(circuit, self.folder / f"{number}.json") for number, circuit in enumerate([_some_of(planted_model()), Circuit((), 4, 4)])
        )
        like = RandomCircuit(str(first)), RandomCircuit(str(second))
        return {"order": "forward" if self.make().__dict__.get("order") == "backward" else "backward", "keep": ["m0"], "exclude": ["m0"],
                "positions": "all", "circuit": str(first), "like": like, "units": Attentions(), "edge_patcher": Zero()}  # fmt: skip

    def engine(self):
        return PackedEngine(planted_model(), planted_prompts(), Mean(), LogitDiff())


@lru_cache
def zoo_tokenizer():
    from transformers import AutoTokenizer

    from circuitkit.models.zoo import zoo_path

    return AutoTokenizer.from_pretrained(zoo_path("tiny_gpt2"))


class TestTasks(TaskConformance):
    @pytest.fixture(
        autouse=True,
        params=["Numerals", "Numwords", "Months", "BareNumerals", "BareNumwords", "BareMonths"],
    )
    def _each(self, request, caplog):
        caplog.set_level(logging.ERROR)  # that there are few different bare prompts
        self.make = getattr(tasks, request.param)

    def make(self):
        raise NotImplementedError

    def others(self):
        return {"corruption": "repeat_last"} | ({"templates": ONLY} if self.make.__name__.startswith("Bare") else {})

    def tokenizer(self):
        return zoo_tokenizer()


class TestCallbacks(CallbackConformance):
    @pytest.fixture(autouse=True, params=[Callback, NanGuard, Progress])
    def _each(self, request):
        self.make = request.param

    def make(self):
        raise NotImplementedError


class TestJsonlLogger(LoggerConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folders = (tmp_path / str(number) for number in range(9))

    def make(self):
        return JsonlLogger(next(self.folders))


def test_every_built_in_is_among_these():
    """A new patcher, metric, method, callback or logger joins the lists above."""

    def classes(room, base):
        return {
            name
            for name in room.__all__
            if isinstance(thing := getattr(room, name), type) and issubclass(thing, base) and thing is not base
        }

    assert classes(patchers, Patcher) == {"Zero", "Mean", "Resample"}
    assert classes(metrics, Metric) == {"LogitDiff", "ProbDiff", "LogProb", "KL", "Accuracy", "AnswerRank"}
    assert classes(methods, Method) == {"EdgePruning", "IterativePruning", "Knockout", "RandomCircuit"}
    assert classes(callbacks, Callback) == {"Journal", "NanGuard", "Progress"}  # test_journal.py has the first
    tested_in_integration = {"WandbLogger", "MlflowLogger", "TensorBoardLogger"}
    assert classes(loggers, loggers.Logger) - {"LoggerGroup"} == {"JsonlLogger", *tested_in_integration}


# The suites themselves: each rule is broken once, and noticed


class InPlace(Zero):
    def patch(self, act, source, site):
        return act.zero_()


class Reshaped(Zero):
    def patch(self, act, source, site):
        return act.flatten(-2)


class Upcast(Zero):
    def patch(self, act, source, site):
        return torch.zeros(act.shape, dtype=torch.float64)


class Noisy(Zero):
    def patch(self, act, source, site):
        return torch.randn_like(act)


class Liar(Zero):
    def patch(self, act, source, site):
        return 2 * act


class Scaled(Resample):
    gives_source = True

    def patch(self, act, source, site):
        return 2 * source


class Mixed(Halfway):
    def patch(self, act, source, site):
        return act - act.mean(0, keepdim=True)


class Detached(Flipped):
    def patch(self, act, source, site):
        return -act.detach()


class Summed(LogitDiff):
    def score(self, logits, prompts, *, clean_logits=None):
        return super().score(logits, prompts).mean(-1, keepdim=True).expand(logits.shape[:-1])


class Doubled(LogitDiff):
    def score(self, logits, prompts, *, clean_logits=None):
        return super().score(logits, prompts).double()


class Counting(Accuracy):
    pass


BROKEN = [
    (PatcherConformance, InPlace, "test_nothing_is_changed_in_place"),
    (PatcherConformance, Reshaped, "test_shape_dtype_and_device_are_kept"),
    (PatcherConformance, Upcast, "test_shape_dtype_and_device_are_kept"),
    (PatcherConformance, Noisy, "test_it_is_deterministic"),
    (PatcherConformance, Liar, "test_it_reads_the_activation_just_if_it_says_so"),
    (PatcherConformance, Scaled, "test_it_gives_back_its_source_if_it_says_so"),
    (PatcherConformance, Mixed, "test_it_treats_rows_alike"),
    (PatcherConformance, Detached, "test_gradients_pass"),
    (MetricConformance, Summed, "test_masks_and_prompts_are_independent"),
    (MetricConformance, Doubled, "test_one_float32_a_prompt_for_any_leading_axes"),
    (MetricConformance, Counting, "test_gradients_flow"),
]


@pytest.mark.parametrize(("suite", "plugin", "rule"), BROKEN, ids=[plugin.__name__ for _, plugin, _ in BROKEN])
def test_a_broken_rule_is_noticed(suite, plugin, rule):
    class Case(suite):
        __test__ = False

        def make(self):
            return plugin()

    with pytest.raises(AssertionError):
        getattr(Case(), rule)()
