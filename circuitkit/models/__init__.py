"""Models: the only room that knows nnsight, transformers and accelerate."""

from circuitkit.models.architectures import ARCHITECTURES, Architecture
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.loading import known_shape, load_model, load_shape
from circuitkit.models.named import HUB_MODELS

__all__ = ["ARCHITECTURES", "HUB_MODELS", "Architecture", "HookedModel", "Layer", "known_shape", "load_model", "load_shape"]
