"""A Feast offline store on Parquet whose point-in-time join is a sort and a binary search.

Use it in any `feature_store.yaml`:

    offline_store:
      type: mlops_dagster.resources.feature_store.asof.AsofOfflineStore
"""

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import compute_non_entity_date_range
from pydantic import Field, PositiveInt, StrictBool, field_validator

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.feature_store.asof_entities import entities_of_period, entities_of_sql
from mlops_dagster.resources.feature_store.asof_job import AsofRetrievalJob
from mlops_dagster.resources.feature_store.asof_memory import Period
from mlops_dagster.resources.feature_store.asof_plan import EntityRows, check_names, entity_rows, view_plans
from mlops_dagster.resources.feature_store.asof_query import HistoricalQuery, SourceRowsQuery
from mlops_dagster.resources.feature_store.asof_settings import SHARE_OF_MACHINE, Settings, machine_bytes, parse_bytes
from mlops_dagster.resources.feature_store.asof_source import open_source
from mlops_dagster.resources.feature_store.asof_write import append_rows, write_logs


class AsofOfflineStoreConfig(FeastConfigBaseModel):
    """What may stand under `offline_store` in `feature_store.yaml`."""

    type: Literal["mlops_dagster.resources.feature_store.asof.AsofOfflineStore"] = (
        "mlops_dagster.resources.feature_store.asof.AsofOfflineStore"
    )
    as_known_at: StrictBool = Field(
        False, description="Leave out feature rows whose created timestamp is later than the entity row's timestamp."
    )
    memory_limit: str | None = Field(
        None, description="Memory a retrieval may use, such as 4GB; beyond it, it works on disk. Default: 60 % of the machine's."
    )
    engine: Literal["auto", "memory", "disk"] = Field(
        "auto", description="auto: in memory while that fits memory_limit, else on disk. memory, disk: always so."
    )
    threads: PositiveInt | None = Field(None, description="Threads a retrieval may use. Default: one per processor.")
    temp_directory: str | None = Field(
        None, description="Folder for what does not fit memory. Default: the system's temporary folder."
    )
    staging_location: str | None = Field(None, description="Folder or s3:// address under which to_remote_storage() writes.")
    staging_location_endpoint_override: str | None = Field(None, description="S3 endpoint of staging_location.")

    @field_validator("memory_limit")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


class AsofOfflineStore(OfflineStore):
    """Feast offline store over `FileSource` (Parquet files, folders of them, `s3://`)."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """The features of each entity row as of its time; the answer keeps the entity rows' order and number.

        `entity_df` is a DataFrame, an Arrow table, a DuckDB query (each feature view's source is a table of the view's name), or None for
        every (join keys, event time) that the sources hold from `start_date` to `end_date`. Raises `DataError` for unusable rows or files.
        """
        settings = resolved(config)
        plans = view_plans(feature_views, feature_refs, registry, project, full_feature_names, config.repo_path)
        entities = _entities(entity_df, plans, feature_views, settings, start_date, end_date)
        check_names(entities, plans)
        moments = entities.table[entities.timestamp]
        limits = pc.min_max(moments).as_py()  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        return AsofRetrievalJob(
            HistoricalQuery(entities, plans, filter_by_created_timestamp or options_of(config).as_known_at, settings),
            settings,
            full_feature_names,
            OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entities.table.column_names if name != entities.timestamp],
                min_event_timestamp=limits["min"],
                max_event_timestamp=limits["max"],
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """The latest row of each key from `start_date` to `end_date`, both included."""
        period, names = (
            Period(start_date, end_date),
            (join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column),
        )
        return _source_job(config, data_source, *names, period, latest_only=True)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """All rows from `start_date` to `end_date`, both included, in the files' order."""
        period, names = (
            Period(start_date, end_date),
            (join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column),
        )
        return _source_job(config, data_source, *names, period, latest_only=False)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Adds rows to the source of a feature view; the columns must be the source's, in its order, and their values fit its types."""
        source = feature_view.batch_source
        opened = open_source(source, config.repo_path, feature_view.name)
        columns = opened.schema.names
        assert isinstance(source, FileSource)
        if table.column_names == [opened.field_mapping.get(c, c) for c in columns]:
            table = table.rename_columns(columns)
        if columns != table.column_names:
            raise DataError(
                f"The rows for feature view {feature_view.name!r} have the columns {table.column_names}, but {source.path!r} has {columns}. "
                "Give exactly these, in this order."
            )
        append_rows(source, table, opened.schema, config.repo_path)
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig, data: pa.Table | Path, source: LoggingSource, logging_config: LoggingConfig, registry: BaseRegistry
    ) -> None:
        """Adds a chunk of logged features to the folder of a `FileLoggingDestination`."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise DataError(
                f"Logged features go to a FileLoggingDestination with this offline store, not {type(destination).__name__}."
            )
        write_logs(data, destination, config.repo_path)


def options_of(config: RepoConfig) -> AsofOfflineStoreConfig:
    options = config.offline_store
    if not isinstance(options, AsofOfflineStoreConfig):
        raise DataError(
            f"offline_store is configured by a {type(options).__name__}. Set its type to {__name__}.AsofOfflineStore."
        )
    return options


def resolved(config: RepoConfig) -> Settings:
    options = options_of(config)
    return Settings(
        memory_limit_bytes=parse_bytes(options.memory_limit) if options.memory_limit else int(SHARE_OF_MACHINE * machine_bytes()),
        threads=options.threads or len(os.sched_getaffinity(0)),
        temp_directory=options.temp_directory,
        staging_location=options.staging_location,
        staging_endpoint=options.staging_location_endpoint_override,
        repo_path=str(config.repo_path) if config.repo_path else None,
        engine=options.engine,
    )


def _entities(
    entity_df: Any, plans: Any, views: list[FeatureView], settings: Settings, start: datetime | None, end: datetime | None
) -> EntityRows:
    if entity_df is None:
        return entities_of_period(
            plans, Period(*compute_non_entity_date_range(views, start_date=start, end_date=end)), settings.threads
        )
    if isinstance(entity_df, str):
        return entity_rows(entities_of_sql(entity_df, plans, settings))
    return entity_rows(entity_df)


def _source_job(
    config: RepoConfig,
    data_source: DataSource,
    join_keys: list[str],
    features: list[str],
    timestamp: str,
    created: str | None,
    period: Period,
    latest_only: bool,
) -> RetrievalJob:
    settings = resolved(config)
    source = open_source(data_source, config.repo_path)
    for name in [*join_keys, *features, timestamp, *([created] if created else [])]:
        source.required(name)
    source.in_every_file([*join_keys, timestamp, *([created] if created else [])])
    return AsofRetrievalJob(
        SourceRowsQuery(source, join_keys, features, timestamp, created or None, period, latest_only, settings), settings
    )
