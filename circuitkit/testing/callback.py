"""What every callback must keep to."""

from __future__ import annotations

from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.core.records import RunInfo
from circuitkit.testing.base import STEP, Conformance


class CallbackConformance(Conformance):
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
