"""Historical features, latest rows and all rows, computed in memory: row numbers first, then the feature columns by them."""

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mlops_dagster.resources.feature_store.asof_index import NO_ROW, Sorted, SourceRows, key_codes, latest_rows, not_older_than
from mlops_dagster.resources.feature_store.asof_plan import EntityRows, ViewPlan
from mlops_dagster.resources.feature_store.asof_source import ROWS_AT_ONCE, ParquetSource
from mlops_dagster.resources.feature_store.asof_time import (
    LEAST,
    MOST,
    TimeRange,
    as_numpy,
    finest,
    in_unit,
    instant,
    span,
    time_unit,
    times,
)

BYTES_AT_ONCE = 2 << 20
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


@dataclass(frozen=True)
class Period:
    """From `start` to `end`, both included; None is no limit, a moment without a zone is UTC."""

    start: datetime | None = None
    end: datetime | None = None

    def range(self, unit: str) -> TimeRange:
        return TimeRange(instant(self.start, unit) if self.start else LEAST, instant(self.end, unit) if self.end else MOST, unit)

    def holds(self, moments: np.ndarray, unit: str) -> np.ndarray:
        wanted = self.range(unit)
        return (moments >= wanted.first) & (moments <= wanted.last)


def historical(entities: EntityRows, plans: Sequence[ViewPlan], as_known: bool, threads: int) -> pa.Table:
    """The entity rows, same order and number, with the feature columns of all views beside them."""
    table = entities.table
    with ThreadPoolExecutor(threads) as pool:
        for plan, source, rows in view_matches(entities, plans, as_known, pool, threads):
            columns = gather(source, [column for column, _ in plan.features], rows, pool)
            for (_, name), values in zip(plan.features, columns, strict=True):
                table = table.append_column(name, values)
    return table


def historical_frame(entities: EntityRows, plans: Sequence[ViewPlan], as_known: bool, threads: int) -> pd.DataFrame:
    """What `historical(…).to_pandas()` is; where all features are doubles, they are written straight into the frame's one block."""
    if any(plan.source.schema.field(column).type != pa.float64() for plan in plans for column, _ in plan.features):
        return historical(entities, plans, as_known, threads).to_pandas(self_destruct=True)
    names = [name for plan in plans for _, name in plan.features]
    block, begin = np.empty((len(names), entities.table.num_rows)), 0
    with ThreadPoolExecutor(threads) as pool:
        for plan, source, rows in view_matches(entities, plans, as_known, pool, threads):
            end = begin + len(plan.features)
            gather_doubles(source, [column for column, _ in plan.features], rows, block[begin:end], pool)
            begin = end
    frame = pd.DataFrame(block.T, columns=pd.Index(names), copy=False)
    for position, (name, values) in enumerate(entities.table.to_pandas().items()):
        frame.insert(position, str(name), values)
    return frame


def view_matches(
    entities: EntityRows, plans: Sequence[ViewPlan], as_known: bool, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[ViewPlan, ParquetSource, np.ndarray]]:
    """The `view_match` of each plan, in order; as many views are matched at once as there are threads, for sorting uses only one."""
    for begin in range(0, len(plans), threads):
        group = plans[begin : begin + threads]
        match = partial(view_match, entities, as_known=as_known, threads=max(1, threads // len(group)))
        matched = list(pool.map(match, group))
        hand_back_freed_memory()
        for plan, (source, rows) in zip(group, matched, strict=True):
            yield plan, source, rows
        hand_back_freed_memory()


def hand_back_freed_memory() -> None:
    """What allocators keep of columns that are gone (Arrow's pool; glibc's arenas, one a thread) would stand beside the answer at the peak."""
    pa.default_memory_pool().release_unused()
    if MALLOC_TRIM:
        MALLOC_TRIM(0)


def view_match(entities: EntityRows, plan: ViewPlan, as_known: bool, threads: int) -> tuple[ParquetSource, np.ndarray]:
    """The part of the view's source that may matter, and for each entity row the number of its valid row there, or `NO_ROW`."""
    if not entities.table.num_rows:
        return plan.source, np.empty(0, np.int64)
    unit = common_unit(entities, plan)
    moments = in_unit(entities.moments, entities.unit, unit)
    source = plan.source.within(plan.timestamp, wanted_range(moments, plan.ttl, unit))
    return source, matching_rows(entities, moments, plan, source, unit, as_known, threads)


def common_unit(entities: EntityRows, plan: ViewPlan) -> str:
    """The finest unit in use; microseconds at least where a TTL must be subtracted."""
    return finest(entities.unit, *plan.units, *(["us"] if plan.ttl else []))


def wanted_range(moments: np.ndarray, ttl: timedelta | None, unit: str) -> TimeRange:
    last = int(moments.max())
    return TimeRange(max(int(moments.min()) - span(ttl, unit), LEAST) if ttl else LEAST, last, unit)


def matching_rows(
    entities: EntityRows, moments: np.ndarray, plan: ViewPlan, source: ParquetSource, unit: str, as_known: bool, threads: int
) -> np.ndarray:
    """Per entity row the number of the valid row in `source`, or `NO_ROW`."""
    index = source.read(plan.index_columns if as_known else plan.index_columns[: len(plan.join_keys) + 1], threads)
    codes = key_codes(
        [entities.table[name] for name, _ in plan.join_keys],
        [index[name] for _, name in plan.join_keys],
        [name for name, _ in plan.join_keys],
        (len(moments), index.num_rows),
    )
    history = source_rows(index, plan.timestamp, plan.created if as_known else None, codes.source, unit, source.location)
    if plan.created and not as_known:
        history = replace(history, read_created=partial(created_times, source, plan.created, unit, threads))
    del index
    rows = latest_rows(codes.entity, moments, codes.size, history, as_known)
    return not_older_than(rows, history.times, moments, span(plan.ttl, unit)) if plan.ttl else rows


def created_times(source: ParquetSource, created: str, unit: str, threads: int) -> np.ndarray:
    return filled_times(source.read([created], threads)[created], created, unit, source.location)[0]


def source_rows(index: pa.Table, timestamp: str, created: str | None, codes: np.ndarray, unit: str, location: str) -> SourceRows:
    """Times and created times of `index` in `unit`; a row without a time gets the code of no key, so that it never matches."""
    moments, no_time = filled_times(index[timestamp], timestamp, unit, location)
    codes = codes if no_time is None else np.where(no_time, NO_ROW, codes)
    if created is None:
        return SourceRows(codes, moments)
    created_times, never_known = filled_times(index[created], created, unit, location)
    return SourceRows(codes, moments, created_times, never_known)


def filled_times(values: pa.ChunkedArray, column: str, unit: str, location: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Times in `unit`, the earliest of all where null, and which were null (None where none was)."""
    own = time_unit(values.type, column, location)
    if not values.null_count:
        return in_unit(times(values, column, location), own, unit), None
    missing = values.is_null().to_numpy()
    whole = values.cast(pa.timestamp(own)).cast(pa.int64()).fill_null(0)
    filled = in_unit(whole.to_numpy(), own, unit)
    return np.where(missing, LEAST, filled), missing


def gather(source: ParquetSource, columns: Sequence[str], rows: np.ndarray, pool: ThreadPoolExecutor) -> list[pa.ChunkedArray]:
    """The columns at the row numbers `rows`, null at `NO_ROW`; each thread reads a few columns, so that little of the source is held at once."""
    wanted = RowNumbers.of(rows)

    def taken(group: list[str]) -> list[tuple[str, pa.ChunkedArray]]:
        return [(name, take(values, wanted)) for name, values in zip(group, source.read(group, 1).columns, strict=True)]

    groups = column_groups(source, list(dict.fromkeys(columns)))
    found = dict(pair for part in pool.map(taken, groups) for pair in part)
    return [found[name] for name in columns]


def gather_doubles(
    source: ParquetSource, columns: Sequence[str], rows: np.ndarray, block: np.ndarray, pool: ThreadPoolExecutor
) -> None:
    """Writes the columns at the row numbers `rows` into `block`, a line per column, NaN at `NO_ROW`."""
    absent = rows == NO_ROW
    wanted = absent if absent.any() else None
    lines: dict[str, list[np.ndarray]] = {}
    for name, line in zip(columns, block, strict=True):
        lines.setdefault(name, []).append(line)

    def fill(group: list[str]) -> None:
        for name, values in zip(group, source.read(group, 1).columns, strict=True):
            for line in lines[name]:
                if len(values):
                    as_numpy(values).take(rows, out=line, mode="clip")
                if wanted is not None:
                    line[wanted] = np.nan

    list(pool.map(fill, column_groups(source, list(lines))))


@dataclass(frozen=True)
class RowNumbers:
    """Row numbers to take: all of them valid indices, and a bitmap of those that stand for a row at all (None: every one does)."""

    rows: np.ndarray
    indices: np.ndarray
    bitmap: pa.Buffer | None
    missing: int

    @staticmethod
    def of(rows: np.ndarray) -> "RowNumbers":
        present = rows != NO_ROW
        missing = len(rows) - int(np.count_nonzero(present))
        if not missing:
            return RowNumbers(rows, rows, None, 0)
        return RowNumbers(rows, np.maximum(rows, 0), pa.py_buffer(np.packbits(present, bitorder="little")), missing)

    def slices(self) -> Iterator[pa.Array]:
        for begin in range(0, len(self.rows), ROWS_AT_ONCE):
            part = self.rows[begin : begin + ROWS_AT_ONCE]
            yield pa.array(part, mask=part == NO_ROW)


def take(values: pa.ChunkedArray, wanted: RowNumbers) -> pa.ChunkedArray:
    """`values` at the wanted rows. Plain numbers and times without nulls are copied by NumPy and share one bitmap; the rest is Arrow's."""
    if not len(values):
        return pa.chunked_array([pa.nulls(len(wanted.rows), values.type)])
    if pa.types.is_primitive(values.type) and not pa.types.is_boolean(values.type) and not values.null_count:
        taken = raw_values(values).take(wanted.indices)
        buffers = [wanted.bitmap, pa.py_buffer(taken)]
        return pa.chunked_array([pa.Array.from_buffers(values.type, len(taken), buffers, wanted.missing)])
    parts = (pc.take(values, part, boundscheck=False) for part in wanted.slices())
    return pa.chunked_array([c for p in parts for c in (p.chunks if isinstance(p, pa.ChunkedArray) else [p])], values.type)


def raw_values(values: pa.ChunkedArray) -> np.ndarray:
    """The bytes of a column of fixed width as integers of that width, without a copy where it is one chunk."""
    kind = np.dtype(f"i{values.type.bit_width // 8}")
    parts = [np.frombuffer(c.buffers()[1], kind)[c.offset : c.offset + len(c)] for c in values.chunks if len(c)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def needed_bytes(entities: EntityRows, plans: Sequence[ViewPlan], threads: int) -> int:
    """About how many bytes the answer and the work for it take at once: the answer twice over (as pandas too), and the largest indexes of
    views, one a thread.
    """
    rows = entities.table.num_rows
    answer, work = entities.table.nbytes, []
    for plan in plans:
        sizes, held = plan.source.column_bytes, max(plan.source.rows, 1)
        answer += sum(sizes.get(column, 0) for column, _ in plan.features) * rows // held
        index = sum(sizes.get(c, 0) for c in plan.index_columns) + held * (len(plan.join_keys) + 6) * 8
        work.append(max(index + rows * 6 * 8, 2 * BYTES_AT_ONCE))
    return 2 * answer + sum(sorted(work)[-threads:])


def column_groups(source: ParquetSource, columns: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for column in columns:
        width = source.column_bytes.get(column, 0)
        if group and size + width > BYTES_AT_ONCE:
            yield group
            group, size = [], 0.0
        group.append(column)
        size += width
    if group:
        yield group


def latest(
    source: ParquetSource, join_keys: list[str], timestamp: str, created: str | None, period: Period, threads: int
) -> np.ndarray:
    """Row numbers, ascending, of the latest row of each key whose time lies in the period; null keys count as a key of their own."""
    index = source.read([*join_keys, timestamp, *([created] if created else [])], threads)
    unit = finest("us", *(time_unit(index.schema.field(c).type, c, source.location) for c in (timestamp, created) if c))
    empty = [pa.chunked_array([], index[k].type) for k in join_keys]
    codes = key_codes(empty, [index[k] for k in join_keys], join_keys, (0, index.num_rows), null_is_a_key=True)
    rows = source_rows(index, timestamp, created, codes.source, unit, source.location)
    outside = ~period.holds(rows.times, unit)
    rows = SourceRows(np.where(outside, NO_ROW, rows.codes), rows.times, rows.created, rows.never_known)
    return np.sort(Sorted.of(rows, codes.size).last_of_each_key())


def in_period(table: pa.Table, timestamp: str, period: Period, location: str) -> pa.Table:
    """The rows whose time lies in the period; a row without a time lies in none."""
    unit = finest("us", time_unit(table.schema.field(timestamp).type, timestamp, location))
    moments, missing = filled_times(table[timestamp], timestamp, unit, location)
    kept = period.holds(moments, unit)
    kept = kept if missing is None else kept & ~missing
    return table if kept.all() else table.filter(pa.array(kept))
