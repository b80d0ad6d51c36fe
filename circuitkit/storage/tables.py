"""Tables that a run left, such as ``scores.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from circuitkit.core.errors import CircuitError
from circuitkit.storage.reading import max_bytes, read_bytes

_BYTES_A_CELL = 16


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a parquet file.

    Raises:
        CircuitError: It cannot be read, is damaged, or unpacks to more than may be read.
    """
    import pyarrow
    from pyarrow import parquet

    content = read_bytes(path, "table")
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
            about = file.metadata
            unpacked = sum(about.row_group(place).total_byte_size for place in range(about.num_row_groups))
            if max(unpacked, about.num_rows * max(1, about.num_columns) * _BYTES_A_CELL) > max_bytes():
                raise CircuitError(f"The table file {path} unpacks to {about.num_rows:,} rows, which are not read. Open it with pyarrow.")
            rows: list[dict[str, Any]] = file.read().to_pylist()
            return rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CircuitError(f"The table file {path} is no whole parquet file: {reason}. It may have been cut off; make it again.") from error
