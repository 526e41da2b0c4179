"""DVC over a lake in S3: the repository holds the `.dvc` files, the remote the bytes, and `dvc pull` brings both together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster import ResourceDependency

from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.resources.data_lake.s3 import S3Lake
from mlops_dagster.resources.data_versions.dvc import DvcVersions


class BucketVersions(DvcVersions):
    """DataVersions of an S3Lake; `root` is a folder of its own, and a recorded object passes through it once."""

    lake: ResourceDependency[S3Lake]

    @contextmanager
    def _content(self, key: str) -> Iterator[Path]:
        try:
            content = self.lake.read_bytes(key)
        except NotFoundError as error:
            raise FileNotFoundError(key) from error
        passing = self._dvc_dir() / "tmp" / "passing"  # one recorder at a time holds the lock
        passing.write_bytes(content)
        try:
            yield passing
        finally:
            passing.unlink()
