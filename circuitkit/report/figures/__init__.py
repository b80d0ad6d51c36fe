"""Figures: pure functions from a result to what is drawn of it, a file a kind of result."""
