"""The three things that Feast asks of an offline store, each as a query that can be run whole or in batches."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import pandas as pd
import pyarrow as pa
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL

from mlops_dagster.resources.feature_store import asof_memory
from mlops_dagster.resources.feature_store.asof_disk import historical_batches, source_sql, standalone_sql
from mlops_dagster.resources.feature_store.asof_memory import Period
from mlops_dagster.resources.feature_store.asof_plan import EntityRows, ViewPlan
from mlops_dagster.resources.feature_store.asof_settings import Settings
from mlops_dagster.resources.feature_store.asof_source import ParquetSource
from mlops_dagster.resources.feature_store.asof_time import in_utc


class Query(Protocol):
    """What a retrieval job runs."""

    def table(self) -> pa.Table: ...

    def frame(self) -> pd.DataFrame: ...

    def batches(self) -> Iterator[pa.RecordBatch]: ...

    def sql(self) -> str: ...


@dataclass(frozen=True)
class SourceRowsQuery:
    """All rows of a source in a period, or the latest of each key (`latest_only`), with the named columns."""

    source: ParquetSource
    join_keys: list[str]
    features: list[str]
    timestamp: str
    created: str | None
    period: Period
    latest_only: bool
    settings: Settings
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        times = [self.timestamp, *([self.created] if self.created else [])]
        wanted = [*self.join_keys, *self.features, *times] if self.features else self.source.schema.names
        object.__setattr__(self, "columns", list(dict.fromkeys(wanted)))

    def table(self) -> pa.Table:
        threads = self.settings.threads
        source = self.source.within(self.timestamp, self.period.range("us"))
        if not self.latest_only:
            return self.finished(
                asof_memory.in_period(source.read(self.columns, threads), self.timestamp, self.period, source.location)
            )
        rows = asof_memory.latest(source, self.join_keys, self.timestamp, self.created, self.period, threads)
        with ThreadPoolExecutor(threads) as pool:
            return self.finished(pa.table(asof_memory.gather(source, self.columns, rows, pool), names=self.columns))

    def batches(self) -> Iterator[pa.RecordBatch]:
        if self.latest_only:
            yield from batches_of(self.table())
            return
        source = self.source.within(self.timestamp, self.period.range("us"))
        for batch in source.batches(self.columns):
            part = asof_memory.in_period(pa.Table.from_batches([batch]), self.timestamp, self.period, source.location)
            yield from batches_of(self.finished(part))
        if not source.rows:
            yield from batches_of(self.table())

    def sql(self) -> str:
        return source_sql(self.source, self.columns, self.join_keys, self.timestamp, self.created, self.period, self.latest_only)

    def frame(self) -> pd.DataFrame:
        return self.table().to_pandas(self_destruct=True)

    def finished(self, table: pa.Table) -> pa.Table:
        for name in (self.timestamp, self.created):
            if name and pa.types.is_timestamp(table.schema.field(name).type):
                table = table.set_column(table.column_names.index(name), name, in_utc(table[name]))
        if self.join_keys or DUMMY_ENTITY_ID in table.column_names:
            return table
        return table.append_column(DUMMY_ENTITY_ID, pa.repeat(pa.scalar(DUMMY_ENTITY_VAL), table.num_rows))


@dataclass(frozen=True)
class HistoricalQuery:
    """The features of all views for every entity row, in memory while that fits the limit, else on disk."""

    entities: EntityRows
    plans: list[ViewPlan]
    as_known: bool
    settings: Settings

    @property
    def on_disk(self) -> bool:
        if self.settings.engine != "auto":
            return self.settings.engine == "disk"
        return asof_memory.needed_bytes(self.entities, self.plans, self.settings.threads) > self.settings.memory_limit_bytes

    def table(self) -> pa.Table:
        if self.on_disk:
            return pa.Table.from_batches(self.batches())
        return asof_memory.historical(self.entities, self.plans, self.as_known, self.settings.threads)

    def frame(self) -> pd.DataFrame:
        if self.on_disk:
            return self.table().to_pandas(self_destruct=True)
        return asof_memory.historical_frame(self.entities, self.plans, self.as_known, self.settings.threads)

    def batches(self) -> Iterator[pa.RecordBatch]:
        if self.on_disk:
            yield from historical_batches(self.entities, self.plans, self.as_known, self.settings)
        else:
            yield from batches_of(self.table())

    def sql(self) -> str:
        return standalone_sql(self.entities, self.plans, self.as_known)


def batches_of(table: pa.Table) -> list[pa.RecordBatch]:
    """The table's batches; one without rows where it has none, so that its columns are known."""
    return table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
