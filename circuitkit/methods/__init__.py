"""Methods: which masks to score next, and what the answer is."""

from circuitkit.methods.base import Method, OnStep
from circuitkit.methods.edge_pruning import EdgePruning
from circuitkit.methods.iterative_pruning import IterativePruning
from circuitkit.methods.knockout import Knockout
from circuitkit.methods.random_circuit import RandomCircuit

__all__ = ["EdgePruning", "IterativePruning", "Knockout", "Method", "OnStep", "RandomCircuit"]
