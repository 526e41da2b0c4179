"""Parquet behind a Feast `FileSource`: one file, a folder of files, local or `s3://`."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource

from mlops_dagster.core.errors import DataError, StorageError
from mlops_dagster.resources.feature_store.asof_time import TimeRange, in_unit
from mlops_dagster.resources.feature_store.asof_types import takeable

ROWS_AT_ONCE = 1 << 20
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ParquetFile:
    """One opened Parquet file, those of its row groups that may hold wanted rows, and what its folders (`key=value`) say of all of them."""

    path: str
    filesystem: pafs.FileSystem
    metadata: pq.FileMetaData
    schema: pa.Schema
    groups: tuple[int, ...]
    hive: tuple[tuple[str, str | None], ...] = ()

    @property
    def rows(self) -> int:
        return sum(self.metadata.row_group(g).num_rows for g in self.groups)

    def reader(self) -> pq.ParquetFile:
        """A reader of its own, so that threads do not share one and its buffers go when it goes; the footer is not read again."""
        remote = not isinstance(self.filesystem, pafs.LocalFileSystem)
        return pq.ParquetFile(self.path, filesystem=self.filesystem, metadata=self.metadata, pre_buffer=remote)


@dataclass(frozen=True)
class ParquetSource:
    """What can be read from one `FileSource`. The order of rows is that of the sorted file names, then of the rows in each file.

    `text` are the columns, as Feast calls them, that are declared to be text.

    Raises `DataError` when a file is missing, empty, truncated or lacks a column; `StorageError` when the store cannot be reached.
    """

    location: str
    files: tuple[ParquetFile, ...]
    field_mapping: dict[str, str] = field(default_factory=dict)
    text: frozenset[str] = frozenset()

    @cached_property
    def schema(self) -> pa.Schema:
        schemas = [with_hive_columns(f.schema, f.hive, self.hive_types) for f in self.files]
        try:
            return pa.unify_schemas(schemas, promote_options="permissive") if len(schemas) > 1 else schemas[0]
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"The files of {self.location!r} disagree on a column's type: {error}. Rewrite them with one schema."
            ) from error

    @cached_property
    def hive_types(self) -> dict[str, pa.DataType]:
        """The types of the folders' keys: int64 where every value is a whole number (as DuckDB and pyarrow have it), else text.

        A key that is declared to be text stays text, for `zip=01234` is not 1234.
        """
        values: dict[str, list[str]] = {}
        for key, value in (pair for f in self.files for pair in f.hive):
            values.setdefault(key, []).extend([] if value is None else [value])
        whole = {k for k, found in values.items() if found and all(map(is_int64, found))}
        return {k: pa.int64() if k in whole and self.field_mapping.get(k, k) not in self.text else pa.string() for k in values}

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)

    @property
    def addresses(self) -> list[str]:
        """The files as other tools name them, scheme included."""
        scheme, found, _ = self.location.partition("://")
        return [scheme + found + f.path if found else f.path for f in self.files]

    def column(self, name: str, purpose: str) -> str:
        """The column in the files that Feast calls `name`, the field mapping (file's name to Feast's name) run backwards."""
        present = set(self.schema.names)
        for original, renamed in self.field_mapping.items():
            if renamed == name and original in present:
                return original
        if name in present:
            return name
        raise DataError(
            f"{self.location!r} has no column {name!r} ({purpose}). It has {sorted(present)}. "
            "Add the column to the files, or correct the feature view or the source's field_mapping."
        )

    def required(self, name: str) -> None:
        """Raises `DataError` where the files have no column of exactly this name."""
        if name not in self.schema.names:
            raise DataError(
                f"{self.location!r} has no column {name!r}. It has {sorted(self.schema.names)}. Add it, or correct the feature view."
            )

    def in_every_file(self, columns: Sequence[str]) -> None:
        """Raises `DataError` where a file with rows lacks one of `columns`: null keys and times would keep those rows from every join."""
        for file in self.files:
            present = {*file.schema.names, *dict(file.hive)}
            missing = [c for c in columns if c not in present]
            if missing and file.metadata.num_rows:
                raise DataError(
                    f"{file.path!r} has no column {missing[0]!r}, which other files of {self.location!r} have and by which rows are joined. "
                    "Add the column to that file, or take the file away."
                )

    def within(self, column: str, wanted: TimeRange) -> "ParquetSource":
        """The same without the row groups whose statistics say that no row of theirs lies in `wanted`."""
        kept = [replace(f, groups=tuple(g for g in f.groups if may_hold(f, g, column, wanted))) for f in self.files]
        return replace(self, files=tuple(kept))

    def read(self, columns: Sequence[str], threads: int) -> pa.Table:
        """The named columns of all rows, as one table."""
        schema = pa.schema([self.schema.field(c) for c in dict.fromkeys(columns)])
        if len(self.files) == 1:
            return self._read_file(self.files[0], schema, threads > 1)
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(lambda f: self._read_file(f, schema, False), [f for f in self.files if f.groups]))
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def batches(self, columns: Sequence[str], rows: int = ROWS_AT_ONCE // 8) -> Iterator[pa.RecordBatch]:
        """The named columns in batches of at most `rows` rows, in order, without holding more than a few of them."""
        schema = pa.schema([self.schema.field(c) for c in dict.fromkeys(columns)])
        for file in self.files:
            names = [c for c in schema.names if c in file.schema.names]
            try:
                stream = file.reader().iter_batches(rows, row_groups=list(file.groups), columns=names, use_threads=False)
                for batch in stream if file.groups else ():
                    table = shaped(pa.Table.from_batches([batch]), schema, file)
                    yield from table.combine_chunks().to_batches()
            except (OSError, pa.ArrowInvalid) as error:
                raise damaged(file.path, error) from error

    @cached_property
    def column_bytes(self) -> dict[str, int]:
        """Uncompressed bytes of each column in the wanted row groups, by the files' own metadata."""
        sizes: dict[str, int] = {}
        for file in self.files:
            for g in file.groups:
                group = file.metadata.row_group(g)
                for part in (group.column(i) for i in range(group.num_columns)):
                    name = part.path_in_schema.split(".")[0]
                    sizes[name] = sizes.get(name, 0) + part.total_uncompressed_size
        return sizes

    def _read_file(self, file: ParquetFile, schema: pa.Schema, use_threads: bool) -> pa.Table:
        names = [c for c in schema.names if c in file.schema.names]
        try:
            table = file.reader().read_row_groups(list(file.groups), columns=names, use_threads=use_threads)
        except (OSError, pa.ArrowInvalid) as error:
            raise damaged(file.path, error) from error
        return shaped(table, schema, file)


def open_source(source: DataSource | None, repo_path: Path | str | None, view: str = "") -> ParquetSource:
    """Opens the files of `source`, reading only their footers; a relative path is relative to the feature repository."""
    if not isinstance(source, FileSource):
        raise DataError(
            f"The source of feature view {view!r} is a {type(source).__name__}; this offline store reads FileSource (Parquet) only."
        )
    if source.file_format is not None and not isinstance(source.file_format, ParquetFormat):
        raise DataError(
            f"FileSource {source.name!r} has file_format {type(source.file_format).__name__}; this offline store reads ParquetFormat only."
        )
    location = FileSource.get_uri_for_file_path(repo_path, source.path)
    filesystem, path = open_filesystem(location, source.s3_endpoint_override, source.resolve_credentials())
    names = list_files(filesystem, path, location)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda name: open_file(filesystem, name, path), names))
    return ParquetSource(location, tuple(files), dict(source.field_mapping or {}))


def open_filesystem(location: str, endpoint: str | None, credentials: Any = None) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system and the path in it of a location as Feast writes it."""
    filesystem, path = FileSource.create_filesystem_and_path(location, endpoint or "", credentials)
    return filesystem or pafs.LocalFileSystem(), path.removeprefix("file://")


def list_files(filesystem: pafs.FileSystem, path: str, location: str) -> list[str]:
    """The Parquet files at `path` (itself, or all below it but for names that begin with `.` or `_`), sorted."""
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [path]
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{location!r} does not exist. Write the feature data there, or correct the source's path.")
        below = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    except OSError as error:
        raise StorageError(f"Cannot list {location!r}: {error}. Check the endpoint, the credentials and the network.") from error
    found = sorted(f.path for f in below if f.type == pafs.FileType.File and not hidden(f.path, path))
    if not found:
        raise DataError(
            f"The folder {location!r} holds no Parquet file. Write the feature data there, or correct the source's path."
        )
    return found


def hidden(name: str, root: str) -> bool:
    parts = name[len(root) :].strip("/").split("/")
    return any(p.startswith((".", "_")) and "=" not in p for p in parts) or not parts[-1].lower().endswith(
        (".parquet", ".parq", ".pq")
    )


def open_file(filesystem: pafs.FileSystem, name: str, root: str) -> ParquetFile:
    try:
        handle = pq.ParquetFile(name, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(name, error) from error
    folders = name[len(root) :].strip("/").split("/")[:-1]
    pairs = ((unquote(key), value) for key, found, value in (f.partition("=") for f in folders) if found)
    hive = tuple({key: None if value == HIVE_NULL else unquote(value) for key, value in pairs}.items())
    schema = handle.schema_arrow
    twice = [column for column, n in Counter(schema.names).items() if n > 1]
    if twice:
        raise DataError(f"{name!r} has more than one column named {twice}. Write the file again with one column of each name.")
    return ParquetFile(name, filesystem, handle.metadata, schema, tuple(range(handle.metadata.num_row_groups)), hive)


def is_int64(text: str) -> bool:
    return re.fullmatch("-?[0-9]{1,19}", text) is not None and -(2**63) <= int(text) < 2**63


def damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name!r} is not a whole Parquet file ({error}). It may be empty or truncated: write it again.")


def with_hive_columns(schema: pa.Schema, hive: Sequence[tuple[str, str | None]], hive_types: dict[str, pa.DataType]) -> pa.Schema:
    fields = [field.with_type(takeable(field.type)) for field in schema]
    return pa.schema([*fields, *(pa.field(key, hive_types[key]) for key, _ in hive if key not in schema.names)])


def shaped(table: pa.Table, schema: pa.Schema, file: ParquetFile) -> pa.Table:
    """The table with exactly the columns of `schema`: folder names (`key=value`) become columns, absent columns null."""
    folders = dict(file.hive)
    columns = []
    for wanted in schema:
        if wanted.name in table.column_names:
            columns.append(cast_column(table[wanted.name], wanted, f"{file.path!r} to be read with the files beside it"))
        elif wanted.name in folders:
            columns.append(pa.repeat(pa.scalar(folders[wanted.name], pa.string()).cast(wanted.type), table.num_rows))
        else:
            columns.append(pa.nulls(table.num_rows, wanted.type))
    return pa.table(columns, schema=schema)


def cast_column(values: pa.ChunkedArray, wanted: pa.Field, place: str) -> pa.ChunkedArray:
    """The column in the type of `wanted`. Raises `DataError`, naming `place`, where a value would be lost by it."""
    if values.type != wanted.type:
        try:
            values = values.cast(wanted.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise DataError(
                f"Column {wanted.name!r} is {values.type} and cannot become {wanted.type} for {place}: {error}. Write it as {wanted.type}."
            ) from error
    if not wanted.nullable and values.null_count:
        raise DataError(f"Column {wanted.name!r} has {values.null_count} nulls, but {place} allows none in it. Fill them in.")
    return values


def may_hold(file: ParquetFile, group: int, column: str, wanted: TimeRange) -> bool:
    if column not in file.schema.names:
        return True
    parts = file.metadata.row_group(group)
    index = next((i for i in range(parts.num_columns) if parts.column(i).path_in_schema == column), None)
    statistics = parts.column(index).statistics if index is not None else None
    if statistics is None or not statistics.has_min_max:
        return True
    kind = file.schema.field(column).type
    if not pa.types.is_timestamp(kind):
        return True
    raw = np.array([statistics.min_raw, statistics.max_raw], dtype=object)
    if not all(isinstance(v, int) for v in raw):
        return True
    low, high = in_unit(raw.astype(np.int64), kind.unit, wanted.unit)
    return bool(high >= wanted.first and low <= wanted.last)
