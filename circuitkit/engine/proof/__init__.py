"""Whether an engine's numbers can be trusted."""
