"""The leakage check: what a feature was at a moment must follow from what was known at that moment."""

import datetime as dt
from collections.abc import Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.features import compute_day
from mlops_dagster.assets.lake_paths import day_key, day_range, stored_days, tables
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.stage import check_result
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

SAMPLED_DAYS = 3
_UTC = pa.timestamp("us", "UTC")


def check(spec: ModelSpec, lake: Lake, engine: Any, window: list[dt.date]) -> dg.AssetCheckResult:
    """Recompute the features of sampled days with everything later than a cut-off masked (rows by `event_timestamp`, columns by
    source.known_after, the label by when it lands) and compare the values up to the cut-off with the unmasked ones."""
    queries = load_callable(spec, "features.compute")()
    sampled = sorted({window[(2 * i + 1) * len(window) // (2 * SAMPLED_DAYS)] for i in range(SAMPLED_DAYS)})
    found = [text for day in sampled for text in _leaks(spec, lake, engine, queries, day)]
    because = "; ".join(found[:3]) or f"{len(queries)} views on {len(sampled)} days do not change when the future is masked"
    return check_result("no_future_data", not found, because, {"days": [str(d) for d in sampled], "found": found[:20]})


def _leaks(spec: ModelSpec, lake: Lake, engine: Any, queries: Mapping[str, str], day: dt.date) -> list[str]:
    begin, end = spec.source.partitions.bounds(day)
    everything = compute_day(spec, lake, engine, dict(queries), day)
    leaks = []
    for cutoff in (begin + (end - begin) / 2, end):
        masked = {name: mask(spec, lake, name, position == 0, day, cutoff) for position, name in enumerate(tables(lake, spec))}
        recomputed = engine.run_all(queries, masked, {"day_start": begin, "day_end": end})
        for view in queries:
            known = _until(recomputed[view], begin, cutoff)
            full = _until(everything[view], begin, cutoff)
            columns = differing_columns(full, known)
            if columns:
                leaks.append(
                    f"view {view!r}: {', '.join(columns)} at {cutoff.isoformat()} change when later data is masked; use only rows and "
                    "columns known by event_timestamp (see source.known_after)"
                )
    return leaks


def mask(spec: ModelSpec, lake: Lake, table: str, main: bool, day: dt.date, cutoff: dt.datetime) -> pa.Table:
    """A validated table as it was known at `cutoff`: later rows are gone, later columns are null."""
    wanted = set(day_range(day - dt.timedelta(days=spec.features.lookback_days), day))
    stored = [d for d in stored_days(lake, spec, "validated_data", table) if d in wanted]
    moment = pa.scalar(cutoff, _UTC)
    rows = pa.concat_tables(_day_known(spec, lake, table, main, d, cutoff) for d in stored)
    if "event_timestamp" in rows.column_names:
        rows = rows.filter(pc.less_equal(rows["event_timestamp"].cast(_UTC), moment))
    for column, known_from in (spec.source.known_after if main else {}).items():
        later = pc.fill_null(pc.greater(rows[known_from].cast(_UTC), moment), True)
        rows = rows.set_column(rows.column_names.index(column), column, _nulled(rows[column], later))
    return rows


def _day_known(spec: ModelSpec, lake: Lake, table: str, main: bool, day: dt.date, cutoff: dt.datetime) -> pa.Table:
    """One day's rows; the label is null before it lands where source.known_after does not say when that is."""
    rows = lake.read(day_key(spec, "validated_data", day, table))
    label = spec.label.column
    lands = spec.source.partitions.bounds(day)[1] + dt.timedelta(hours=spec.label.lands_after_hours)
    if not main or label in spec.source.known_after or lands <= cutoff:
        return rows
    everywhere = pa.chunked_array([pa.array([True] * rows.num_rows, pa.bool_())])
    return rows.set_column(rows.column_names.index(label), label, _nulled(rows[label], everywhere))


def _nulled(column: pa.ChunkedArray, where: Any) -> pa.ChunkedArray:
    return pc.if_else(where, pa.scalar(None, column.type), column)


def _until(rows: pa.Table, begin: dt.datetime, cutoff: dt.datetime) -> pa.Table:
    moment = rows["event_timestamp"].cast(_UTC)
    rows = rows.set_column(rows.column_names.index("event_timestamp"), "event_timestamp", moment)
    return rows.filter(pc.and_(pc.greater(moment, pa.scalar(begin, _UTC)), pc.less_equal(moment, pa.scalar(cutoff, _UTC))))


def differing_columns(left: pa.Table, right: pa.Table) -> list[str]:
    """The columns in which two sets of rows differ, whatever their order (float noise of another summation order does not count)."""
    if left.num_rows != right.num_rows:
        return [f"the number of rows ({left.num_rows} became {right.num_rows})"]
    order = [
        (c, "ascending") for c in sorted(left.column_names, key=lambda c: (pa.types.is_floating(left.schema.field(c).type), c))
    ]
    left, right = left.sort_by(order), right.select(left.column_names).sort_by(order)
    return [c for c in left.column_names if not _alike(left[c], right[c])]


def _alike(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    if not pa.types.is_floating(left.type):
        return left.equals(right.cast(left.type))
    import numpy as np

    a, b = (np.asarray(c.cast(pa.float64()).to_numpy(), dtype=float) for c in (left, right))
    return bool(np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True))
