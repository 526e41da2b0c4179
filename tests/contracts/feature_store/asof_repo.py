"""A Feast repository over Parquet files in a temporary folder, with our offline store or another."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, FileSource, RepoConfig, ValueType

ASOF = "mlops_dagster.resources.feature_store.asof.AsofOfflineStore"


def open_store(folder: Path, offline_store: Any = ASOF, **options: Any) -> FeatureStore:
    """A store in `folder` whose offline store is of the given type, with the given options."""
    folder.mkdir(parents=True, exist_ok=True)
    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": offline_store, **options},
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    return FeatureStore(config=config)


def with_engine(store: FeatureStore, **options: Any) -> FeatureStore:
    """The same repository, registry included, with other options of the offline store."""
    return open_store(Path(str(store.config.repo_path)), **options)


def entity(name: str, kind: ValueType = ValueType.INT64) -> Entity:
    return Entity(name=name, join_keys=[name], value_type=kind)


def file_source(path: Path | str, created: bool = True, **options: Any) -> FileSource:
    return FileSource(
        path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created" if created else "", **options
    )


def write(path: Path, **columns: Any) -> Path:
    """A Parquet file of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def stamps(values: list[int | None], unit: str = "us", zone: str | None = "UTC") -> pa.Array:
    return pa.array(values, pa.timestamp(unit, zone))


def applied(store: FeatureStore, entities: list[Entity], views: list[Any]) -> FeatureStore:
    store.apply([*entities, *views])
    return store


__all__ = ["ASOF", "FeatureView", "applied", "entity", "file_source", "open_store", "stamps", "with_engine", "write"]
