"""What every method must keep to."""

from __future__ import annotations

import json
from abc import abstractmethod

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.records import Step
from circuitkit.engine.base import Engine
from circuitkit.methods.base import Method
from circuitkit.testing.base import PartConformance


class MethodConformance(PartConformance):
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
