"""Patchers: by what a removed component is replaced."""

from circuitkit.patchers.base import Needs, Patcher
from circuitkit.patchers.mean import Mean
from circuitkit.patchers.resample import Resample
from circuitkit.patchers.zero import Zero

__all__ = ["Mean", "Needs", "Patcher", "Resample", "Zero"]
