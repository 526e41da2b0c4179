"""Data for the point-in-time join: random times over 30 days, 10,000 keys, microseconds (Feast's DuckDB store fails on nanoseconds)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEYS = 10_000
DAYS = 30
FIRST_SECOND = 1_767_225_600
ROWS_PER_GROUP = 1_000_000


@dataclass(frozen=True)
class Case:
    """How much of what is joined."""

    entities: int
    rows: int
    views: int
    features: int

    @property
    def name(self) -> str:
        return f"{self.entities}x{self.rows}x{self.views}x{self.features}"


def write_views(case: Case, folder: Path) -> list[Path]:
    """One Parquet file per view; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{case.name}-view{v}.parquet" for v in range(case.views)]
    for number, path in enumerate(paths):
        if not path.exists():
            write_view(case, number, path)
    return paths


def write_view(case: Case, number: int, path: Path) -> None:
    random = np.random.default_rng(number)
    temporary = path.with_suffix(".writing")
    groups = view_groups(case, number, random)
    first = next(groups)
    with pq.ParquetWriter(temporary, first.schema) as writer:
        writer.write_table(first)
        for group in groups:
            writer.write_table(group)
    temporary.rename(path)


def view_groups(case: Case, number: int, random: np.random.Generator) -> Iterator[pa.Table]:
    for begin in range(0, case.rows, ROWS_PER_GROUP):
        rows = min(ROWS_PER_GROUP, case.rows - begin)
        moments = (FIRST_SECOND + random.integers(0, DAYS * 86_400, rows)) * 1_000_000
        columns: dict[str, Any] = {
            "driver": random.integers(0, KEYS, rows),
            "event_timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
            "created": pa.array(moments + 60_000_000, pa.timestamp("us", "UTC")),
        }
        columns.update({f"f{number}_{i}": random.random(rows) for i in range(case.features)})
        yield pa.table(columns)


def entity_frame(case: Case) -> Any:
    """Entity rows at full hours, so that some (key, time) come more than once, as they do in practice."""
    random = np.random.default_rng(99)
    moments = (FIRST_SECOND + random.integers(0, DAYS * 24, case.entities) * 3_600) * 1_000_000
    columns = {
        "driver": random.integers(0, KEYS, case.entities),
        "event_timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
        "label": random.random(case.entities),
    }
    return pa.table(columns).to_pandas()
