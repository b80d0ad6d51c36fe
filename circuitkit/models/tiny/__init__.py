"""Tiny random models of every type that transformers has: what circuitkit is tried on."""

from circuitkit.models.tiny.making import causal_types, tiny_config, tiny_masked_model, tiny_model

__all__ = ["causal_types", "tiny_config", "tiny_masked_model", "tiny_model"]
