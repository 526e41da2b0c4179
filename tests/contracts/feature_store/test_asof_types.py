"""Types and times at the edges: what is computed in memory is computed on disk, and DuckDB's session zone changes nothing."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field, RequestSource
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.feature_store.asof_entities import entities_of_sql
from mlops_dagster.resources.feature_store.asof_plan import ViewPlan, entity_rows
from mlops_dagster.resources.feature_store.asof_query import HistoricalQuery
from mlops_dagster.resources.feature_store.asof_settings import Settings
from mlops_dagster.resources.feature_store.asof_source import open_source
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, stamps, with_engine, write

HOUR = 3_600_000_000
WIDE = pa.decimal256(50, 2)
VALUES: dict[str, Any] = {
    "duration": pa.array([5, None], pa.duration("ms")),
    "nanoseconds": pa.array([1001, None], pa.duration("ns")),
    "float16": pa.array([1.5, None], pa.float16()),
    "decimal32": pa.array([Decimal("1.50"), None], pa.decimal32(5, 2)),
    "decimal256": pa.array([Decimal("1.50"), None], WIDE),
    "string_view": pa.array(["a text of more than twelve bytes", None], pa.string_view()),
    "binary_view": pa.array([b"a", None], pa.binary_view()),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None], pa.binary(16))),
    "list of durations": pa.array([[5], None], pa.list_(pa.duration("s"))),
    "list of text views": pa.array([["a"], None], pa.list_(pa.string_view())),
    "struct of decimals": pa.array([{"a": Decimal("1.50")}, None], pa.struct([("a", WIDE)])),
}


def query(path: Path, entities: pa.Table, key: str, feature: str, engine: str) -> HistoricalQuery:
    plan = ViewPlan(
        "v", open_source(file_source(path), None), (("key", key),), "event_timestamp", None, None, ((feature, "out"),)
    )
    return HistoricalQuery(entity_rows(entities), [plan], False, Settings(10**9, 2, None, None, None, None, engine))


def answer(path: Path, keys: Any, key: str, feature: str, engine: str) -> pa.ChunkedArray:
    entities: Any = pa.table([keys, stamps([2 * HOUR] * len(keys))], names=["key", "event_timestamp"])
    assert query(path, entities[:0], key, feature, engine).table().num_rows == 0
    return query(path, entities, key, feature, engine).table()["out"]


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("name", VALUES)
def test_features_of_every_type_come_through(tmp_path: Path, name: str, engine: str) -> None:
    values = VALUES[name]
    path = write(tmp_path / "rows.parquet", id=pa.array([1, 2]), event_timestamp=stamps([HOUR] * 2), value=values)
    found = answer(path, pa.array([3, 2, 1, 1]), "id", "value", engine)
    assert found.to_pylist() == [None, None, *([values[0].as_py()] * 2)]
    if "view" not in name:
        assert found.type == values.type


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("name", [n for n in VALUES if " of " not in n])
def test_keys_of_every_type_join(tmp_path: Path, name: str, engine: str) -> None:
    values = VALUES[name]
    path = write(tmp_path / "rows.parquet", id=values, event_timestamp=stamps([HOUR] * 2), value=pa.array([7, 8]))
    assert answer(path, pa.concat_arrays([values[1:], values[:1]]), "id", "value", engine).to_pylist() == [None, 7]


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_a_whole_number_joins_a_wide_decimal(tmp_path: Path, engine: str) -> None:
    path = write(tmp_path / "rows.parquet", id=pa.array([5, 6]), event_timestamp=stamps([HOUR] * 2), value=pa.array([7, 8]))
    assert answer(path, pa.array([Decimal(6)], WIDE), "id", "value", engine).to_pylist() == [8]


@pytest.mark.parametrize("engine", ["memory", "disk"])
@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_both_zeros_are_one_key_and_nan_is_one(tmp_path: Path, kind: pa.DataType, engine: str) -> None:
    keys = pa.array([-0.0, float("nan")], kind)
    path = write(tmp_path / "rows.parquet", id=keys, event_timestamp=stamps([HOUR] * 2), value=pa.array([7, 8]))
    wanted = pa.array([0.0, -0.0, float("nan"), 1.0], kind)
    assert answer(path, wanted, "id", "value", engine).to_pylist() == [7, 7, 8, None]


@pytest.mark.parametrize("session", ["UTC", "America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize(
    "times",
    [
        stamps([int(1.5 * HOUR)], "us", None),
        stamps([int(1.5 * HOUR)], "us", "UTC"),
        stamps([int(1.5 * HOUR)], "us", "Asia/Kolkata"),
        pa.array(["1970-01-01 01:30:00"]),
        pa.array(["1970-01-01T02:30:00+01:00"]),
    ],
    ids=["no zone", "UTC", "another zone", "text", "text with an offset"],
)
def test_sql_sees_no_future_whatever_the_sessions_zone(tmp_path: Path, session: str, times: pa.Array) -> None:
    moments = stamps([0, HOUR, 2 * HOUR, 8 * HOUR], "us", None)
    path = write(tmp_path / "rows.parquet", id=pa.array([1] * 4), event_timestamp=moments, value=pa.array([0, 1, 2, 8]))
    entities: Any = pa.table({"key": [1], "event_timestamp": times})
    asked = query(path, entities, "id", "value", "memory")
    assert asked.table()["out"].to_pylist() == [1]
    with duckdb.connect() as connection:
        connection.execute(f"SET TimeZone = '{session}'")
        connection.register("entity_df", entities)
        assert connection.sql(asked.sql()).to_arrow_table()["out"].to_pylist() == [1]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    moments = stamps([HOUR, 2 * HOUR])
    path = write(
        tmp_path / "rows.parquet", driver=pa.array([1, 2]), event_timestamp=moments, created=moments, rate=pa.array([1.0, 2.0])
    )
    driver = entity("driver")
    view = FeatureView(
        name="rates", entities=[driver], ttl=timedelta(0), schema=[Field(name="rate", dtype=Float64)], source=file_source(path)
    )
    request = RequestSource(name="request", schema=[Field(name="more", dtype=Float64)])

    @on_demand_feature_view(sources=[view, request], schema=[Field(name="total", dtype=Float64)], mode="pandas")
    def sums(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"total": inputs["rate"] + inputs["more"]})

    return applied(open_store(tmp_path), [driver], [view, sums])


FRAME = pd.DataFrame({"driver": [2, 1], "more": [0.5, 0.25], "event_timestamp": [datetime(2026, 3, 1, tzinfo=UTC)] * 2})


def test_an_entity_query_may_name_a_view_more_than_once(store: FeatureStore) -> None:
    text = (
        "SELECT a.driver, max(b.event_timestamp) AS event_timestamp FROM rates a, rates b "
        "WHERE a.driver IN (SELECT driver FROM rates) GROUP BY 1 ORDER BY 1"
    )
    assert store.get_historical_features(entity_df=text, features=["rates:rate"]).to_arrow()["rate"].to_pylist() == [1.0, 2.0]


@pytest.mark.parametrize("name", VALUES)
def test_an_entity_query_may_read_a_view_with_any_type(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "rows.parquet", id=pa.array([1, 2]), event_timestamp=stamps([HOUR] * 2), value=VALUES[name])
    (plan,) = query(path, pa.table({"key": [1], "event_timestamp": stamps([HOUR])}), "id", "value", "memory").plans
    settings = Settings(10**9, 2, None, None, None, None)
    found = entities_of_sql("SELECT value FROM v WHERE value IS NOT NULL AND id IN (SELECT id FROM v)", [plan], settings)
    assert found.num_rows == 1


@pytest.mark.parametrize("engine", ["memory", "disk"])
def test_an_empty_answer_with_on_demand_features_has_its_columns(store: FeatureStore, tmp_path: Path, engine: str) -> None:
    chosen = with_engine(store, engine=engine)
    whole = chosen.get_historical_features(entity_df=FRAME, features=["sums:total"])
    assert pa.Table.from_batches(whole.to_arrow_batches())["total"].to_pylist() == [2.5, 1.25]
    job = chosen.get_historical_features(entity_df=FRAME[:0], features=["sums:total"])
    (batch,) = job.to_arrow_batches()
    assert (batch.num_rows, batch.schema.names) == (0, job.to_arrow().schema.names)
    job.persist(SavedDatasetFileStorage(str(tmp_path / "empty.parquet")))
    assert pq.read_table(tmp_path / "empty.parquet").column_names == job.to_arrow().column_names


def test_a_temporary_folder_that_is_absent_is_named(store: FeatureStore, tmp_path: Path) -> None:
    chosen = with_engine(store, engine="disk", temp_directory=str(tmp_path / "absent"))
    with pytest.raises(StorageError, match=r"offline_store\.temp_directory '.*absent'.*Create it"):
        chosen.get_historical_features(entity_df=FRAME, features=["rates:rate"]).to_arrow()


def test_a_file_with_a_column_twice_is_named(store: FeatureStore, tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "rows.parquet")
    pq.write_table(table.append_column("rate", table["rate"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet' has more than one column named \['rate'\]"):
        store.get_historical_features(entity_df=FRAME, features=["rates:rate"]).to_arrow()
