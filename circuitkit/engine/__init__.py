"""Engines: masks in, scores out."""

from circuitkit.engine.base import Baseline, Engine
from circuitkit.engine.packed import PackedEngine
from circuitkit.engine.reference import ReferenceEngine

__all__ = ["Baseline", "Engine", "PackedEngine", "ReferenceEngine"]
