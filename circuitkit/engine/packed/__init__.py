"""The fast engine for nodes: many masks a forward pass."""
