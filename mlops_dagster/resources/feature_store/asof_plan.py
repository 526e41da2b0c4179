"""What a historical retrieval asks for, in our own terms: entity rows, and per feature view its source, keys, times and columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.offline_stores.offline_utils import DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
from feast.infra.registry.base_registry import BaseRegistry
from feast.types import String
from feast.utils import _get_requested_feature_views_to_features_dict, _get_requested_on_demand_feature_views

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.feature_store.asof_source import ParquetSource, open_source
from mlops_dagster.resources.feature_store.asof_time import in_utc, time_unit, times


@dataclass(frozen=True)
class EntityRows:
    """The rows to complete, in the caller's order; `table[timestamp]` has no null and the zone UTC.

    `given` is the type in which the caller's column has the times.
    """

    table: pa.Table
    timestamp: str
    given: pa.DataType = field(default_factory=lambda: pa.timestamp("us", "UTC"))

    @property
    def unit(self) -> str:
        return self.table.schema.field(self.timestamp).type.unit

    @property
    def moments(self) -> np.ndarray:
        return times(self.table[self.timestamp], self.timestamp, "the entity rows")


@dataclass(frozen=True)
class ViewPlan:
    """One feature view to join. `join_keys` are (entity column, source column), `features` (source column, name in the answer).

    `ttl` None means that no feature is too old (Feast's ttl of 0 or none).
    """

    name: str
    source: ParquetSource
    join_keys: tuple[tuple[str, str], ...]
    timestamp: str
    created: str | None
    ttl: timedelta | None
    features: tuple[tuple[str, str], ...]

    @property
    def index_columns(self) -> list[str]:
        return [*(source for _, source in self.join_keys), self.timestamp, *([self.created] if self.created else [])]

    @property
    def units(self) -> list[str]:
        schema = self.source.schema
        return [time_unit(schema.field(c).type, c, self.source.location) for c in (self.timestamp, self.created) if c]


def entity_rows(frame: Any) -> EntityRows:
    """The entity rows of a pandas DataFrame or an Arrow table. Raises `DataError` for a missing, null or unreadable event timestamp."""
    table = frame if isinstance(frame, pa.Table) else frame_to_arrow(frame)
    twice = [name for name, n in Counter(table.column_names).items() if n > 1]
    if twice:
        raise DataError(f"The entity rows have more than one column named {twice}. Rename them.")
    timestamp = timestamp_column(table.schema)
    column = as_timestamps(table[timestamp], timestamp)
    if column.null_count:
        first = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(
            f"{timestamp!r} is null in {column.null_count} of {len(column)} entity rows (the first is row {first}). "
            "A feature's value needs a time: fill it in, or drop those rows."
        )
    given = table.schema.field(timestamp).type
    return EntityRows(table.set_column(table.column_names.index(timestamp), timestamp, in_utc(column)), timestamp, given)


def frame_to_arrow(frame: pd.DataFrame) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"The entity frame cannot be read as a table: {error}. Give each column values of one type.") from error


def timestamp_column(schema: pa.Schema) -> str:
    """`event_timestamp`, or the one column of a timestamp type, as Feast chooses it."""
    if DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL in schema.names:
        return DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL
    found = [f.name for f in schema if pa.types.is_timestamp(f.type)]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"The entity rows have no column {DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL!r} and {len(found)} timestamp columns {found}; "
        f"the columns are {schema.names}. Name the time of each row {DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL!r}."
    )


def as_timestamps(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Timestamps as they are; dates and ISO text as timestamps, with UTC where they name no zone."""
    if pa.types.is_timestamp(column.type):
        return column
    if pa.types.is_date(column.type):
        return column.cast(pa.timestamp("ms"))
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        raise DataError(
            f"{name!r} of the entity rows is of type {column.type}, not a timestamp. Convert it with pandas.to_datetime."
        )
    try:
        parsed = pd.to_datetime(column.to_pandas(), utc=True, format="ISO8601")
    except ValueError as error:
        raise DataError(f"{name!r} of the entity rows holds text that is no ISO 8601 time: {error}.") from error
    return pa.chunked_array([pa.array(parsed, from_pandas=True)])


def view_plans(
    feature_views: Sequence[FeatureView],
    feature_refs: list[str],
    registry: BaseRegistry,
    project: str,
    full_feature_names: bool,
    repo_path: Path | str | None,
) -> list[ViewPlan]:
    """One plan per feature view that `feature_refs` names, in their order."""
    on_demand = _get_requested_on_demand_feature_views(feature_refs, project, registry)
    requested, _ = _get_requested_feature_views_to_features_dict(feature_refs, list(feature_views), on_demand)
    return [view_plan(view, list(dict.fromkeys(features)), full_feature_names, repo_path) for view, features in requested.items()]


def view_plan(view: FeatureView, features: list[str], full_feature_names: bool, repo_path: Path | str | None) -> ViewPlan:
    text = frozenset(column.name for column in (*view.entity_columns, *view.features) if column.dtype == String)
    source = replace(open_source(view.batch_source, repo_path, view.name), text=text)
    batch = view.batch_source
    assert batch is not None
    prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
    purpose = f"of feature view {view.name!r}"
    keys = [c.name for c in view.entity_columns if c.name != DUMMY_ENTITY_ID]
    created = batch.created_timestamp_column
    plan = ViewPlan(
        name=view.name,
        source=source,
        join_keys=tuple((view.projection.join_key_map.get(k, k), source.column(k, f"join key {purpose}")) for k in keys),
        timestamp=source.column(batch.timestamp_field, f"timestamp_field {purpose}"),
        created=source.column(created, f"created_timestamp_column {purpose}") if created else None,
        ttl=view.ttl or None,
        features=tuple((source.column(f, f"feature {purpose}"), prefix + f) for f in features),
    )
    assert plan.units
    source.in_every_file(plan.index_columns)
    return plan


def check_names(entities: EntityRows, plans: Sequence[ViewPlan]) -> None:
    """Raises `DataError` for a join key that the entity rows lack, or an answer column that would come twice."""
    present = entities.table.column_names
    for plan in plans:
        missing = [key for key, _ in plan.join_keys if key not in present]
        if missing:
            raise DataError(
                f"The entity rows lack {missing}, join keys of feature view {plan.name!r}; they have {present}. Add them."
            )
    names = Counter([*present, *(name for plan in plans for _, name in plan.features)])
    twice = sorted(name for name, n in names.items() if n > 1)
    if twice:
        raise DataError(
            f"The answer would have more than one column named {twice}. Use full_feature_names=True, rename a view with `with_name`, "
            "or drop the column from the entity rows."
        )
