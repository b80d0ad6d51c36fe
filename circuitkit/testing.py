"""Conformance suites for plugins: subclass one in your own tests, implement ``make``, and pytest runs what circuitkit relies on.

    from circuitkit.testing import PatcherConformance

    class TestHalf(PatcherConformance):
        def make(self):
            return Half()

They need pytest, and nothing else beyond circuitkit itself. Assertions say what was expected.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.describe import describe, identity
from circuitkit.core.errors import UserError
from circuitkit.core.node import Node
from circuitkit.core.part import Part, kept
from circuitkit.core.prompts import PromptSet
from circuitkit.core.records import RunInfo, Step, TableArtifact, TextArtifact
from circuitkit.engine.base import Engine
from circuitkit.featurizers.base import Featurizer
from circuitkit.loggers.base import Logger
from circuitkit.methods.base import Method
from circuitkit.metrics.base import Metric
from circuitkit.patchers.base import Patcher
from circuitkit.tasks.base import Task

ONLY = object()
"""In ``others`` of a conformance suite: the argument takes no value but the one that it has."""


class _Conformance(ABC):
    @abstractmethod
    def make(self) -> Any:
        """Makes what is tested, anew at each call."""


class _PartConformance(_Conformance):
    def others(self) -> Mapping[str, Any]:
        """Other values for arguments of the constructor, where they cannot be guessed from the value and type that they have.

        Returns:
            By argument a value that the constructor takes in place of the one that ``make`` gave; or two parts that differ in that
            argument alone, where it cannot be changed by itself; or ``ONLY``, where there is no other.
        """
        return {}

    def test_its_settings_are_plain_values(self) -> None:
        """They go into config files, provenance and hashes."""
        settings = describe(self.make())
        assert json.loads(json.dumps(settings)) == settings, f"expected settings that JSON can hold, found {settings}"
        assert describe(self.make()) == settings, "expected the same settings from two objects that were made alike"

    def test_every_argument_changes_the_hash(self) -> None:
        """Else a run with another value would be skipped as one that was made before."""
        assert _hashed(self.make()) == _hashed(self.make()), "expected the same hash from two objects that were made alike"
        for name, one, other in variants(self.make(), self.others()):
            assert _hashed(one) != _hashed(other), f"two objects that differ in {name} have the same hash"

    def test_what_is_in_a_file_changes_the_hash(self, tmp_path: Path) -> None:
        """And where it lies does not."""
        part = self.make()
        for name, parameter in inspect.signature(type(part)).parameters.items():
            declared = name in (*part.reads_files, *part.unhashed)
            assert declared or not re.search(r"\bPath\b", str(parameter.annotation)), f"{name} takes a path: add it to reads_files"
        for name in part.reads_files:
            given, here, there = self.others().get(name), tmp_path / "here", tmp_path / "there"
            base, path = (given[0], kept(given[0])[name]) if _are_parts(given) else (part, given or kept(part)[name])
            if isinstance(path, str | Path) and Path(path).is_file():
                shutil.copy(path, here)
            else:
                here.write_text("{}", encoding="utf-8")
            shutil.copy(here, there)
            first = _hashed(_with(base, name, str(here)))
            assert _hashed(_with(base, name, str(there))) == first, f"the same file under another path ({name}) has another hash"
            with there.open("a", encoding="utf-8") as opened:
                opened.write("\n")
            assert _hashed(_with(base, name, str(there))) != first, f"a file with something else in it ({name}) has the same hash"


def variants(part: Part, others: Mapping[str, Any]) -> Iterator[tuple[str, Part, Part]]:
    """Two parts for each argument of a constructor, which differ in that argument alone.

    Args:
        part: To begin with.
        others: As ``others`` of a conformance suite returns them.

    Yields:
        The argument, and the two parts.

    Raises:
        AssertionError: Another value for an argument can neither be guessed nor is it among the others.
    """
    hints = _hints(type(part))
    for name, value in kept(part).items():
        given = others.get(name)
        if _are_parts(given):
            yield name, given[0], given[1]
            continue
        guesses = [given] if name in others else [guess for guess in _guesses(value, hints.get(name)) if guess != value]
        made = [made for made in (_tried(part, name, guess) for guess in guesses if guess is not ONLY) if made is not None]
        assert made or given is ONLY, f"no other value than {value!r} was found that {name} can have: give one in others()"
        yield from ((name, part, other) for other in made[:1])


def _guesses(value: Any, hint: Any) -> Iterator[Any]:
    """Values that an argument may have in place of the one that it has."""
    for choice in (hint, *get_args(hint)):
        if get_origin(choice) is Literal:
            yield from get_args(choice)
        if value is None and choice in (bool, int, float):
            yield choice(1)
    if isinstance(value, Enum):
        yield from type(value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value - 1, value / 2) if isinstance(value, float) else (value + 1, value - 1)
    elif isinstance(value, list | tuple):
        yield from (value[:-1], value[::-1])
    if NoneType in get_args(hint):
        yield None


def _hints(cls: type[Part]) -> dict[str, Any]:
    try:
        return get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    except (NameError, TypeError):  # a shape string, or a name that is imported for type checkers only
        return {}


def _with(part: Part, name: str, value: Any) -> Part:
    signature = inspect.signature(type(part))
    bound = inspect.BoundArguments(signature, OrderedDict(kept(part) | {name: value}))
    return type(part)(*bound.args, **bound.kwargs)


def _tried(part: Part, name: str, value: Any) -> Part | None:
    try:
        return _with(part, name, value)
    except UserError:
        return None


def _hashed(part: Part) -> Any:
    found = identity({"part": part})
    return found.settings, found.code


def _are_parts(given: Any) -> TypeGuard[tuple[Part, Part]]:
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, Part) for each in given)


class PatcherConformance(_PartConformance):
    """What every patcher must keep to. ``make`` returns one."""

    def _patched(self, patcher: Patcher, act: Tensor, seed: int = 1, site: str = "a0.h0") -> Tensor:
        source = torch.randn(act.shape, generator=torch.Generator().manual_seed(seed)).to(act.dtype)
        return patcher.patch(act, None if patcher.needs.source == "none" else source, Node.parse(site))

    def _act(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def test_shape_dtype_and_device_are_kept(self) -> None:
        """For heads and MLPs, with and without leading axes for masks, in every floating dtype."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for shape in ((3, 4), (2, 3, 4), (5, 2, 3, 4)):
                for site in ("a0.h1", "m0"):
                    act = self._act(*shape, dtype=dtype)
                    out = self._patched(self.make(), act, site=site)
                    expected = (act.shape, act.dtype, act.device)
                    assert (out.shape, out.dtype, out.device) == expected, (
                        f"expected {expected}, found {(out.shape, out.dtype, out.device)}"
                    )

    def test_nothing_is_changed_in_place(self) -> None:
        """Activation and source are used again by others."""
        patcher, act = self.make(), self._act(2, 3, 4)
        source = self._act(2, 3, 4, seed=1)
        copies = act.clone(), source.clone()
        patcher.patch(act, None if patcher.needs.source == "none" else source, Node.of_mlp(0))
        assert torch.equal(act, copies[0]), "the activation was changed in place"
        assert torch.equal(source, copies[1]), "the source was changed in place"

    def test_it_is_deterministic(self) -> None:
        """The same inputs give the same value, from the same object and from a new one."""
        patcher, act = self.make(), self._act(2, 3, 4)
        first = self._patched(patcher, act)
        assert torch.equal(first, self._patched(patcher, act)), "a second call gave another value"
        assert torch.equal(first, self._patched(self.make(), act)), "an object made alike gave another value"

    def test_it_treats_rows_alike(self) -> None:
        """Rows may come in any packing: a row's value depends on that row."""
        patcher, act = self.make(), self._act(4, 3, 4)
        source = self._act(4, 3, 4, seed=1)
        given = None if patcher.needs.source == "none" else source
        whole = patcher.patch(act, given, Node.of_mlp(0))
        for row in range(4):
            one = patcher.patch(act[row : row + 1], None if given is None else given[row : row + 1], Node.of_mlp(0))
            torch.testing.assert_close(one, whole[row : row + 1], msg="a row alone gave another value than the row among others")

    def test_it_reads_the_activation_just_if_it_says_so(self) -> None:
        """``reads_activation = False`` lets the engine leave modules uncomputed, and then the activation it passes holds no values."""
        patcher = self.make()
        values = [self._patched(patcher, self._act(2, 3, 4, seed=seed)) for seed in (0, 7)]
        nan = self._patched(patcher, torch.full((2, 3, 4), torch.nan))
        if not patcher.reads_activation:
            assert torch.equal(*values) and torch.equal(values[0], nan), "it reads the activation: set reads_activation = True"

    def test_it_gives_back_its_source_if_it_says_so(self) -> None:
        """``gives_source = True`` lets the engine leave positions uncomputed where clean and corrupt prompts are the same."""
        patcher, source = self.make(), self._act(2, 3, 4, seed=1)
        if patcher.gives_source and patcher.needs.source != "none":
            value = patcher.patch(self._act(2, 3, 4), source, Node.of_mlp(0))
            assert torch.equal(value, source), "it gives something else than its source: set gives_source = False"

    def test_gradients_pass(self) -> None:
        """Through the activation if it is read, through the source if there is one."""
        patcher = self.make()
        act, source = self._act(2, 3, 4).requires_grad_(True), self._act(2, 3, 4, seed=1).requires_grad_(True)
        has_source = patcher.needs.source != "none"
        out = patcher.patch(act, source if has_source else None, Node.of_mlp(0))
        if patcher.reads_activation:
            assert out.requires_grad, "no gradient flows, although the activation is read"
            assert torch.autograd.grad(out.sum(), act, allow_unused=True, retain_graph=True)[0] is not None, (
                "no gradient reaches the activation"
            )


class FeaturizerConformance(ABC):
    """What every featurizer must keep to. ``make`` returns one.

    Attributes:
        tolerance: Largest error of an activation that was encoded and decoded, relative to the activations' spread.
    """

    tolerance = 1e-5

    @abstractmethod
    def make(self) -> Featurizer:
        """Makes what is tested, anew at each call."""

    def _acts(self, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        featurizer, generator = self.make(), torch.Generator().manual_seed(seed)
        act, read = (torch.randn(*shape, featurizer.width, generator=generator) for _ in range(2))
        return act, read if featurizer.reads_input else None

    def test_decoding_gives_back_what_was_encoded(self) -> None:
        """Coordinates and error together are the activation, at any scale and for any number of leading axes."""
        for shape in ((1,), (3, 5), (2, 3, 4)):
            for scale in (0.0, 1.0, 100.0):
                act, read = self._acts(*shape)
                act = scale * act
                found = self.make().decode(*self.make().encode(act, read))
                spread = max(scale, 1.0)
                assert found.shape == act.shape, f"expected {tuple(act.shape)}, found {tuple(found.shape)}"
                assert (found - act).abs().max() <= self.tolerance * spread, "decode(encode(x)) is not x"

    def test_shapes(self) -> None:
        """One coordinate per feature, and an error of the activation's width."""
        featurizer, (act, read) = self.make(), self._acts(2, 3)
        coordinates, error = featurizer.encode(act, read)
        assert coordinates.shape == (2, 3, featurizer.n_features), f"expected {featurizer.n_features}, found {coordinates.shape}"
        assert error.shape == act.shape, f"expected an error of shape {tuple(act.shape)}, found {tuple(error.shape)}"

    def test_it_treats_rows_alike(self) -> None:
        """Rows and positions may come in any packing."""
        featurizer, (act, read) = self.make(), self._acts(4, 3)
        whole = featurizer.encode(act, read)
        for row in range(4):
            part = featurizer.encode(act[row : row + 1, 1:2], None if read is None else read[row : row + 1, 1:2])
            for one, all_of_them in zip(part, whole, strict=True):
                torch.testing.assert_close(one, all_of_them[row : row + 1, 1:2], msg="a position alone gave another value")

    def test_a_coordinate_changes_what_is_decoded(self) -> None:
        """Else there is nothing to find."""
        featurizer, (act, read) = self.make(), self._acts(2, 3)
        coordinates, error = featurizer.encode(act, read)
        assert not torch.equal(featurizer.decode(coordinates + 1, error), featurizer.decode(coordinates, error)), "coordinates do nothing"

    def test_half_precision_comes_back(self) -> None:
        """A model may compute in bfloat16, whatever the featurizer computes in."""
        act, read = self._acts(2, 3)
        act, read = act.bfloat16(), None if read is None else read.bfloat16()
        found = self.make().decode(*self.make().encode(act, read)).bfloat16()
        assert (found - act).abs().max() <= 0.01 * act.abs().max(), "decode(encode(x)) is not x in bfloat16"

    def test_its_values_are_in_its_hash(self) -> None:
        """Equal when made alike."""
        assert _hashed(self.make()) == _hashed(self.make()), "expected the same hash from two objects that were made alike"


class MetricConformance(_PartConformance):
    """What every metric must keep to. ``make`` returns one.

    Attributes:
        differentiable: Whether gradients must flow; set to False for counts such as accuracy.
    """

    differentiable = True

    def _case(self, leading: tuple[int, ...] = (), n: int = 4, vocab: int = 7, seed: int = 0) -> tuple[Tensor, PromptSet, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        answers = torch.randint(0, vocab, (n,), generator=generator)
        ids = torch.zeros(n, 3, dtype=torch.long)
        prompts = PromptSet(ids, ids, answers, (answers + 1) % vocab, torch.zeros(n, dtype=torch.long))
        return torch.randn(*leading, n, vocab, generator=generator), prompts, torch.randn(n, vocab, generator=generator)

    def test_it_says_what_it_is(self) -> None:
        """Name, unit and direction."""
        metric: Metric = self.make()
        assert metric.name and metric.unit and isinstance(metric.higher_is_better, bool)

    def test_one_float32_a_prompt_for_any_leading_axes(self) -> None:
        """The engine passes logits of many masks at once."""
        for leading in ((), (1,), (3,), (2, 3)):
            logits, prompts, clean = self._case(leading)
            values = self.make().score(logits, prompts, clean_logits=clean)
            assert values.shape == logits.shape[:-1], f"expected {tuple(logits.shape[:-1])}, found {tuple(values.shape)}"
            assert values.dtype == torch.float32, f"expected float32, found {values.dtype}"

    def test_masks_and_prompts_are_independent(self) -> None:
        """Packed scores are those of each mask, and of each prompt, alone."""
        logits, prompts, clean = self._case((3,))
        metric = self.make()
        values = metric.score(logits, prompts, clean_logits=clean)
        for mask in range(3):
            torch.testing.assert_close(metric.score(logits[mask], prompts, clean_logits=clean), values[mask])
        for row in range(4):
            one = metric.score(logits[:, row : row + 1], prompts.take([row]), clean_logits=clean[row : row + 1])
            torch.testing.assert_close(one, values[:, row : row + 1])

    def test_nothing_is_changed_in_place(self) -> None:
        """Logits are used again."""
        logits, prompts, clean = self._case()
        copies = logits.clone(), clean.clone()
        self.make().score(logits, prompts, clean_logits=clean)
        assert torch.equal(logits, copies[0]) and torch.equal(clean, copies[1])

    def test_it_reads_others_only_where_it_says_so(self) -> None:
        """With ``reads_others = False`` logits come with the columns of answers and wrong answers alone."""
        metric = self.make()
        if metric.reads_others:
            return
        logits, prompts, clean = self._case((2,))
        asked = prompts.asked
        found = metric.score(logits[..., asked], prompts.renumbered(asked), clean_logits=clean[:, asked])
        expected = metric.score(logits, prompts, clean_logits=clean)
        assert torch.equal(found, expected), "reads_others = False was declared, and other logits change the score"

    def test_gradients_flow(self) -> None:
        """Attribution needs the derivative; a count declares ``differentiable = False``."""
        logits, prompts, clean = self._case()
        values = self.make().score(logits.requires_grad_(True), prompts, clean_logits=clean)
        assert values.requires_grad == self.differentiable, f"differentiable = {self.differentiable} was declared"
        if self.differentiable:
            gradient = torch.autograd.grad(values.sum(), logits)[0]
            assert gradient.isfinite().all() and gradient.any(), "the gradient is zero or not finite"

    def test_an_untouched_model_is_the_best_or_the_zero_of_a_distance(self) -> None:
        """A metric where less is better, compared with the untouched model, is least for it."""
        metric = self.make()
        if metric.name == "kl" or (not metric.higher_is_better and metric.floor.value == "ablated"):
            logits, prompts, clean = self._case()
            assert (metric.score(logits, prompts, clean_logits=logits) <= metric.score(logits, prompts, clean_logits=clean) + 1e-6).all()


class TaskConformance(_PartConformance):
    """What every task must keep to. ``make`` returns one, ``tokenizer`` what it is to be used with."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """A tokenizer whose vocabulary has the task's members."""

    def _prompts(self, **settings: Any) -> PromptSet:
        task: Task = self.make()
        return task.prompts(self.tokenizer(), **settings)

    def test_prompts_are_well_formed(self) -> None:
        """Equal lengths, answers that differ from the wrong ones, and groups that have names."""
        prompts = self._prompts(n=8)
        assert prompts.clean.shape == prompts.corrupt.shape and prompts.clean.dtype == torch.int64
        assert not prompts.answers.shared(prompts.wrongs).any(), "an answer is its own wrong answer"
        assert 0 <= int(prompts.groups.min()) and int(prompts.groups.max()) < len(prompts.group_names)
        assert not prompts.items or len(prompts.items) == len(prompts)

    def test_every_corrupt_prompt_differs_from_its_clean_twin(self) -> None:
        """Else there is nothing to find."""
        prompts = self._prompts(n=8)
        assert (prompts.clean != prompts.corrupt).any(1).all(), "a corrupt prompt is the same as the clean one"

    def test_the_seed_decides_the_draw(self) -> None:
        """Same settings and seed, same prompts."""
        assert self._prompts(n=8, seed=3).content_hash() == self._prompts(n=8, seed=3).content_hash()

    def test_positions_lie_in_the_prompt(self) -> None:
        """Every label, in every group."""
        prompts = self._prompts(n=8)
        for label in (*prompts.spans, "last"):
            for group in range(len(prompts.group_names)):
                assert 0 <= prompts.position(label, group) < prompts.n_pos

    def test_what_the_filter_refuses_is_not_there(self) -> None:
        """``accept`` decides. Here it refuses one answer."""
        task = self.make()
        if not getattr(task, "filter", False):
            return
        refused = self._prompts(n=8).answers.ids[0, 0]
        kept = task.prompts(self.tokenizer(), n=8, accept=lambda prompts: prompts.answers.ids[:, 0] != refused)
        assert (kept.answers.ids[:, 0] != refused).all()


class MethodConformance(_PartConformance):
    """What every method must keep to. ``make`` returns one, ``engine`` what it is to run on."""

    @abstractmethod
    def engine(self) -> Engine:
        """A small engine, anew at each call."""

    def _run(self) -> tuple[Circuit | Scores, list[Step]]:
        method: Method = self.make()
        steps: list[Step] = []
        return method.discover(method.over(self.engine()), on_step=steps.append, history=()), steps

    def test_it_returns_a_circuit_or_scores_of_this_model(self) -> None:
        """With the model's shape, and values that are numbers."""
        found, _ = self._run()
        model = self.engine().model
        assert isinstance(found, Circuit | Scores), f"expected a Circuit or Scores, found {type(found).__name__}"
        assert (found.n_layers, found.n_heads) == (model.n_layers, model.n_heads)
        if isinstance(found, Scores):
            assert found.values and all(isinstance(value, float) for value in found.values.values())
            json.loads(found.to_json())

    def test_steps_are_told_in_order(self) -> None:
        """Numbered from 0, sweeps never go back, scores are plain floats."""
        _, steps = self._run()
        assert steps, "on_step was never called"
        assert [step.order for step in steps] == list(range(len(steps)))
        assert [step.sweep for step in steps] == sorted(step.sweep for step in steps)
        assert all(type(step.score) is float and type(step.kept) is bool for step in steps)

    def test_the_same_again_is_the_same(self) -> None:
        """Same engine, same settings, same result."""
        (one, first), (two, second) = self._run(), self._run()
        assert [step.node for step in first] == [step.node for step in second]
        if isinstance(one, Circuit) and isinstance(two, Circuit):
            assert one.names == two.names
        else:
            assert isinstance(one, Scores) and isinstance(two, Scores) and one.values == two.values

    def test_a_circuit_has_the_score_that_it_says(self) -> None:
        """Scored once more, it is the same."""
        found, _ = self._run()
        if isinstance(found, Circuit) and found.score is not None:
            engine = self.make().over(self.engine())
            again = engine.percent(found.mask(engine.universe)[None]).item()
            assert abs(again - found.score) < max(engine.margin, 1e-2), f"it says {found.score}, but scores {again}"


STEP = Step(0, 0, "a0.h0", 91.5, False, 11, "backward", 12)


class CallbackConformance(_Conformance):
    """What every callback must keep to. ``make`` returns one."""

    def test_it_hears_a_whole_run(self) -> None:
        """Every event in order, with nothing but what a run gives."""
        info = RunInfo("toy", {}, {}, "0" * 64, 4, 12)
        callback = self.make()
        assert isinstance(callback, Callback)
        callbacks = Callbacks([callback])
        callbacks.notify("on_run_start", info)
        callbacks.notify("on_baseline", None)
        callbacks.notify("on_step", STEP)
        for event in ("on_discover_end", "on_evaluate_end", "on_checkpoint", "on_run_end"):
            callbacks.notify(event, None)

    def test_it_survives_a_failure(self) -> None:
        """``on_exception`` may come at any time, also before anything else, and must not raise an error of its own."""
        self.make().on_exception(RuntimeError("the run failed"))
        callback = self.make()
        callback.on_run_start(RunInfo("toy", {}, {}, "0" * 64, 4, 12))
        callback.on_exception(KeyboardInterrupt())


class LoggerConformance(_Conformance):
    """What every logger must keep to. ``make`` returns one that writes where a test may."""

    def test_it_takes_a_whole_run(self) -> None:
        """The four verbs in order, with text, numbers that are not finite, tables and files."""
        logger: Logger = self.make()
        logger.log_config("toy", {"task": {"name": "months", "n": 4}, "seed": 0, "none": None, "list": [1, "a"]})
        logger.log_metrics({"baseline/logit_diff": 3.25, "run/prompts": 4})
        logger.log_metrics({"step/score": float("nan"), "step/node": "a0.h0", "step/kept": False}, step=0)
        logger.log_metrics({"step/score": float("inf"), "step/size": 11}, step=1)
        logger.log_artifact(TextArtifact("circuit.json", Circuit((Node.of_mlp(0),), 1, 1).to_json()))
        logger.log_artifact(TableArtifact("scores", [STEP.row(), STEP.row()]))
        logger.finalize("finished")

    def test_it_can_end_at_any_time(self) -> None:
        """A run may fail before or after it was configured."""
        for status in ("failed", "interrupted"):
            self.make().finalize(status)
        logger = self.make()
        logger.log_config("toy", {})
        logger.finalize("failed")
