import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_lake.s3 import S3Lake
from tests.contracts.data_lake.lake_contract import KEY, LakeContract, flights
from tests.contracts.data_lake.s3_server import Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


def new_lake(server: Server, prefix: str = "") -> S3Lake:
    bucket = f"lake-{uuid.uuid4().hex}"
    server.resource().get_client().create_bucket(Bucket=bucket)
    return S3Lake(s3=server.resource(), bucket=bucket, prefix=prefix)


class TestS3Lake(LakeContract):
    @pytest.fixture(params=["", "some/where"])
    def lake(self, server: Server, request: pytest.FixtureRequest) -> S3Lake:
        return new_lake(server, request.param)


def test_the_bytes_are_those_of_the_folder(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    lake, folder = new_lake(server), FolderLake(root=str(tmp_path_factory.mktemp("lake")))
    assert lake.write(KEY, flights()) == folder.write(KEY, flights())
    assert lake.read_bytes(KEY) == folder.read_bytes(KEY)


def test_the_same_content_again_leaves_the_object_untouched(server: Server) -> None:
    lake = new_lake(server)
    client = lake.s3.get_client()
    client.put_bucket_versioning(Bucket=lake.bucket, VersioningConfiguration={"Status": "Enabled"})

    def versions() -> int:
        return len(client.list_object_versions(Bucket=lake.bucket, Prefix=KEY).get("Versions", []))

    for _ in range(3):
        lake.write(KEY, flights())
    assert versions() == 1
    lake.write(KEY, flights(first=4))
    assert versions() == 2
    client.put_object(Bucket=lake.bucket, Key="m/by_hand.json", Body=b"{}")
    lake.write_bytes("m/by_hand.json", b"{}")
    assert lake.read_bytes("m/by_hand.json") == b"{}"


def test_more_than_a_page_of_keys_is_listed(server: Server) -> None:
    lake = new_lake(server)
    client = lake.s3.get_client()
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda n: client.put_object(Bucket=lake.bucket, Key=f"m/t/{n:04}.json", Body=b""), range(1001))]
    assert len(lake.list("m/t/")) == 1001


def test_other_readers_find_the_objects_where_locate_says(server: Server) -> None:
    import polars as pl

    lake = new_lake(server, "deep/er")
    lake.write(KEY, flights())
    options = {key.lower(): value for key, value in server.environment().items()} | {"aws_endpoint_url": server.endpoint}
    options["aws_region"] = options.pop("aws_default_region")
    found = pl.read_parquet(lake.locate(KEY), storage_options=options | {"aws_allow_http": "true"})
    assert found.to_arrow()["delay"].to_pylist() == flights()["delay"].to_pylist()


@pytest.mark.parametrize(
    ("change", "bucket"),
    [({"endpoint_url": "http://127.0.0.1:1"}, "lake"), ({"aws_secret_access_key": "wrong"}, None), ({}, "no-such-bucket-here")],
    ids=["unreachable", "wrong key", "no bucket"],
)
def test_what_is_wrong_with_the_store_is_said(server: Server, change: dict[str, str], bucket: str | None) -> None:
    whole = new_lake(server)
    whole.write(KEY, flights())
    lake = S3Lake(s3=server.resource(**change), bucket=bucket or whole.bucket)
    begin = time.monotonic()
    for work in (
        lambda: lake.write(KEY, flights(first=8)),
        lambda: lake.read(KEY),
        lake.list,
        lambda: lake.write_bytes("a/b", b""),
    ):
        with pytest.raises(StorageError, match=r"after 2 attempts. Nothing was changed; check the endpoint"):
            work()
    assert time.monotonic() - begin < 30
    assert whole.read(KEY).equals(flights())


def test_a_big_partition_is_stored_whole(server: Server) -> None:
    lake, rows = new_lake(server), 3_000_000
    lake.write(KEY, pa.table({"n": pa.array(range(rows)), "x": pa.array(float(n % 977) * 1.37 for n in range(rows))}))
    assert lake.read(KEY, ["n"])["n"][-1].as_py() == rows - 1
