"""What computes feature tables: the same SQL on one machine or on many."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FeatureEngine"]


class FeatureEngine(Protocol):
    """Runs SELECT statements in DuckDB's dialect over named tables, in UTC.

    `tables` maps a name to an Arrow table (or anything with the Arrow C stream) or to a list of Parquet files. `parameters` are the values
    of `$name` in the SQL; moments must have a time zone. Answers have int64, float64, string, bool, date32 and timestamp[us, UTC] columns
    and their rows sorted by all columns, so that every engine gives the same table. Raises DeclarationError for SQL that is wrong.
    """

    def run(self, sql: str, tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> "pa.Table":
        """The answer to one statement."""
        ...

    def run_all(
        self,
        statements: Mapping[str, str],
        tables: Mapping[str, Any | Sequence[str]],
        parameters: Mapping[str, Any] | None = None,
    ) -> "dict[str, pa.Table]":
        """The answers to several statements over the same tables, by the statements' names."""
        ...
