"""Points in time as integers since 1970 (UTC), so that every unit and zone compares exactly."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_dagster.core.errors import DataError

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
LEAST, MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class TimeRange:
    """From `first` to `last`, both included, in `unit` since 1970."""

    first: int
    last: int
    unit: str


def finest(*units: str) -> str:
    return max(units, key=PER_SECOND.__getitem__)


def in_unit(values: np.ndarray, unit: str, wanted: str) -> np.ndarray:
    """The same times in another unit; to a finer one, times beyond int64 stop at its ends (the year 9999 stays later than now)."""
    if PER_SECOND[wanted] >= PER_SECOND[unit]:
        factor = PER_SECOND[wanted] // PER_SECOND[unit]
        return values if factor == 1 else np.clip(values, LEAST // factor + 1, MOST // factor) * factor
    return values // (PER_SECOND[unit] // PER_SECOND[wanted])


def span(length: timedelta, unit: str) -> int:
    """A length of time in `unit` (at least microseconds fine, or a multiple of it)."""
    microseconds = length // timedelta(microseconds=1)
    return microseconds * PER_SECOND[unit] // 10**6


def instant(moment: datetime, unit: str = "us") -> int:
    """A moment in `unit` since 1970; one without a zone is taken as UTC, as Feast takes it."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return span(aware - datetime(1970, 1, 1, tzinfo=UTC), unit)


def time_unit(kind: pa.DataType, column: str, location: str) -> str:
    """The unit in which a column of this type counts. Raises `DataError` where the type is no time at all."""
    if pa.types.is_timestamp(kind):
        return kind.unit
    if pa.types.is_date(kind):
        return "ms"
    raise DataError(
        f"Column {column!r} of {location} is of type {kind}, not a timestamp. Write it as one (any unit, with or without a zone; without is UTC)."
    )


def times(values: pa.ChunkedArray, column: str, location: str) -> np.ndarray:
    """A time column without nulls as int64 in its own unit; a zone changes nothing, Arrow counts in UTC."""
    unit = time_unit(values.type, column, location)
    whole = values.cast(pa.timestamp(unit)) if pa.types.is_date(values.type) else values
    return as_numpy(whole.cast(pa.int64()) if whole.type.tz is None else whole.cast(pa.timestamp(unit)).cast(pa.int64()))


def as_numpy(values: pa.ChunkedArray) -> np.ndarray:
    parts = [c.to_numpy(zero_copy_only=False) for c in values.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int64)


def in_utc(values: pa.ChunkedArray) -> Any:
    """A timestamp column with the zone UTC: other zones are converted, none is taken as UTC."""
    return values if values.type.tz == "UTC" else values.cast(pa.timestamp(values.type.unit, "UTC"))
