"""Parquet written so that a reader, at any moment and after any crash, sees the old data or the new and never a part of a file."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileOptions, FileSource

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.feature_store.asof_source import (
    HIVE_NULL,
    ROWS_AT_ONCE,
    cast_column,
    damaged,
    hidden,
    open_filesystem,
)

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def save_dataset(
    batches: Iterator[pa.RecordBatch], options: FileOptions, repo_path: str | None, allow_overwrite: bool
) -> list[str]:
    """Writes a dataset to one file (an address that ends in `.parquet`) or a folder; returns the files' addresses.

    Raises `SavedDatasetLocationAlreadyExists` where something is there and `allow_overwrite` is false.
    """
    if options.file_format is not None and not isinstance(options.file_format, ParquetFormat):
        raise DataError(
            f"A dataset is saved as ParquetFormat, not {type(options.file_format).__name__}. Change the storage's file_format."
        )
    location = FileSource.get_uri_for_file_path(repo_path, options.uri)
    filesystem, path = open_filesystem(location, options.s3_endpoint_override)
    path = path.rstrip("/")
    old = parquet_at(filesystem, path)
    if old and not allow_overwrite:
        raise SavedDatasetLocationAlreadyExists(location=options.uri)
    scheme = location[: location.index("://") + 3] if "://" in location else ""
    if path.endswith(".parquet"):
        with replacing(filesystem, path) as temporary:
            write_file(batches, filesystem, temporary)
        return [scheme + path]
    return [scheme + name for name in replace_folder(batches, filesystem, path, old)]


def parquet_at(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The file at `path`, or all data files below it."""
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.Directory:
        return [] if info.type == pafs.FileType.NotFound else [path]
    below = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    return [f.path for f in below if f.type == pafs.FileType.File and not hidden(f.path, path)]


def write_file(batches: Iterator[pa.RecordBatch], filesystem: pafs.FileSystem, path: str) -> None:
    first = next(batches)
    with pq.ParquetWriter(path, first.schema, filesystem=filesystem) as writer:
        writer.write_batch(first, row_group_size=ROWS_AT_ONCE)
        for batch in batches:
            writer.write_batch(batch, row_group_size=ROWS_AT_ONCE)


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """What a file system raises, as `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot write {path!r}: {error}. Check the space, the permissions and the network; readers find the old data or the new, whole."
        ) from error


@contextmanager
def replacing(filesystem: pafs.FileSystem, path: str) -> Iterator[str]:
    """Gives a temporary name beside `path`; it takes the place of `path` at the end, in one step, or is deleted on an error."""
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}"
    with storage_errors(path):
        filesystem.create_dir(folder, recursive=True)
        try:
            yield temporary
            settle(filesystem, temporary)
            filesystem.move(temporary, path)
        except BaseException:
            discard(filesystem, temporary)
            raise


def discard(filesystem: pafs.FileSystem, temporary: str) -> None:
    """Deletes what is left of a failed write; where even that fails, the name is one that readers pass over."""
    with suppress(OSError):
        if filesystem.get_file_info(temporary).type != pafs.FileType.NotFound:
            filesystem.delete_file(temporary)


def settle(filesystem: pafs.FileSystem, path: str) -> None:
    """Local bytes reach the disk before the name does, so that a power cut leaves no empty file under the final name."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def replace_folder(batches: Iterator[pa.RecordBatch], filesystem: pafs.FileSystem, path: str, old: list[str]) -> list[str]:
    """The folder with the new dataset alone. An object store cannot swap folders: there the new file comes whole before the old ones go."""
    part = "part-0.parquet"
    if not isinstance(filesystem, pafs.LocalFileSystem):
        new = f"{path}/{uuid.uuid4().hex}-{part}"
        with replacing(filesystem, new) as temporary:
            write_file(batches, filesystem, temporary)
        delete_old(filesystem, old, new)
        return [new]
    folder, _, name = path.rpartition("/")
    staged = f"{folder}/.{name}.{uuid.uuid4().hex}"
    with storage_errors(path):
        filesystem.create_dir(staged, recursive=True)
        try:
            write_file(batches, filesystem, f"{staged}/{part}")
            settle(filesystem, f"{staged}/{part}")
            swap_folders(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return [f"{path}/{part}"]


def delete_old(filesystem: pafs.FileSystem, old: list[str], new: str) -> None:
    for i, name in enumerate(old):
        try:
            filesystem.delete_file(name)
        except OSError as error:
            raise StorageError(
                f"{new!r} is written, but the files that it replaces cannot be deleted: {error}. Readers see both: delete {old[i:]}."
            ) from error


def swap_folders(new: str, place: str) -> None:
    """`new` takes the place of `place`, in one step; what was there is then under the name `new`."""
    if not os.path.isdir(place) or not os.listdir(place):
        os.rename(new, place)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is not None and exchange(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(place), RENAME_EXCHANGE) == 0:
        return
    aside = f"{new}.old"
    os.rename(place, aside)
    os.rename(new, place)
    os.rename(aside, new)


def append_rows(source: FileSource, rows: pa.Table, schema: pa.Schema, repo_path: Path | str | None) -> None:
    """Adds rows, in the types of `schema`, to a source: a new file in a folder, or the one file written anew with them at its end.

    In a folder the file's name is the hash of the rows, so that writing the same batch again changes nothing. Raises `DataError` for a column
    whose values do not fit its type.
    """
    table = pa.table([cast_column(rows[field.name], field, repr(source.path)) for field in schema], schema=schema)
    location = FileSource.get_uri_for_file_path(repo_path, source.path)
    filesystem, path = open_filesystem(location, source.s3_endpoint_override, source.resolve_credentials())
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        with replacing(filesystem, f"{path.rstrip('/')}/{content_hash(table)}.parquet") as temporary:
            pq.write_table(table, temporary, filesystem=filesystem, row_group_size=ROWS_AT_ONCE)
        return
    with storage_errors(path), one_writer(filesystem, path), replacing(filesystem, path) as temporary:
        rewrite_with(table, filesystem, path, temporary)


def rewrite_with(table: pa.Table, filesystem: pafs.FileSystem, path: str, temporary: str) -> None:
    try:
        old = pq.ParquetFile(path, filesystem=filesystem)
        with old, pq.ParquetWriter(temporary, old.schema_arrow, filesystem=filesystem) as writer:
            for batch in old.iter_batches(ROWS_AT_ONCE):
                writer.write_batch(batch)
            writer.write_table(table.cast(old.schema_arrow), row_group_size=ROWS_AT_ONCE)
    except pa.ArrowInvalid as error:
        raise damaged(path, error) from error


@contextmanager
def one_writer(filesystem: pafs.FileSystem, path: str) -> Iterator[None]:
    """Local writers of one file wait for each other, so that neither's rows are lost."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    folder, _, name = path.rpartition("/")
    with open(f"{folder}/.{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def content_hash(table: pa.Table) -> str:
    digest = hashlib.sha256(str(table.schema).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()[:32]


def write_logs(data: pa.Table | Path, destination: FileLoggingDestination, repo_path: Path | str | None) -> None:
    """Adds a chunk of logged features to a folder; each file appears whole. Partition columns become folders `column=value`, as Hive and
    pyarrow write them: values percent-encoded, null as `__HIVE_DEFAULT_PARTITION__`.
    """
    table = pq.read_table(data) if isinstance(data, Path) else data
    location = FileSource.get_uri_for_file_path(repo_path, destination.path)
    filesystem, path = open_filesystem(location, destination.s3_endpoint_override)
    for folders, part in partitions(table, destination.partition_by or []):
        name = "/".join([path.rstrip("/"), *folders, f"{uuid.uuid4().hex}.parquet"])
        with replacing(filesystem, name) as temporary:
            pq.write_table(part, temporary, filesystem=filesystem)


def partitions(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    if not columns:
        yield [], table
        return
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise DataError(f"The logged features have no column {missing[0]!r} of partition_by; they have {table.column_names}.")
    names = [f"c{i}" for i in range(len(columns))]
    keys = pa.table([*(table[c] for c in columns), np.arange(table.num_rows)], names=[*names, "row"])
    rest = table.drop_columns(list(columns))
    groups: list[Any] = keys.group_by(names, use_threads=False).aggregate([("row", "list")]).to_pylist()
    for group in groups:
        folders = [f"{quote(c, safe='')}={folder_value(group[name])}" for c, name in zip(columns, names, strict=True)]
        yield folders, rest.take(pa.array(group["row_list"]))


def folder_value(value: Any) -> str:
    return HIVE_NULL if value is None else quote(str(value), safe="")
