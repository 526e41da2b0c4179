"""Folders named `key=value`: their keys are columns, the same in memory, on disk and in the SQL."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field
from feast.types import Int64, String

from mlops_dagster.core.errors import DataError
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, stamps, with_engine, write

HOUR = 3_600_000_000
ENTITIES: Any = pa.table({"driver": [4, 3, 2, 1], "event_timestamp": stamps([2 * HOUR] * 4)})
FEATURES = ("trips", "town", "year")


def rows(drivers: list[int], **columns: Any) -> dict[str, Any]:
    moments = stamps([HOUR] * len(drivers))
    return {
        "driver": pa.array(drivers),
        "event_timestamp": moments,
        "created": moments,
        "trips": pa.array([10 * d for d in drivers]),
        **columns,
    }


def partitioned(folder: Path, table: pa.Table, **kinds: pa.DataType) -> None:
    scheme = pads.partitioning(pa.schema(list(kinds.items())), flavor="hive")
    pads.write_dataset(table, folder, format="parquet", partitioning=scheme, existing_data_behavior="overwrite_or_ignore")


def view_of(folder: Path, features: tuple[str, ...] = FEATURES) -> FeatureStore:
    driver = entity("driver")
    schema = [Field(name=f, dtype=String if f == "town" else Int64) for f in features]
    view = FeatureView(name="v", entities=[driver], ttl=timedelta(0), schema=schema, source=file_source(folder))
    return applied(open_store(folder.parent), [driver], [view])


def answers(store: FeatureStore, features: tuple[str, ...] = FEATURES) -> list[dict[str, Any]]:
    """The features of each entity row, after a check that memory, disk and SQL give the same."""
    found = []
    for engine in ("memory", "disk"):
        job = with_engine(store, engine=engine).get_historical_features(
            entity_df=ENTITIES, features=[f"v:{name}" for name in features]
        )
        found.append(job.to_arrow().select(list(features)).to_pylist())
    with duckdb.connect() as connection:
        connection.register("entity_df", ENTITIES)
        found.append(connection.sql(job.to_sql()).to_arrow_table().select(list(features)).to_pylist())
    assert found[0] == found[1] == found[2]
    return found[0]


def test_values_are_decoded_null_is_null_and_whole_numbers_are_integers(tmp_path: Path) -> None:
    table = pa.table(rows([1, 2, 3], town=pa.array(["a b", "c/d=%25", None]), year=pa.array([2020, 2021, -3])))
    partitioned(tmp_path / "d", table, town=pa.string(), year=pa.int32())
    assert [tuple(a.values()) for a in answers(view_of(tmp_path / "d"))] == [
        (None, None, None),
        (30, None, -3),
        (20, "c/d=%25", 2021),
        (10, "a b", 2020),
    ]


def test_a_join_key_may_be_a_folder(tmp_path: Path) -> None:
    partitioned(tmp_path / "d", pa.table(rows([1, 2, 3])), driver=pa.int64())
    assert [a["trips"] for a in answers(view_of(tmp_path / "d", ("trips",)), ("trips",))] == [None, 30, 20, 10]


def test_one_value_that_is_no_whole_number_makes_the_key_text(tmp_path: Path) -> None:
    partitioned(tmp_path / "d", pa.table(rows([1, 2], town=["7", "007a"])), town=pa.string())
    partitioned(tmp_path / "d" / "more", pa.table(rows([3], town=["9" * 30])), town=pa.string())
    assert [a["town"] for a in answers(view_of(tmp_path / "d", ("town",)), ("town",))] == [None, "9" * 30, "007a", "7"]


def test_a_key_that_is_declared_to_be_text_keeps_its_zeros(tmp_path: Path) -> None:
    partitioned(tmp_path / "d", pa.table(rows([1, 2], town=["01234", "7"])), town=pa.string())
    assert [a["town"] for a in answers(view_of(tmp_path / "d", ("town",)), ("town",))] == [None, None, "7", "01234"]


def test_files_beside_the_folders_and_files_that_hold_the_column_are_read_alike(tmp_path: Path) -> None:
    partitioned(tmp_path / "d", pa.table(rows([1], year=[2020], town=["a'b"])), year=pa.int64(), town=pa.string())
    partitioned(tmp_path / "d", pa.table(rows([2], year=[2021])), year=pa.int64())
    write(tmp_path / "d" / "root.parquet", **rows([3], year=pa.array([2022])))
    assert [(a["trips"], a["town"], a["year"]) for a in answers(view_of(tmp_path / "d"))] == [
        (None, None, None),
        (30, None, 2022),
        (20, None, 2021),
        (10, "a'b", 2020),
    ]


@pytest.mark.parametrize("column", ["driver", "event_timestamp", "created"])
def test_a_file_without_a_key_or_a_time_is_named(tmp_path: Path, column: str) -> None:
    write(tmp_path / "d" / "a.parquet", **rows([1]))
    store = view_of(tmp_path / "d", ("trips",))
    lacking = {name: values for name, values in rows([2]).items() if name != column}
    pq.write_table(pa.table(lacking), tmp_path / "d" / "b.parquet")
    with pytest.raises(DataError, match=rf"b\.parquet' has no column '{column}'.*Add the column"):
        answers(store, ("trips",))
    offline, view = store._get_provider().offline_store, store.get_feature_view("v")
    with pytest.raises(DataError, match=r"b\.parquet' has no column"):
        offline.pull_latest_from_table_or_query(
            store.config, view.batch_source, ["driver"], ["trips"], "event_timestamp", "created"
        )
    pq.write_table(pa.table(lacking)[:0], tmp_path / "d" / "b.parquet")
    assert [a["trips"] for a in answers(store, ("trips",))] == [None, None, None, 10]


def test_the_case_of_a_file_name_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", **rows([1]))
    write(tmp_path / "d" / "b.PARQUET", **rows([2]))
    assert [a["trips"] for a in answers(view_of(tmp_path / "d", ("trips",)), ("trips",))] == [None, None, 20, 10]
