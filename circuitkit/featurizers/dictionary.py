"""A dictionary of features: sparse autoencoder or transcoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import ConfigError
from circuitkit.featurizers.base import Featurizer


class Dictionary(Featurizer):
    """Features of a sparse autoencoder, or of a transcoder: f(x W_enc + b_enc) W_dec + b_dec. Final.

    ``load_dictionary`` reads one of a folder. Source: "Sparse Feature Circuits" (arXiv 2403.19647), section 2; transcoders: "Transcoders
    Find Interpretable LLM Feature Circuits" (arXiv 2406.11944), equation 1.

    Args:
        encoder: From the activation to the features.
        decoder: Back; a row for each feature.
        encoder_bias: Of the features.
        decoder_bias: Of the activation.
        activation: The function f: ``torch.nn.ReLU()``, ``JumpReLU`` or ``TopK``.
        centred: Whether the decoder's bias is taken from what is encoded.
        reads_input: True for a transcoder, which makes the features of what the MLP reads. The linear path that some transcoders
            have beside their features is part of the error term, as no feature carries it.
    """

    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor
    decoder_bias: Tensor

    def __init__(
        self,
        encoder: Float[Tensor, "width feature"],
        decoder: Float[Tensor, "feature width"],
        encoder_bias: Float[Tensor, " feature"],
        decoder_bias: Float[Tensor, " width"],
        activation: nn.Module | None = None,
        *,
        centred: bool = False,
        reads_input: bool = False,
    ) -> None:
        n_features, width = decoder.shape
        found = tuple(encoder.shape), tuple(encoder_bias.shape), tuple(decoder_bias.shape)
        if found != ((width, n_features), (n_features,), (width,)):
            raise ConfigError(
                f"A dictionary whose decoder has {n_features} features x width {width} needs an encoder of {width} x {n_features} and "
                f"biases of {n_features} and {width}; found {found[0]}, {found[1]} and {found[2]}. The file may be of another layout."
            )
        super().__init__(width, n_features, reads_input=reads_input)
        self.activation = activation or nn.ReLU()
        self.centred = centred
        for name, tensor in (
            ("encoder", encoder), ("decoder", decoder), ("encoder_bias", encoder_bias), ("decoder_bias", decoder_bias)
        ):  # fmt: skip
            self.register_buffer(name, tensor.detach())

    def coordinates(self, act: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        act = act.to(self.encoder.dtype)
        pre = torch.matmul(act - self.decoder_bias if self.centred else act, self.encoder) + self.encoder_bias
        coordinates: Tensor = self.activation(pre)
        return coordinates

    def reconstruct(self, coordinates: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row width"]:
        return torch.matmul(coordinates, self.decoder) + self.decoder_bias
