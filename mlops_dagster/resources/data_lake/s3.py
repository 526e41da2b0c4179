"""The lake in S3 or MinIO, on dagster-aws' S3Resource: the same keys and the same bytes as the folder."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource, ResourceDependency
from dagster_aws.s3 import S3Resource
from pydantic import Field, PrivateAttr

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.data_lake import StoredFile, checked_key
from mlops_dagster.resources.data_lake.parquet import as_table, from_parquet, joined, stored, to_parquet, unknown

if TYPE_CHECKING:
    import pyarrow as pa

MISSING = ("404", "NoSuchKey", "NotFound")
PARALLEL = 8


class S3Lake(ConfigurableResource):
    """A DataLake in a bucket. An object appears whole or not at all; of two writers of one key the last to finish wins.

    `s3.max_attempts` is how often a call is tried; after that StorageError.
    """

    s3: ResourceDependency[S3Resource]
    bucket: str = Field(description="The bucket; it must exist.")
    prefix: str = Field(default="", description="Where in the bucket the lake's keys begin, such as lake; empty: at its top.")
    _client: Any = PrivateAttr(default=None)

    @property
    def root(self) -> str:
        """The lake's own address."""
        return "/".join(part for part in (f"s3://{self.bucket}", self.prefix.strip("/")) if part)

    def write(self, key: str, table: Any) -> StoredFile:
        content = as_table(f"lake key {checked_key(key)!r}", table)
        return self._store(key, to_parquet(content).to_pybytes(), content.num_rows)

    def write_bytes(self, key: str, content: bytes) -> StoredFile:
        return self._store(checked_key(key), content, 0)

    def read(self, keys: str | Sequence[str], columns: Sequence[str] | None = None) -> "pa.Table":
        wanted = [keys] if isinstance(keys, str) else [*keys]
        if not wanted:
            raise unknown("", self.list()[-3:])
        with ThreadPoolExecutor(PARALLEL) as pool:
            return joined([*pool.map(lambda key: self._read(key, columns), wanted)])

    def read_bytes(self, key: str) -> bytes:
        address = self._object(key)
        with self._errors(key, "read"):
            client = self._connected()
            try:
                return client.get_object(**address)["Body"].read()
            except client.exceptions.NoSuchKey:
                pass
        folder = key.rpartition("/")[0]
        raise unknown(key, self.list(folder + "/" if folder else ""))

    def locate(self, key: str) -> str:
        return f"{self.root}/{checked_key(key)}"

    def delete(self, key: str) -> None:
        address = self._object(key)
        with self._errors(key, "delete"):
            self._connected().delete_object(**address)

    def _read(self, key: str, columns: Sequence[str] | None) -> "pa.Table":
        import pyarrow as pa

        return from_parquet(key, pa.BufferReader(self.read_bytes(key)), columns)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": "/".join(part for part in (self.prefix.strip("/"), checked_key(key)) if part)}

    def _store(self, key: str, content: bytes, rows: int) -> StoredFile:
        made, address = stored(key, content, rows), self._object(key)
        with self._errors(key, "write"):
            client = self._connected()
            if not _holds(client, address, made):
                client.put_object(**address, Body=content, Metadata={"sha256": made.sha256})
        return made

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self.s3.get_client()  # a tenth of a second of processor time each
        return self._client

    @contextmanager
    def _errors(self, key: str, action: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise StorageError(
                f"lake object {self.root}/{key}: cannot {action} it ({error}) after {self.s3.max_attempts} attempts. Nothing was changed; "
                f"check the endpoint, the bucket {self.bucket!r} and the credentials, then run it again."
            ) from error

    def stamps(self, prefix: str) -> dict[str, str]:
        """The ETags; one request for each thousand keys."""
        begin = f"{self.prefix.strip('/')}/" if self.prefix.strip("/") else ""
        with self._errors(prefix, "list"):
            pages = self._connected().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=begin + prefix)
            return {
                item["Key"].removeprefix(begin): item["ETag"].strip('"') for page in pages for item in page.get("Contents", ())
            }

    def list(self, prefix: str = "") -> list[str]:  # last in the class: it hides the built-in list from annotations below it
        return sorted(self.stamps(prefix))


def _holds(client: Any, address: dict[str, str], made: StoredFile) -> bool:
    """Whether the object is there with this very content: by the hash that was stored with it, or by its bytes if it has none."""
    from botocore.exceptions import ClientError

    try:
        found = client.head_object(**address)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in MISSING:
            return False
        raise
    if found["ContentLength"] != made.bytes:
        return False
    known = found["Metadata"].get("sha256")
    return (known or hashlib.sha256(client.get_object(**address)["Body"].read()).hexdigest()) == made.sha256
