"""What computes feature tables: the same SQL on one machine or on many."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Case", "FeatureEngine"]

Case = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The tables and the parameters of one run of the statements: those of a day."""


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

    def run_each(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        """For each case what `run_all` answers, in order; in one pass over the cases where that is cheaper."""
        ...
