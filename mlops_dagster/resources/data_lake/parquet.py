"""A table's one Parquet form: equal content gives equal bytes, whichever library the table came from."""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.resources.data_lake import StoredFile

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 262_144


def as_table(name: str, data: Any) -> "pa.Table":
    """An Arrow table in plain types: no dictionaries, views or 64-bit offsets, no library's own metadata. Errors call it `name`."""
    import pyarrow as pa

    if data is None or isinstance(data, (dict, list, str, bytes)) or not hasattr(data, "__arrow_c_stream__"):
        raise DataError(f"{name}: {type(data).__name__} has no Arrow C stream. Give a pyarrow, Polars or pandas table.")
    table = pa.table(data)
    schema = pa.schema([pa.field(f.name, _plain(f.type), f.nullable) for f in table.schema])
    if len(set(schema.names)) != len(schema.names):
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise DataError(f"{name}: the columns {twice} occur twice. Rename or drop one of each.")
    return table.replace_schema_metadata(None).cast(schema)


def _plain(kind: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(_plain(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type), f.nullable) for f in kind])
    return kind


def to_parquet(table: "pa.Table") -> "pa.Buffer":
    """The file's bytes (zstd, statistics and a dictionary where it pays): the same for the same rows, however chunked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return sink.getvalue()


def from_parquet(key: str, source: Any, columns: Sequence[str] | None) -> "pa.Table":
    """Read one file. Raises DataError naming the key if the bytes are no whole Parquet file or lack a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            names = file.schema_arrow.names
            missing = [] if columns is None else [name for name in columns if name not in names]
            if missing:
                raise DataError(f"lake key {key!r}: no column {', '.join(missing)}. There are: {', '.join(names)}.")
            table = file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"lake key {key!r}: not a whole Parquet file ({error}). Write that partition again.") from error
    return table if columns is None else table.select(list(columns))


def joined(tables: "list[pa.Table]") -> "pa.Table":
    """One table of several: columns by name, a type that is null or narrower in one of them widened to the others'."""
    import pyarrow as pa

    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"lake: the files' columns have types that do not go together ({error}). Write them with one schema."
        ) from error


def stored(key: str, content: "bytes | pa.Buffer", rows: int = 0) -> StoredFile:
    return StoredFile(key, hashlib.sha256(content).hexdigest(), rows, len(content))


def unknown(key: str, there: Iterable[str]) -> NotFoundError:
    """The error for a key that does not exist, with the nearest ones that do."""
    keys = list(there)
    near = difflib.get_close_matches(key, keys[-2000:], n=3, cutoff=0.5) or keys[-3:]
    found = f"Nearest: {', '.join(near)}" if near else "The folder is empty"
    return NotFoundError(f"lake key {key!r}: does not exist. {found} ({len(keys)} beside it). Materialize that partition first.")
