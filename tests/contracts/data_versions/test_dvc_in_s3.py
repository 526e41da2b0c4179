import os
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


def test_the_remote_that_is_set_is_asked_also_before_anything_is_recorded_with_it(
    server: Server, bucket: str, tmp_path: Path
) -> None:
    """`.dvc/config` still names the remote of the last record, here one that is away."""
    lake, away = FolderLake(root=str(tmp_path / "lake")), {"endpointurl": "http://127.0.0.1:1", "profile": "none"}
    before = DvcVersions(root=lake.root, remote="s3://nowhere/dvc", remote_options=away)
    lake.write(DAYS[0], table(1))
    before.record([DAYS[0]], "in")
    config = Path(lake.root, ".dvc", "config")
    written, content = config.read_text(), lake.read_bytes(DAYS[0])
    now = DvcVersions(root=lake.root, remote=f"s3://{bucket}/dvc", remote_options={"endpointurl": server.endpoint})
    assert (now.push(), now.push()) == (1, 0)
    shutil.rmtree(Path(lake.root, ".dvc", "cache"))
    assert now.restore(DAYS[0]).read_bytes() == content
    assert config.read_text() == written
    # The same bucket's name at another endpoint is another remote.
    with pytest.raises(TransientError, match="cannot be reached"):
        DvcVersions(root=lake.root, remote=f"s3://{bucket}/dvc", remote_options=away).push()


def test_settings_that_a_person_keeps_beside_the_config_hold(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = FolderLake(root=str(tmp_path / "lake"))
    versions = DvcVersions(root=lake.root, remote=f"s3://{bucket}/dvc", remote_options={"endpointurl": server.endpoint})
    lake.write(DAYS[0], table(1))
    versions.record([DAYS[0]], "in")
    secrets = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in secrets:
        monkeypatch.delenv(name)
    kept = "".join(f"    {name.removeprefix('AWS_').lower()} = {secret}\n" for name, secret in secrets.items())
    Path(lake.root, ".dvc", "config.local").write_text(f"['remote \"lake\"']\n    url = s3://nowhere\n{kept}")
    assert versions.push() == 1
