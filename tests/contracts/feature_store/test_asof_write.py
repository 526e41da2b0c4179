"""Writes that are refused or fail leave what was there; what is written can be read."""

import math
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination
from feast.types import Int64

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.feature_store.asof import AsofOfflineStore
from mlops_dagster.resources.feature_store.asof_source import open_source
from mlops_dagster.resources.feature_store.asof_write import parquet_at, replace_folder
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, write

AT = datetime(2026, 3, 1, tzinfo=UTC)


class FaultyStore(fsspec.implementations.local.LocalFileSystem):
    """A file system that, as an object store, cannot swap folders, and in which one kind of request fails."""

    cachable = False

    def __init__(self, refused: str) -> None:
        super().__init__()
        self.refused = refused

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        if self.refused == "move":
            raise OSError("move refused")
        super().mv(path1, path2, **options)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        if self.refused == "delete" and Path(path).name == "old.parquet":
            raise OSError("delete refused")
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


@pytest.mark.parametrize("refused", ["move", "delete", ""])
def test_a_folder_of_an_object_store_is_never_without_a_dataset(tmp_path: Path, refused: str) -> None:
    folder = tmp_path / "saved"
    write(folder / "old.parquet", a=pa.array([1]))
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(FaultyStore(refused)))
    batches = iter([pa.record_batch({"a": [2]})])
    old = parquet_at(filesystem, str(folder))
    if refused:
        with pytest.raises(StorageError, match=f"{refused} refused"):
            replace_folder(batches, filesystem, str(folder), old)
    else:
        assert replace_folder(batches, filesystem, str(folder), old) == parquet_at(filesystem, str(folder))
    found = sorted(pq.read_table(name)["a"].to_pylist() for name in parquet_at(filesystem, str(folder)))
    assert found == {"move": [[1]], "delete": [[1], [2]], "": [[2]]}[refused]


def test_a_local_place_that_cannot_be_written_to_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot write.*permissions"):
        replace_folder(iter([pa.record_batch({"a": [2]})]), pafs.LocalFileSystem(), str(tmp_path / "file" / "saved"), [])


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    driver = entity("driver")
    rows = pa.table({"driver": [1], "event_timestamp": [AT], "created": [AT], "trips": [10]})
    for path in ("folder/a.parquet", "file.parquet"):
        write(tmp_path / path, **{name: rows[name] for name in rows.column_names})
    views = [
        FeatureView(
            name=name,
            entities=[driver],
            ttl=timedelta(0),
            schema=[Field(name="trips", dtype=Int64)],
            source=file_source(tmp_path / path),
        )
        for name, path in (("folder", "folder"), ("file", "file.parquet"))
    ]
    return applied(open_store(tmp_path), [driver], views)


def add(store: FeatureStore, view: str, **columns: Any) -> None:
    given = {"driver": [2], "event_timestamp": [AT], "created": [AT], "trips": [20], **columns}
    AsofOfflineStore.offline_write_batch(store.config, store.get_feature_view(view), pa.table(given), None)


def trips(store: FeatureStore, view: str) -> tuple[pa.DataType, list[Any]]:
    rows = pd.DataFrame({"driver": [1, 2], "event_timestamp": [AT] * 2})
    found = store.get_historical_features(entity_df=rows, features=[f"{view}:trips"]).to_arrow()["trips"]
    return found.type, found.to_pylist()


@pytest.mark.parametrize("view", ["folder", "file"])
@pytest.mark.parametrize(("column", "value"), [("driver", "x"), ("trips", 2.5), ("event_timestamp", "soon"), ("trips", [1])])
def test_rows_that_do_not_fit_the_sources_types_are_refused(store: FeatureStore, view: str, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"Column '{column}' is .* cannot become") as failure:
        add(store, view, **{column: [value]})
    assert "whole Parquet file" not in str(failure.value)
    assert trips(store, view) == (pa.int64(), [10, None])


@pytest.mark.parametrize("view", ["folder", "file"])
def test_rows_of_a_kindred_type_are_written_in_the_sources(store: FeatureStore, view: str) -> None:
    add(store, view, trips=[20.0], created=[AT.replace(tzinfo=None)])
    assert trips(store, view) == (pa.int64(), [10, 20])


def test_values_that_files_cannot_share_are_no_damage(store: FeatureStore, tmp_path: Path) -> None:
    moments = pa.array([AT])
    write(
        tmp_path / "folder" / "b.parquet",
        driver=pa.array([2]),
        event_timestamp=moments,
        created=moments,
        trips=pa.array([2**63 + 1], pa.uint64()),
    )
    source = open_source(store.get_feature_view("folder").batch_source, tmp_path)
    for read in (lambda: source.read(["trips"], 1), lambda: list(source.batches(["trips"]))):
        with pytest.raises(DataError, match=r"Column 'trips' is uint64 and cannot become int64.*b\.parquet"):
            read()


LOGS: Any = pa.table(
    {
        "score": pa.array([1.5, math.nan, None, 2.0, math.nan, -0.0]),
        "town": pa.array(["a/b", "..", "x/../../../evil", None, "", "a/b"]),
        "day": pa.array([date(2026, 3, 1)] * 6),
        "number": list(range(6)),
        "at": [AT] * 6,
    }
)


@pytest.mark.parametrize("columns", [["score"], ["town"], ["day", "town"], ["number"]])
def test_every_logged_row_is_kept_below_the_folder(store: FeatureStore, tmp_path: Path, columns: list[str]) -> None:
    before = set(tmp_path.rglob("*.parquet"))
    folder = tmp_path / "deep" / "logs"
    destination = FileLoggingDestination(path=str(folder), partition_by=columns)
    AsofOfflineStore.write_logged_features(store.config, LOGS, None, LoggingConfig(destination=destination), store.registry)
    written = set(tmp_path.rglob("*.parquet")) - before
    assert {len(p.relative_to(folder).parts) for p in written} == {len(columns) + 1}
    assert pads.dataset(folder, partitioning="hive", format="parquet").count_rows() == 6
    source = open_source(destination.to_data_source(), None)
    found = source.read(["number", columns[-1]], 1).sort_by("number")
    assert found["number"].to_pylist() == list(range(6))
    if columns[-1] == "town":
        assert found["town"].to_pylist() == LOGS["town"].to_pylist()
    if columns == ["score"]:
        assert found["score"].to_pylist() == ["1.5", "nan", None, "2.0", "nan", "-0.0"]


def test_a_partition_column_that_is_not_logged_is_named(store: FeatureStore, tmp_path: Path) -> None:
    destination = LoggingConfig(destination=FileLoggingDestination(path=str(tmp_path / "logs"), partition_by=["hour"]))
    with pytest.raises(DataError, match="no column 'hour' of partition_by"):
        AsofOfflineStore.write_logged_features(store.config, LOGS, None, destination, store.registry)
