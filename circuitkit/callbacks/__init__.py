"""What is told how a run goes."""

from circuitkit.callbacks.base import Callback
from circuitkit.callbacks.dispatch import Callbacks
from circuitkit.callbacks.guards import NanGuard
from circuitkit.callbacks.journal import Journal
from circuitkit.callbacks.progress import Progress

__all__ = ["Callback", "Callbacks", "Journal", "NanGuard", "Progress"]
