"""Models: the only room that knows nnsight, transformers and accelerate."""

from circuitkit.models.hooked import HookedModel
from circuitkit.models.layer import Layer
from circuitkit.models.loading import known_shape, load_model, load_shape
from circuitkit.models.model_map import ModelMap
from circuitkit.models.named import HUB_MODELS

__all__ = ["HUB_MODELS", "HookedModel", "Layer", "ModelMap", "known_shape", "load_model", "load_shape"]
