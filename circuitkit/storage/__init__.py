"""Files: the values of core/ written and read, the journal of a run, the lock on its folder, and the formats of other programs."""

from circuitkit.storage.tables import read_table
from circuitkit.storage.values import load, save, save_finding

__all__ = ["load", "read_table", "save", "save_finding"]
