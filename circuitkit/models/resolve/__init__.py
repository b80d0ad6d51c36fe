"""Where the parts of a model are, found by comparing tensors in one forward pass and proved before anything relies on it."""

from circuitkit.models.resolve.resolving import resolve

__all__ = ["resolve"]
