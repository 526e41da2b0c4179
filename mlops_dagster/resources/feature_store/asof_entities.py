"""Entity rows that are not given as a frame: those of a SQL query, and those that the sources themselves hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.feature_store.asof_memory import Period, in_period
from mlops_dagster.resources.feature_store.asof_plan import EntityRows, ViewPlan
from mlops_dagster.resources.feature_store.asof_settings import Settings
from mlops_dagster.resources.feature_store.asof_source import ParquetSource
from mlops_dagster.resources.feature_store.asof_time import as_numpy, finest, in_unit, in_utc, times
from mlops_dagster.resources.feature_store.asof_types import carried

EVENT_TIMESTAMP = "event_timestamp"


def entities_of_sql(query: str, plans: Sequence[ViewPlan], settings: Settings) -> pa.Table:
    """The answer of a DuckDB query in which each feature view's name is a table: its source's rows, with the file's own column names.

    Times are UTC.
    """
    import duckdb

    with duckdb.connect(config={"threads": settings.threads}) as connection:
        if settings.repo_path:
            connection.execute("SET file_search_path = ?", [settings.repo_path])
        for plan in plans:
            if plan.name in query:
                connection.register(plan.name, SourceRelation(plan.source))
        try:
            return connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            known = sorted({p.name for p in plans})
            raise DataError(
                f"The entity query failed: {error}. Write DuckDB SQL; the tables are the feature views {known} and any file it can read."
            ) from error


@dataclass(frozen=True)
class SourceRelation:
    """All columns of a source, read anew each time that a query scans it, as it is consumed.

    Times are in UTC without a zone, on which DuckDB computes without its ICU extension.
    """

    source: ParquetSource

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """A new stream by Arrow's PyCapsule protocol (https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html)."""
        schema = pa.schema([pa.field(f.name, queried(f.type)) for f in self.source.schema])
        parts = (pa.Table.from_batches([part]) for part in self.source.batches(schema.names))
        stream = (batch for part in parts for batch in part.cast(schema).to_batches())
        return pa.RecordBatchReader.from_batches(schema, stream).__arrow_c_stream__(requested_schema)


def queried(kind: pa.DataType) -> pa.DataType:
    """The type in which a query sees values of `kind`; DuckDB has types of its own for lengths of time and for UUIDs."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp(kind.unit)
    return kind if pa.types.is_duration(kind) or isinstance(kind, pa.BaseExtensionType) else carried(kind)


def entities_of_period(plans: Sequence[ViewPlan], period: Period, threads: int) -> EntityRows:
    """One row per different (join keys, event time) that the views' sources hold in the period, sorted by time; views must share their keys."""
    keys = [name for name, _ in plans[0].join_keys]
    for plan in plans:
        if sorted(name for name, _ in plan.join_keys) != sorted(keys):
            raise DataError(
                f"Feature views {plans[0].name!r} and {plan.name!r} have different join keys, so there is no common set of rows. "
                "Give entity_df, or ask for one view at a time."
            )
    unit = finest("us", *(u for plan in plans for u in plan.units[:1]))
    found = pa.concat_tables([_keys_and_times(plan, keys, period, unit, threads) for plan in plans], promote_options="permissive")
    found = found.group_by([*keys, EVENT_TIMESTAMP], use_threads=False).aggregate([])
    order = np.argsort(as_numpy(found[EVENT_TIMESTAMP].cast(pa.int64())), kind="stable")
    stamps = in_utc(found[EVENT_TIMESTAMP])
    return EntityRows(
        found.set_column(found.column_names.index(EVENT_TIMESTAMP), EVENT_TIMESTAMP, stamps).take(order), EVENT_TIMESTAMP
    )


def _keys_and_times(plan: ViewPlan, keys: list[str], period: Period, unit: str, threads: int) -> pa.Table:
    source = plan.source.within(plan.timestamp, period.range(unit))
    table = in_period(source.read(plan.index_columns, threads).drop_null(), plan.timestamp, period, source.location)
    moments = in_unit(times(table[plan.timestamp], plan.timestamp, source.location), plan.units[0], unit)
    columns = {name: table[column] for name, column in plan.join_keys}
    return pa.table({**{k: columns[k] for k in keys}, EVENT_TIMESTAMP: pa.array(moments, pa.timestamp(unit))})
