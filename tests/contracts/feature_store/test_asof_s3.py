"""Sources, saved datasets and logs on an S3-compatible server, with the endpoint given by the source."""

import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.types import Int64
from moto.server import ThreadedMotoServer

from mlops_dagster.core.errors import DataError, StorageError
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, with_engine

DAY = datetime(2026, 3, 1, tzinfo=UTC)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def store(endpoint: str, tmp_path: Any) -> FeatureStore:
    client = boto3.client("s3", endpoint_url=endpoint)
    lake = f"lake-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=lake)
    bucket = pafs.S3FileSystem(endpoint_override=endpoint)
    for hour in (1, 2):
        moments = pa.array([DAY + timedelta(hours=hour)] * 2)
        rows = pa.table({"driver": [1, 2], "event_timestamp": moments, "created": moments, "trips": [hour, 10 * hour]})
        pq.write_table(rows, f"{lake}/rows/hour={hour}/part.parquet", filesystem=bucket)
        pq.write_table(rows, f"{lake}/rows.parquet", filesystem=bucket)
    driver = entity("driver")
    views = [
        FeatureView(
            name=name,
            entities=[driver],
            ttl=timedelta(0),
            schema=[Field(name="trips", dtype=Int64)],
            source=file_source(f"s3://{lake}/{path}", s3_endpoint_override=endpoint),
        )
        for name, path in (("folder", "rows"), ("file", "rows.parquet"))
    ]
    return applied(open_store(tmp_path), [driver], views)


def trips(store: FeatureStore, view: str) -> list[Any]:
    rows = pd.DataFrame({"driver": [1, 2, 1], "event_timestamp": [DAY + timedelta(hours=h) for h in (1, 3, 2)]})
    return store.get_historical_features(entity_df=rows, features=[f"{view}:trips"]).to_arrow()["trips"].to_pylist()


def test_folders_and_files_are_read_in_memory_and_on_disk(store: FeatureStore) -> None:
    for engine in ("memory", "disk"):
        assert trips(with_engine(store, engine=engine), "folder") == [1, 20, 2]
        assert trips(with_engine(store, engine=engine), "file") == [None, 20, 2]


def test_rows_are_added_to_folders_and_files(store: FeatureStore) -> None:
    new = {"driver": [2], "event_timestamp": [DAY + timedelta(hours=2.5)], "created": [DAY + timedelta(hours=2.5)], "trips": [99]}
    store.write_to_offline_store("file", pd.DataFrame(new))
    store.write_to_offline_store("folder", pd.DataFrame({**new, "hour": ["3"]}))
    assert trips(store, "file") == [None, 99, 2]
    assert trips(store, "folder") == [1, 99, 2]


def test_a_dataset_is_saved_and_replaced(store: FeatureStore, endpoint: str) -> None:
    rows = pd.DataFrame({"driver": [1, 2], "event_timestamp": [DAY + timedelta(hours=3)] * 2})
    lake = store.get_feature_view("folder").batch_source.path.removesuffix("/rows")
    for path in (f"{lake}/saved", f"{lake}/saved.parquet"):
        storage = SavedDatasetFileStorage(path=path, s3_endpoint_override=endpoint)
        for count in (2, 1):
            job = store.get_historical_features(entity_df=rows[:count], features=["folder:trips"])
            saved = store.create_saved_dataset(from_=job, name="saved", storage=storage, allow_overwrite=True)
            assert saved.to_df()["trips"].tolist() == [2, 20][:count]


def test_a_missing_object_and_an_unreachable_server_are_told_apart(endpoint: str) -> None:
    from mlops_dagster.resources.feature_store.asof_source import open_source

    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="lake")
    with pytest.raises(DataError, match=r"s3://lake/nothing.parquet' does not exist"):
        open_source(file_source("s3://lake/nothing.parquet", s3_endpoint_override=endpoint), None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(StorageError, match=r"s3://lake/rows.parquet.*endpoint"):
            open_source(file_source("s3://lake/rows.parquet", s3_endpoint_override=nowhere), None)
