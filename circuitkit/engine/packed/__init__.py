"""The fast engine for nodes: many masks per forward pass."""
