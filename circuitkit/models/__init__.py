"""Models: the only room that knows nnsight, transformers and accelerate."""

from circuitkit.models.architectures import ARCHITECTURES, Architecture
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.loading import load_model, load_shape

__all__ = ["ARCHITECTURES", "Architecture", "HookedModel", "Layer", "load_model", "load_shape"]
