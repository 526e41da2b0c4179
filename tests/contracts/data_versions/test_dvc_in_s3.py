import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlops_dagster.core.errors import TransientError
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_lake.s3 import S3Lake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.data_versions.dvc_bucket import BucketVersions
from tests.contracts.data_lake.s3_server import Server, s3_server
from tests.contracts.data_versions.versions_contract import DAYS, VersionsContract, table


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"dvc-{uuid.uuid4().hex}"
    server.resource().get_client().create_bucket(Bucket=name)
    return name


class TestLakeAndRemoteInS3(VersionsContract):
    @pytest.fixture
    def lake(self, server: Server, bucket: str) -> S3Lake:
        return S3Lake(s3=server.resource(), bucket=bucket, prefix="lake")

    @pytest.fixture
    def versions(self, server: Server, bucket: str, lake: S3Lake, tmp_path: Path) -> BucketVersions:
        options = {"endpointurl": server.endpoint}
        return BucketVersions(root=str(tmp_path / "repository"), lake=lake, remote=f"s3://{bucket}/dvc", remote_options=options)

    @pytest.fixture
    def at(self, monkeypatch: pytest.MonkeyPatch):
        return lambda seconds: monkeypatch.setattr(DvcVersions.record, "__defaults__", (lambda: seconds,))

    def test_dvc_pull_by_hand_brings_the_files(self, lake: S3Lake, versions: BucketVersions, tmp_path: Path) -> None:
        for n, key in enumerate(DAYS):
            lake.write(key, table(n))
        versions.record(DAYS, "in")
        assert versions.push() == 5
        subprocess.run(["git", "clone", "-q", versions.root, tmp_path / "clone"], check=True)
        subprocess.run([sys.executable, "-m", "dvc", "pull", "-q"], cwd=tmp_path / "clone", check=True)
        assert FolderLake(root=str(tmp_path / "clone")).read_bytes(DAYS[2]) == lake.read_bytes(DAYS[2])

    def test_a_lost_cache_is_filled_from_the_remote(self, lake: S3Lake, versions: BucketVersions) -> None:
        lake.write(DAYS[0], table(1))
        versions.record([DAYS[0]], "in")
        versions.push()
        content = lake.read_bytes(DAYS[0])
        lake.delete(DAYS[0])
        shutil.rmtree(Path(versions.root, ".dvc", "cache"))
        assert versions.restore(DAYS[0]).read_bytes() == content


def test_a_remote_that_is_away_is_a_clear_error_and_the_lake_stays_whole(server: Server, bucket: str, tmp_path: Path) -> None:
    lake = FolderLake(root=str(tmp_path / "lake"))
    versions = DvcVersions(root=lake.root, remote=f"s3://{bucket}/dvc", remote_options={"endpointurl": "http://127.0.0.1:1"})
    lake.write(DAYS[0], table(1))
    versions.record([DAYS[0]], "in")
    begin = time.monotonic()
    with pytest.raises(TransientError, match=r"cannot be reached after 3 attempts.*The local lake is whole"):
        versions.push()
    assert time.monotonic() - begin < 60
    assert versions.restore(DAYS[0]).read_bytes() == lake.read_bytes(DAYS[0])
    again = DvcVersions(root=lake.root, remote=f"s3://{bucket}/dvc", remote_options={"endpointurl": server.endpoint})
    lake.write(DAYS[1], table(2))
    again.record([DAYS[1]], "more")
    assert again.push() == 2
