"""Engines: masks in, scores out."""

from circuitkit.engine.base import Baseline, Engine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine

__all__ = ["Baseline", "Engine", "PackedEngine", "ReferenceEngine"]
