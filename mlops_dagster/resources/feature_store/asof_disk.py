"""Historical features beyond memory: DuckDB's ASOF join under a memory limit, spilling to a temporary folder."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_dagster.core.errors import DataError, MlopsError, StorageError
from mlops_dagster.resources.feature_store.asof_index import is_text, plain, same_type
from mlops_dagster.resources.feature_store.asof_memory import Period, common_unit, filled_times, wanted_range
from mlops_dagster.resources.feature_store.asof_plan import EntityRows, ViewPlan
from mlops_dagster.resources.feature_store.asof_settings import Settings
from mlops_dagster.resources.feature_store.asof_source import ParquetSource
from mlops_dagster.resources.feature_store.asof_sql import (
    ViewShape,
    files_sql,
    history_sql,
    microseconds,
    quoted,
    text_microseconds,
    uneven_files_sql,
)
from mlops_dagster.resources.feature_store.asof_time import in_unit, span, time_unit
from mlops_dagster.resources.feature_store.asof_types import carried

ROWS_PER_BATCH = 1 << 16
LEAST_DUCKDB_BYTES = 128 << 20


@contextmanager
def spilling(settings: Settings, failures: list[MlopsError]) -> Iterator[Any]:
    """A DuckDB connection that keeps to the memory limit and the threads; its temporary files are gone afterwards.

    `failures` collects our own errors from within the streams that DuckDB reads, which it would otherwise wrap.
    """
    import duckdb

    with temporary_folder(settings.temp_directory) as folder:
        limit = max(settings.memory_limit_bytes, LEAST_DUCKDB_BYTES)
        options = {"memory_limit": f"{limit}B", "threads": settings.threads, "temp_directory": folder}
        with duckdb.connect(config=options) as connection:
            try:
                yield connection
            except duckdb.OutOfMemoryException as error:
                raise StorageError(
                    f"The retrieval does not fit offline_store.memory_limit ({limit} bytes) even with files: {error}. Raise the limit or free disk."
                ) from error
            except duckdb.Error as error:
                raise failures[0] if failures else StorageError(f"DuckDB could not join on disk: {error}") from error


def temporary_folder(within: str | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="asof-", dir=within)
    except OSError as error:
        raise StorageError(
            f"offline_store.temp_directory {within or tempfile.gettempdir()!r} cannot be written to: {error}. Create it, or name another folder."
        ) from error


def historical_batches(
    entities: EntityRows, plans: Sequence[ViewPlan], as_known: bool, settings: Settings
) -> Iterator[pa.RecordBatch]:
    """The entity rows in their order with the features of all views, in batches; at least one batch, though it be empty.

    Only keys and times of the entity rows go through DuckDB; their other columns are put beside the answer afterwards, unchanged.
    """
    failures: list[MlopsError] = []
    wanted = answer_schema(entities, plans)
    yield pa.RecordBatch.from_pylist([], schema=wanted)
    with spilling(settings, failures) as connection:
        table = pa.table({"e_row": np.arange(entities.table.num_rows)})
        for i, plan in enumerate(plans):
            table, source_keys = with_view_columns(table, entities, plan, i)
            connection.register(f"view_{i}", view_reader(entities, plan, source_keys, failures))
        connection.register("entities", table)
        names = [[name for _, name in plan.features] for plan in plans]
        sql = history_sql([shape(entities, plan, as_known) for plan in plans], ["e_row"], names)
        begin = 0
        for batch in connection.sql(sql).to_arrow_reader(ROWS_PER_BATCH):
            rows = entities.table.slice(begin, batch.num_rows)
            begin += batch.num_rows
            whole = pa.table([*rows.columns, *batch.columns[1:]], names=wanted.names)
            yield from in_types(whole, wanted).combine_chunks().to_batches()


def in_types(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    try:
        return table.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"A feature comes back from DuckDB in another type ({error}). Set offline_store.engine to 'memory', or write it in a plainer type."
        ) from error


def answer_schema(entities: EntityRows, plans: Sequence[ViewPlan]) -> pa.Schema:
    fields = list(entities.table.schema)
    fields += [pa.field(name, plan.source.schema.field(column).type) for plan in plans for column, name in plan.features]
    return pa.schema(fields)


def guarded(stream: Iterator[pa.RecordBatch], failures: list[MlopsError]) -> Iterator[pa.RecordBatch]:
    try:
        yield from stream
    except MlopsError as error:
        failures.append(error)
        raise


def shape(entities: EntityRows, plan: ViewPlan, as_known: bool) -> ViewShape:
    ttl = span(plan.ttl, common_unit(entities, plan)) if plan.ttl else None
    return ViewShape(len(plan.join_keys), len(plan.features), plan.created is not None, ttl, as_known)


def with_view_columns(table: pa.Table, entities: EntityRows, plan: ViewPlan, i: int) -> tuple[pa.Table, list[pa.DataType]]:
    """The entity table with the keys and the time of view i; and the types that the source's keys must be brought to."""
    kinds = []
    for j, (name, column) in enumerate(plan.join_keys):
        source = pa.chunked_array([], plan.source.schema.field(column).type)
        left, right = same_type(entities.table[name], source, name)
        table = table.append_column(f"v{i}_k{j}", left.cast(carried(left.type)))
        kinds.append(right.type)
    moments = in_unit(entities.moments, entities.unit, common_unit(entities, plan))
    return table.append_column(f"v{i}_t", pa.array(moments)), kinds


def view_reader(
    entities: EntityRows, plan: ViewPlan, kinds: list[pa.DataType], failures: list[MlopsError]
) -> pa.RecordBatchReader:
    """The view's source as the relation that the SQL expects, read as it is consumed."""
    unit = common_unit(entities, plan)
    columns = [*plan.index_columns, *(column for column, _ in plan.features)]
    fields = [pa.field(f"k{j}", carried(kind)) for j, kind in enumerate(kinds)]
    fields += [pa.field(name, pa.int64()) for name in ("t", *(["c"] if plan.created else []), "p")]
    fields += [pa.field(f"f{m}", carried(plan.source.schema.field(column).type)) for m, (column, _) in enumerate(plan.features)]
    schema = pa.schema(fields)
    source = plan.source
    if entities.table.num_rows:
        moments = in_unit(entities.moments, entities.unit, unit)
        source = source.within(plan.timestamp, wanted_range(moments, plan.ttl, unit))
    return pa.RecordBatchReader.from_batches(schema, guarded(view_batches(source, plan, columns, kinds, unit, schema), failures))


def view_batches(
    source: ParquetSource, plan: ViewPlan, columns: list[str], kinds: list[pa.DataType], unit: str, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    begin = 0
    for batch in source.batches(columns, ROWS_PER_BATCH):
        table = pa.Table.from_batches([batch])
        values: list[Any] = []
        for kind, (name, column) in zip(kinds, plan.join_keys, strict=True):
            values.append(cast_key(table[column], kind, name))
        values += [stamps(table[column], column, unit, source.location) for column in (plan.timestamp, plan.created) if column]
        values.append(np.arange(begin, begin + table.num_rows))
        values += [table[column].cast(schema.field(f"f{m}").type) for m, (column, _) in enumerate(plan.features)]
        begin += table.num_rows
        yield from pa.table(values, schema=schema).combine_chunks().to_batches()


def cast_key(values: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return plain(values).cast(kind).cast(carried(kind))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"Join key {name!r} of the source does not fit {kind}: {error}. Give the entity rows and the source one type."
        ) from error


def stamps(values: pa.ChunkedArray, column: str, unit: str, location: str) -> pa.Array:
    moments, missing = filled_times(values, column, unit, location)
    assert time_unit(values.type, column, location)
    return pa.array(moments, mask=missing)


def standalone_sql(entities: EntityRows, plans: Sequence[ViewPlan], as_known: bool) -> str:
    """The query with its sources read from their files; the entity rows are the relation `entity_df`. Times to the microsecond."""
    columns = [quoted(c) for c in entities.table.column_names]
    extra, steps = ["row_number() OVER () AS e_row"], []
    shapes = []
    for i, plan in enumerate(plans):
        extra += [f"{quoted(name)} AS v{i}_k{j}" for j, (name, _) in enumerate(plan.join_keys)]
        extra.append(f"{typed_microseconds(entities.timestamp, entities.given)} AS v{i}_t")
        selected = [f"{quoted(column)} AS k{j}" for j, (_, column) in enumerate(plan.join_keys)]
        selected += [f"{source_microseconds(plan.source, plan.timestamp)} AS t", "row_number() OVER () AS p"]
        selected += [f"{source_microseconds(plan.source, plan.created)} AS c"] if plan.created else []
        selected += [f"{quoted(column)} AS f{m}" for m, (column, _) in enumerate(plan.features)]
        steps.append(f"view_{i} AS (SELECT {', '.join(selected)} FROM {relation_sql(plan.source)})")
        ttl = span(plan.ttl, "us") if plan.ttl else None
        shapes.append(ViewShape(len(plan.join_keys), len(plan.features), plan.created is not None, ttl, as_known))
    rows = f"entities AS (SELECT {', '.join([*columns, *extra])} FROM entity_df)"
    join = history_sql(shapes, entities.table.column_names, [[name for _, name in plan.features] for plan in plans])
    return "WITH " + ",\n".join([rows, *steps]) + ",\n" + join.removeprefix("WITH ")


def source_microseconds(source: ParquetSource, column: str) -> str:
    return typed_microseconds(column, source.schema.field(column).type)


def typed_microseconds(column: str, kind: pa.DataType) -> str:
    if is_text(kind):
        return text_microseconds(column)
    return microseconds(column, zoned=pa.types.is_timestamp(kind) and kind.tz is not None)


def relation_sql(source: ParquetSource) -> str:
    """The source's files as DuckDB reads them, with the same columns as we do."""
    types = {key: "BIGINT" if pa.types.is_int64(kind) else "VARCHAR" for key, kind in source.hive_types.items()}
    held = {name for file in source.files for name in file.schema.names} & set(types)
    values = [dict(file.hive) for file in source.files]
    if not held and all(set(v) == set(types) for v in values):
        return files_sql(source.addresses, types)
    return uneven_files_sql(source.addresses, types, values, held)


def source_sql(
    source: ParquetSource,
    columns: list[str],
    join_keys: list[str],
    timestamp: str,
    created: str | None,
    period: Period,
    latest_only: bool,
) -> str:
    """The rows of a source in a period, or the latest of each key, as DuckDB SQL."""
    limits = period.range("us")
    moment = source_microseconds(source, timestamp)
    sql = f"SELECT {', '.join(quoted(c) for c in columns)}\nFROM {relation_sql(source)}"
    sql += f"\nWHERE {moment} BETWEEN {limits.first} AND {limits.last}"
    if not latest_only:
        return sql
    keys = f"PARTITION BY {', '.join(quoted(k) for k in join_keys)} " if join_keys else ""
    order = f"{quoted(timestamp)} DESC" + (f", {quoted(created)} DESC NULLS LAST" if created else "")
    return sql + f"\nQUALIFY row_number() OVER ({keys}ORDER BY {order}) = 1"
