"""What all engines share: how statements and parameters are checked, and the one form of an answer."""

import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.resources.data_lake.parquet import as_table

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_NAME = re.compile(r"[A-Za-z_]\w*")


def checked_parameters(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters, if every one is a value that all engines know. Raises DeclarationError otherwise."""
    for name, value in (parameters or {}).items():
        if isinstance(value, datetime) and value.tzinfo is None:
            raise DeclarationError(f"parameter ${name}: {value.isoformat()} has no time zone. Give a moment with one.")
        if value is not None and not isinstance(value, (bool, int, float, str, datetime, date)):
            raise DeclarationError(f"parameter ${name}: {type(value).__name__} is no number, string, bool, date or moment.")
    return dict(parameters or {})


def checked_tables(tables: Mapping[str, Any]) -> dict[str, "pa.Table | list[str]"]:
    """Arrow tables of plain types and lists of Parquet files, by name. Raises DataError for anything else."""
    found: dict[str, pa.Table | list[str]] = {}
    for name, table in tables.items():
        if not TABLE_NAME.fullmatch(name):
            raise DeclarationError(f"table {name!r}: no plain name. Use letters, digits and underscores.")
        if isinstance(table, (list, tuple)) and table and all(isinstance(path, str) for path in table):
            found[name] = [*table]
        else:
            found[name] = as_table(f"table {name!r}", table)
    return found


def normal(table: "pa.Table") -> "pa.Table":
    """Plain column types, rows sorted by all columns."""
    import pyarrow as pa

    columns = [column.cast(_plain(column.type)) for column in table.columns]
    table = pa.table(columns, names=table.column_names).combine_chunks()
    nested = [name for name in table.column_names if pa.types.is_nested(table[name].type)]
    keys = [(name, "ascending") for name in table.column_names if name not in nested]
    return table.sort_by(keys) if keys and table.num_rows else table


def _plain(kind: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa
    from pyarrow import types

    if types.is_timestamp(kind):
        return pa.timestamp("us", tz="UTC")
    if types.is_integer(kind) or (types.is_decimal(kind) and kind.scale == 0):
        return pa.int64()
    if types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if types.is_large_string(kind) or types.is_string_view(kind) or types.is_dictionary(kind):
        return pa.string()
    return kind


def wrong(sql: str, error: Exception, remedy: str) -> DeclarationError:
    return DeclarationError(f"features.compute: {str(error).strip()[:1000]}\n{remedy} The statement was:\n{sql.strip()}")
