"""Dense passes: soft masks over any universe, and the derivative of the metric by every unit's mask."""
