"""Names for the tensors that rooms hand to each other."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Logits = Float[Tensor, "*mask prompt d_vocab"]
"""Next-token logits at the last position, float32."""

StepLogits = Float[Tensor, "mask prompt *step d_vocab"]
"""What engines give: the same for each mask, with an axis of steps where answers have several tokens."""

CleanLogits = Float[Tensor, "prompt *step d_vocab"]
"""Those of the untouched model, which no mask leads."""

Values = Float[Tensor, "*mask prompt"]
"""One number per prompt, for each mask."""

Masks = Bool[Tensor, "mask node"]
"""One row per mask; True = in the circuit = left as the clean run computes it."""

Acts = Float[Tensor, "*batch pos d"]
"""Output of one component: ``d`` is d_head for a head (before the output projection) and d_model for an MLP."""

TokenIds = Int[Tensor, "prompt pos"]
"""Token ids, one row per prompt."""
