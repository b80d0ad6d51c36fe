"""Work: what passes have been made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Work:
    """What an engine has computed so far; the same on every machine.

    Attributes:
        passes: Forward passes, whole or partial.
        rows: Rows of these.
        layer_rows: Layers x rows computed.
        layer_tokens: Layers x rows x positions computed.
        corrupt_passes: Passes over corrupt prompts, among them.
        corrupt_layer_rows: Layers x rows of these.
    """

    passes: int = 0
    rows: int = 0
    layer_rows: int = 0
    layer_tokens: int = 0
    corrupt_passes: int = 0
    corrupt_layer_rows: int = 0

    def add(self, rows: int, layers: int, n_pos: int, *, corrupt: bool) -> None:
        """Counts one pass."""
        self.passes += 1
        self.rows += rows
        self.layer_rows += rows * layers
        self.layer_tokens += rows * layers * n_pos
        self.corrupt_passes += corrupt
        self.corrupt_layer_rows += corrupt * rows * layers
