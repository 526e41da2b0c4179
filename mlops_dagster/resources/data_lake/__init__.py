"""The data lake: one immutable-by-replacement file per key, tables as Parquet, reports as bytes."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlops_dagster.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["BlobStore", "DataLake", "Lake", "StoredFile", "checked_key"]


@dataclass(frozen=True)
class StoredFile:
    """What a write left in the lake: `sha256` (hex) and `bytes` of the file itself, `rows` of the table (0 for a report)."""

    key: str
    sha256: str
    rows: int
    bytes: int


class DataLake(Protocol):
    """Tables under keys such as `flight_delay/raw_data/flights/2013-01-01.parquet`.

    Every write is whole or not at all, and equal content gives equal bytes, so that a file's hash is its data version.
    """

    def write(self, key: str, table: Any) -> StoredFile:
        """Store an Arrow table, or anything with the Arrow C stream; the same content again leaves the file untouched.

        Raises DataError for a bad key or a table that is none, StorageError when the store is full, read-only or away.
        """
        ...

    def read(self, keys: str | Sequence[str], columns: Sequence[str] | None = None) -> "pa.Table":
        """The rows of one key, or of several in the order given (columns that some lack are null there).

        Raises NotFoundError for a key that does not exist, DataError for a file or a column that cannot be read.
        """
        ...

    def locate(self, key: str) -> str:
        """The address of a key, existing or not: a path or an `s3://` URI."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""
        ...

    def list(self, prefix: str = "") -> "list[str]":
        """The sorted keys that begin with `prefix` (any string, not only whole folders)."""
        ...


class BlobStore(Protocol):
    """Reports (HTML, JSON) in the same place, under the same promises."""

    def write_bytes(self, key: str, content: bytes) -> StoredFile:
        """Store bytes as they are; the same content again leaves the file untouched."""
        ...

    def read_bytes(self, key: str) -> bytes:
        """The stored bytes. Raises NotFoundError for a key that does not exist."""
        ...

    def stamps(self, prefix: str) -> dict[str, str]:
        """Of each key in the prefix's folder that begins with it, a text that is another one once the key was replaced; reads no content."""
        ...


class Lake(DataLake, BlobStore, Protocol):
    """What every lake backend offers."""


def checked_key(key: str) -> str:
    """The key itself, if it is a plain relative path. Raises DataError otherwise."""
    parts = key.split("/")
    plain = all(part and not part.startswith(".") for part in parts) and not key.endswith(".dvc")
    if not plain or "\0" in key or "\\" in key or posixpath.normpath(key) != key:
        raise DataError(
            f"lake key {key!r}: not a relative path of plain names. Use names joined by '/', none of them empty or beginning with a dot, "
            f"and not ending in .dvc."
        )
    return key
