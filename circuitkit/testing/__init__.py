"""Conformance suites for plugins: subclass one in your own tests, implement ``make``, and pytest runs what circuitkit relies on.

    from circuitkit.testing import PatcherConformance

    class TestHalf(PatcherConformance):
        def make(self):
            return Half()

They need pytest, and nothing else beyond circuitkit itself. Assertions say what was expected.
"""

from circuitkit.testing.base import ONLY, variants
from circuitkit.testing.callback import CallbackConformance
from circuitkit.testing.featurizer import FeaturizerConformance
from circuitkit.testing.logger import LoggerConformance
from circuitkit.testing.method import MethodConformance
from circuitkit.testing.metric import MetricConformance
from circuitkit.testing.patcher import PatcherConformance
from circuitkit.testing.task import TaskConformance

__all__ = [
    "CallbackConformance",
    "FeaturizerConformance",
    "LoggerConformance",
    "MethodConformance",
    "MetricConformance",
    "ONLY",
    "PatcherConformance",
    "TaskConformance",
    "variants",
]
