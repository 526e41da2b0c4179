"""The retrieval job: runs a query when its answer is asked for, in the form that is asked for."""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.saved_dataset import SavedDatasetStorage

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.feature_store.asof_query import Query, batches_of
from mlops_dagster.resources.feature_store.asof_settings import Settings
from mlops_dagster.resources.feature_store.asof_write import save_dataset

if TYPE_CHECKING:
    from feast.saved_dataset import ValidationReference


class AsofRetrievalJob(RetrievalJob):
    """A query on Parquet that runs when its answer is asked for: as pandas, Arrow, batches, SQL, or files."""

    def __init__(
        self,
        query: Query,
        settings: Settings,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._query = query
        self._settings = settings
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._query.table()

    def to_df(self, validation_reference: "ValidationReference | None" = None, timeout: int | None = None) -> pd.DataFrame:
        """The answer as pandas, held about once: built without an Arrow table between, where nothing has to see that table."""
        if self._on_demand_feature_views or validation_reference is not None or metrics_enabled():
            return self.to_arrow(validation_reference=validation_reference, timeout=timeout).to_pandas(self_destruct=True)
        return self._query.frame()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._query.frame()

    def to_arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """The answer in batches, each as large as fits the memory limit; on-demand features are computed batch by batch.

        An on-demand transformation that looks beyond its row therefore sees one batch only.
        """
        if not self._on_demand_feature_views:
            yield from self._query.batches()
            return
        empty, some = None, False
        for batch in self._query.batches():
            if batch.num_rows:
                some = True
                yield from self._with_on_demand(batch)
            else:
                empty = batch
        if empty is not None and not some:
            yield from self._with_on_demand(empty)

    def _with_on_demand(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        table = OneTable(pa.Table.from_batches([batch]))
        views = self._on_demand_feature_views
        return batches_of(AsofRetrievalJob(table, self._settings, self._full_feature_names, views, self._metadata).to_arrow())

    def to_pandas_batches(self) -> Iterator[pd.DataFrame]:
        """The answer as pandas frames, batch by batch."""
        return (batch.to_pandas() for batch in self.to_arrow_batches())

    def to_sql(self) -> str:
        """The same query for DuckDB; the entity rows of a historical retrieval are the relation `entity_df`."""
        return self._query.sql()

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the answer, batch by batch, to a Parquet file or folder; readers see the old dataset or the new one, never a part.

        Raises `SavedDatasetLocationAlreadyExists` where something is there and `allow_overwrite` is false.
        """
        if not isinstance(storage, SavedDatasetFileStorage):
            raise DataError(f"A saved dataset of this offline store needs SavedDatasetFileStorage, not {type(storage).__name__}.")
        save_dataset(self.to_arrow_batches(), storage.file_options, self._settings.repo_path, allow_overwrite)

    def supports_remote_storage_export(self) -> bool:
        return self._settings.staging_location is not None

    def to_remote_storage(self) -> list[str]:
        """Writes the answer to a new folder under `staging_location`; returns the files' addresses."""
        location = self._settings.staging_location
        if location is None:
            raise DataError("offline_store.staging_location is not set. Set it to a folder or an s3:// address to export there.")
        storage = SavedDatasetFileStorage(
            f"{location.rstrip('/')}/{uuid.uuid4()}", s3_endpoint_override=self._settings.staging_endpoint
        )
        return save_dataset(self.to_arrow_batches(), storage.file_options, self._settings.repo_path, allow_overwrite=False)


def metrics_enabled() -> bool:
    """Whether Feast counts retrievals, which it does in `to_arrow`."""
    from feast import metrics

    return bool(metrics._config.offline_features or metrics._config.audit_logging)


class OneTable:
    """A table that is already there, as a query."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self) -> pa.Table:
        return self._table

    def frame(self) -> pd.DataFrame:
        return self._table.to_pandas()

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield from self._table.to_batches()

    def sql(self) -> str:
        raise NotImplementedError
