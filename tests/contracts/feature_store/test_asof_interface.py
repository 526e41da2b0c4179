"""Everything else that Feast asks of an offline store, through Feast's own `FeatureStore`."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import BatchFeatureView, FeatureService, FeatureStore, FeatureView, Field, RequestSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64

from tests.contracts.feature_store.asof_repo import ASOF, applied, entity, file_source, open_store, with_engine

DAY = datetime(2026, 3, 1, tzinfo=UTC)


def at(hours: float) -> pd.Timestamp:
    return pd.Timestamp(DAY) + pd.Timedelta(hours=hours)


DRIVERS = pd.DataFrame(
    {
        "driver": [1, 1, 1, 2, 2],
        "event_timestamp": [at(1), at(2), at(2), at(1), at(5)],
        "created": [at(1), at(2), at(3), at(1), at(5)],
        "trips": [10, 20, 21, 30, 50],
        "rate_raw": [0.1, 0.2, 0.21, 0.3, 0.5],
    }
)
PLACES = pd.DataFrame({"place": [7, 8], "event_timestamp": [at(0), at(0)], "created": [at(0), at(0)], "heat": [70.0, 80.0]})
ROWS = pd.DataFrame(
    {
        "driver": [2, 1, 1, 3, 1],
        "origin": [7, 8, 7, 7, 7],
        "target": [8, 7, 8, 8, 8],
        "event_timestamp": [at(6), at(2), at(1), at(9), at(1)],
        "asked": [1, 2, 3, 4, 5],
    }
)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    DRIVERS.to_parquet(tmp_path / "drivers.parquet", index=False)
    (tmp_path / "places").mkdir()
    PLACES[:1].to_parquet(tmp_path / "places" / "one.parquet", index=False)
    PLACES[1:].to_parquet(tmp_path / "places" / "two.parquet", index=False)
    driver, place = entity("driver"), entity("place")
    trips = FeatureView(
        name="trips",
        entities=[driver],
        ttl=timedelta(hours=3),
        schema=[Field(name="trips", dtype=Int64), Field(name="rate", dtype=Float64)],
        source=file_source("drivers.parquet", field_mapping={"rate_raw": "rate"}),
    )
    heat = BatchFeatureView(
        name="heat", entities=[place], ttl=timedelta(0), schema=[Field(name="heat", dtype=Float64)], source=file_source("places")
    )
    request = RequestSource(name="request", schema=[Field(name="asked", dtype=Int64)])

    @on_demand_feature_view(sources=[trips, request], schema=[Field(name="together", dtype=Int64)], mode="pandas")
    def total(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"together": inputs["trips"].fillna(0).astype("int64") + inputs["asked"]})

    origin = heat.with_name("origin").with_join_key_map({"place": "origin"})
    target = heat.with_name("target").with_join_key_map({"place": "target"})
    service = FeatureService(name="ride", features=[trips, origin, target, total])
    return applied(open_store(tmp_path), [driver, place], [trips, heat, total, service])


@pytest.fixture(params=["memory", "disk"])
def either(request: pytest.FixtureRequest, store: FeatureStore) -> FeatureStore:
    return with_engine(store, engine=request.param)


def history(store: FeatureStore, **options: Any) -> Any:
    return store.get_historical_features(entity_df=ROWS, features=store.get_feature_service("ride"), **options)


def test_feature_store_yaml_names_the_store_by_its_class(tmp_path: Path) -> None:
    text = f"project: p\nprovider: local\nregistry: r.db\nentity_key_serialization_version: 3\noffline_store: {{type: {ASOF}, threads: 1}}\n"
    (tmp_path / "feature_store.yaml").write_text(text)
    config = FeatureStore(repo_path=str(tmp_path)).config.offline_store
    assert (type(config).__name__, config.as_known_at, config.threads) == ("AsofOfflineStoreConfig", False, 1)


def test_join_key_maps_field_mapping_ttl_and_on_demand_features_together(either: FeatureStore) -> None:
    answer = history(either, full_feature_names=True).to_df()
    assert list(answer["asked"]) == [1, 2, 3, 4, 5]
    assert answer["trips__trips"].tolist()[:3] == [50, 21, 10]
    assert answer["trips__rate"].tolist()[:3] == [0.5, 0.21, 0.1]
    assert pd.isna(answer["trips__trips"][3])
    assert list(answer["origin__heat"]) == [70.0, 80.0, 70.0, 70.0, 70.0]
    assert list(answer["target__heat"]) == [80.0, 70.0, 80.0, 80.0, 80.0]
    assert list(answer["total__together"]) == [51, 23, 13, 4, 15]


def test_as_known_at_is_off_by_default_and_leaves_out_late_rows_when_on(store: FeatureStore) -> None:
    def trips(chosen: FeatureStore, **options: Any) -> list[Any]:
        frame = ROWS[["driver", "event_timestamp"]]
        return (
            chosen.get_historical_features(entity_df=frame, features=["trips:trips"], **options).to_arrow()["trips"].to_pylist()
        )

    assert trips(store) == [50, 21, 10, None, 10]
    late_left_out = [50, 20, 10, None, 10]
    assert trips(store, filter_by_created_timestamp=True) == late_left_out
    assert trips(with_engine(store, as_known_at=True)) == late_left_out
    assert trips(with_engine(store, as_known_at=True, engine="disk")) == late_left_out


def test_batches_hold_what_the_table_holds(either: FeatureStore) -> None:
    job = history(either, full_feature_names=True)
    assert pa.Table.from_batches(list(job.to_arrow_batches())).equals(job.to_arrow())
    assert pd.concat(list(job.to_pandas_batches()), ignore_index=True).equals(job.to_df())


def test_sql_gives_the_same_answer_in_duckdb(store: FeatureStore) -> None:
    features = ["trips:trips", "trips:rate"]
    for chosen in (store, with_engine(store, as_known_at=True)):
        job = chosen.get_historical_features(entity_df=ROWS, features=features)
        with duckdb.connect() as connection:
            connection.register("entity_df", pa.Table.from_pandas(ROWS))
            rows = connection.sql(job.to_sql()).fetchall()
        expected = job.to_arrow().select(["asked", *features_of(features)]).to_pylist()
        assert [row[-3:] for row in rows] == [tuple(row.values()) for row in expected]


def features_of(references: list[str]) -> list[str]:
    return [reference.split(":")[1] for reference in references]


def test_entity_rows_from_a_query_and_from_arrow(either: FeatureStore) -> None:
    query = "SELECT driver, event_timestamp + INTERVAL 30 MINUTE AS event_timestamp FROM trips WHERE trips <> 20 ORDER BY ALL"
    answer = either.get_historical_features(entity_df=query, features=["trips:trips"]).to_arrow()
    assert answer["driver"].to_pylist() == [1, 1, 2, 2]
    assert answer["trips"].to_pylist() == [10, 21, 30, 50]
    table: Any = answer.select(["driver", "event_timestamp"])
    assert either.get_historical_features(entity_df=table, features=["trips:trips"]).to_arrow().equals(answer)


def test_entity_query_reads_files_relative_to_the_repository(store: FeatureStore) -> None:
    query = "SELECT driver, event_timestamp FROM 'drivers.parquet' WHERE driver = 2"
    assert store.get_historical_features(entity_df=query, features=["trips:trips"]).to_arrow()["trips"].to_pylist() == [30, 50]


def test_without_entity_rows_every_key_and_time_of_the_period_is_a_row(either: FeatureStore) -> None:
    job = either.get_historical_features(features=["trips:trips"], start_date=DAY, end_date=DAY + timedelta(hours=2))
    answer = job.to_df().sort_values(["driver", "event_timestamp"])
    assert answer[["driver", "trips"]].to_numpy().tolist() == [[1, 10], [1, 21], [2, 30]]


def test_metadata_says_what_was_asked(store: FeatureStore) -> None:
    metadata = store.get_historical_features(entity_df=ROWS, features=["trips:trips"]).metadata
    assert metadata.features == ["trips:trips"]
    assert sorted(metadata.keys) == ["asked", "driver", "origin", "target"]
    assert (metadata.min_event_timestamp, metadata.max_event_timestamp) == (at(1), at(9))


def test_saved_dataset_is_written_read_back_and_not_overwritten_unasked(either: FeatureStore, tmp_path: Path) -> None:
    job = either.get_historical_features(entity_df=ROWS, features=["trips:trips"])
    for path in (tmp_path / "saved.parquet", tmp_path / "saved"):
        storage = SavedDatasetFileStorage(path=str(path))
        saved = either.create_saved_dataset(from_=job, name=path.name, storage=storage)
        assert saved.to_df()["driver"].tolist() == [2, 1, 1, 3, 1]
        assert pq.read_table(path).equals(job.to_arrow())
        with pytest.raises(SavedDatasetLocationAlreadyExists, match="already exists"):
            either.create_saved_dataset(from_=job, name=path.name, storage=storage)
        either.create_saved_dataset(from_=job, name=path.name, storage=storage, allow_overwrite=True)
        assert len(either.get_saved_dataset(path.name).to_df()) == 5
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".saved")] == []


def test_remote_export_writes_under_the_staging_location(store: FeatureStore, tmp_path: Path) -> None:
    assert not store.get_historical_features(entity_df=ROWS, features=["trips:trips"]).supports_remote_storage_export()
    staged = with_engine(store, staging_location=str(tmp_path / "staged"))
    job = staged.get_historical_features(entity_df=ROWS, features=["trips:trips"])
    assert job.supports_remote_storage_export()
    assert pq.read_table(job.to_remote_storage()).equals(job.to_arrow())


def test_materialized_values_are_the_latest_of_each_key(store: FeatureStore) -> None:
    store.materialize(DAY - timedelta(days=1), DAY + timedelta(hours=4))
    answer = store.get_online_features(
        features=["trips:trips", "trips:rate"], entity_rows=[{"driver": d} for d in (1, 2, 3)]
    ).to_dict()
    assert answer["trips"] == [21, 30, None]
    assert answer["rate"] == [0.21, 0.3, None]


def test_latest_and_all_rows_from_a_source(either: FeatureStore) -> None:
    offline = either._get_provider().offline_store
    view = either.get_feature_view("trips")
    asked = (either.config, view.batch_source, ["driver"], ["trips", "rate_raw"], "event_timestamp", "created")
    latest = offline.pull_latest_from_table_or_query(*asked, DAY, DAY + timedelta(hours=4))
    assert latest.to_arrow().select(["driver", "trips"]).to_pylist() == [{"driver": 1, "trips": 21}, {"driver": 2, "trips": 30}]
    everything = offline.pull_all_from_table_or_query(*asked, start_date=DAY + timedelta(hours=2))
    assert everything.to_arrow()["trips"].to_pylist() == [20, 21, 50]
    for job in (latest, everything):
        table = job.to_arrow()
        assert table.schema.names == ["driver", "trips", "rate_raw", "event_timestamp", "created"]
        assert pa.Table.from_batches(list(job.to_arrow_batches())).equals(table)
        sql = duckdb.sql(job.to_sql()).fetchall()
        assert sorted(row[1] for row in sql) == sorted(table["trips"].to_pylist())


def test_offline_write_adds_rows_to_a_file_and_to_a_folder(store: FeatureStore, tmp_path: Path) -> None:
    new = pd.DataFrame({"driver": [3], "event_timestamp": [at(8)], "created": [at(8)], "trips": [90], "rate_raw": [0.9]})
    store.write_to_offline_store("trips", new)
    assert store.get_historical_features(entity_df=ROWS, features=["trips:trips"]).to_arrow()["trips"].to_pylist()[3] == 90
    place = pd.DataFrame({"place": [9], "event_timestamp": [at(8)], "created": [at(8)], "heat": [90.0]})
    for _ in range(2):
        store.write_to_offline_store("heat", place)
    assert len(list((tmp_path / "places").glob("*.parquet"))) == 3
    assert pq.read_table(tmp_path / "places").num_rows == 3


@pytest.mark.parametrize("partition_by", [None, ["day"]])
def test_logged_features_are_added_and_read_back(store: FeatureStore, tmp_path: Path, partition_by: list[str] | None) -> None:
    from mlops_dagster.resources.feature_store.asof import AsofOfflineStore

    logs = pa.table({"request_id": ["x", "y"], "day": ["a", "b"], "at": pa.array([DAY, DAY + timedelta(hours=1)])})
    pq.write_table(logs, tmp_path / "chunk.parquet")
    destination = FileLoggingDestination(path=str(tmp_path / "logs"), partition_by=partition_by)
    for chunk in (logs, tmp_path / "chunk.parquet"):
        AsofOfflineStore.write_logged_features(store.config, chunk, None, LoggingConfig(destination=destination), store.registry)
    job = AsofOfflineStore.pull_all_from_table_or_query(
        store.config, destination.to_data_source(), [], ["request_id", "day"], "at", end_date=DAY + timedelta(minutes=1)
    )
    assert job.to_arrow().select(["request_id", "day"]).to_pylist() == [{"request_id": "x", "day": "a"}] * 2
