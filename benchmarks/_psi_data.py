"""The tables that the PSI benchmarks read."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def frame(rows: int, columns: int, seed: int, shift: float = 0.0) -> pd.DataFrame:
    """Normal and skewed columns in turn, moved by `shift` standard deviations."""
    rng = np.random.default_rng(seed)
    draws = [rng.normal(size=rows) + shift if k % 2 else rng.lognormal(shift, 1, size=rows) for k in range(columns)]
    return pd.DataFrame({f"f{k}": draw for k, draw in enumerate(draws)})


def parquet(path: Path, rows: int, columns: int, group: int = 1_000_000) -> None:
    """A file as a lake would hold it: pyarrow's default compression, row groups of a million."""
    rng = np.random.default_rng(3)
    names = [f"f{k}" for k in range(columns)]
    with pq.ParquetWriter(path, pa.schema([(name, pa.float64()) for name in names])) as writer:
        for _ in range(rows // group):
            writer.write_table(pa.table({name: rng.normal(size=group) for name in names}), row_group_size=group)
