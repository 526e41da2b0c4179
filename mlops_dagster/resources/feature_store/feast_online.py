"""Rows into Feast's online store: the latest of each entity, and never an older one over a newer one."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError

if TYPE_CHECKING:
    import feast
    import pandas as pd
    import pyarrow as pa

KEYS_PER_READ = 10_000  # SQLite allows 32,766 parameters in a statement


def stored_views(store: "feast.FeatureStore") -> "list[feast.FeatureView]":
    return [view for view in store.list_feature_views() if view.online]


def latest(store: "feast.FeatureStore", view: "feast.FeatureView", start: datetime, end: datetime) -> "pa.Table":
    """The latest row of each entity in [start, end] from the offline store, columns named as the view names them."""
    source = view.batch_source
    if source is None:
        raise DataError(f"feature view {view.name!r}: has no batch source to materialize from. Give it source({view.name!r}).")
    back = {new: old for old, new in source.field_mapping.items()}
    job = store._get_provider().offline_store.pull_latest_from_table_or_query(  # Feast's own engines call it; no public name
        config=store.config,
        data_source=source,
        join_key_columns=[back.get(name, name) for name in _join_keys(view)],
        feature_name_columns=[back.get(field.name, field.name) for field in view.features],
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column,
        start_date=start.astimezone(UTC),
        end_date=end.astimezone(UTC),
    )
    table = job.to_arrow()
    return table.rename_columns([source.field_mapping.get(name, name) for name in table.column_names])


def newest(view: "feast.FeatureView", table: "pa.Table") -> "pa.Table":
    """The last row of each entity by event time, then created time; `created_timestamp` is the event's where it is not given."""
    import polars as pl

    source = view.batch_source
    assert source is not None
    needed = [*_join_keys(view), *(field.name for field in view.features), source.timestamp_field]
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(f"rows for feature view {view.name!r}: no column {', '.join(missing)}. Give {', '.join(needed)}.")
    frame = pl.DataFrame(table)
    created = source.created_timestamp_column
    if created and created not in frame.columns:
        frame = frame.with_columns(pl.col(source.timestamp_field).alias(created))
    order = [source.timestamp_field, *([created] if created else [])]
    if frame[source.timestamp_field].null_count():
        raise DataError(f"rows for feature view {view.name!r}: {source.timestamp_field} is null in some. Give each its moment.")
    frame, keys = frame.sort(order, maintain_order=True), _join_keys(view)
    return (frame.unique(keys, keep="last", maintain_order=True) if keys else frame.tail(1)).to_arrow()


def write(store: "feast.FeatureStore", view: "feast.FeatureView", table: "pa.Table") -> int:
    """Write one row per entity; how many were not older than what the online store held."""
    from feast.utils import _convert_arrow_to_proto

    if table.num_rows == 0:
        return 0
    source = view.batch_source
    assert source is not None
    table = _with_utc(table, [source.timestamp_field, source.created_timestamp_column or ""])
    types = {column.name: column.dtype.to_value_type() for column in view.entity_columns}
    if not _join_keys(view):
        table, types = _of_nobody(table)
    rows = _convert_arrow_to_proto(table.combine_chunks(), view, types)
    online = store._get_provider().online_store
    held: list[datetime | None] = []
    names = [field.name for field in view.features]  # Feast's Postgres store cannot be asked for "all of them"
    for begin in range(0, len(rows), KEYS_PER_READ):
        keys = [row[0] for row in rows[begin : begin + KEYS_PER_READ]]
        held += [moment for moment, _ in online.online_read(store.config, view, keys, names)]
    current = [row for row, moment in zip(rows, held, strict=True) if moment is None or _seconds(row[2]) >= _seconds(moment)]
    if current:
        online.online_write_batch(store.config, view, current, None)
    return len(current)


def _of_nobody(table: "pa.Table") -> "tuple[pa.Table, dict[str, Any]]":
    """The entity that Feast gives a view without entities."""
    import pyarrow as pa
    from feast.feature_view import DUMMY_ENTITY, DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL

    if DUMMY_ENTITY_ID not in table.column_names:
        table = table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * table.num_rows))
    return table, {DUMMY_ENTITY_ID: DUMMY_ENTITY.value_type}


def _join_keys(view: "feast.FeatureView") -> list[str]:
    return [column.name for column in view.entity_columns if column.name != "__dummy_id"]


def _seconds(moment: datetime) -> int:
    """Whole seconds: Redis keeps no more."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _with_utc(table: "pa.Table", names: list[str]) -> "pa.Table":
    import pyarrow as pa

    for name in names:
        if name and name in table.column_names:
            kind = table[name].type
            if not pa.types.is_timestamp(kind):
                raise DataError(f"column {name!r}: {kind} is no timestamp. Give timestamps, best in UTC and microseconds.")
            position = table.column_names.index(name)
            table = table.set_column(position, name, table[name].cast(pa.timestamp("us", tz="UTC")))
    return table


def entity_frame(store: "feast.FeatureStore", rows: "pa.Table") -> "pd.DataFrame | Any":
    """Entity rows as the offline store wants them: Arrow where it takes Arrow, else pandas."""
    if type(store._get_provider().offline_store).__name__ == "AsofOfflineStore":
        return rows
    return rows.to_pandas()


def allow_readers_beside_a_writer(database: Path) -> None:
    """Turn on SQLite's write-ahead log, which stays on in the file: a reader then never waits for a materialization."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
