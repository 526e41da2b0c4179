"""Features by DuckDB in this process: the default."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.resources.feature_engine import Case
from mlops_dagster.resources.feature_engine.answers import checked_parameters, checked_tables, normal, wrong

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class DuckDBEngine(ConfigurableResource):
    """FeatureEngine on DuckDB; what does not fit `memory_limit` goes to disk.

    A statement has one thread, so that it gives the same bits again: the sum of floats depends on their order, and with it on which thread
    was done first. Several statements run beside each other instead.
    """

    threads: int = Field(default=2, ge=1, description="Statements that run at once, each in one thread.")
    memory_limit: str = Field(default="4GB", description="Memory that a statement may use before it works on disk, such as 4GB.")

    def run(self, sql: str, tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> "pa.Table":
        return self.run_all({"": sql}, tables, parameters)[""]

    def run_all(
        self, statements: Mapping[str, str], tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
    ) -> "dict[str, pa.Table]":
        return self.run_each(statements, [(tables, parameters or {})])[0]

    def run_each(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        checked = [(checked_tables(tables), checked_parameters(parameters)) for tables, parameters in cases]
        work = [(sql, *case) for case in checked for sql in statements.values()]
        with ThreadPoolExecutor(self.threads, "features") as pool:
            answers = pool.map(lambda one: self._answered(*one), work)
            return [dict(zip(statements, islice(answers, len(statements)), strict=True)) for _ in checked]

    def _answered(self, sql: str, tables: Mapping[str, Any], values: dict[str, Any]) -> "pa.Table":
        """In a database of its own: what a statement works on disk, and so the order of its sums, hangs on no other statement."""
        with self._connection(tables) as connection:
            return _answer(connection, sql, values)

    @contextmanager
    def _connection(self, tables: Mapping[str, Any]) -> "Iterator[duckdb.DuckDBPyConnection]":
        import duckdb

        with duckdb.connect(config={"threads": 1, "memory_limit": self.memory_limit}) as connection:
            connection.execute("SET TimeZone = 'UTC'; SET python_enable_replacements = false")
            for name, table in tables.items():
                if isinstance(table, list):
                    self._view(connection, name, table)
                else:
                    connection.register(name, table)
            yield connection

    def _view(self, connection: "duckdb.DuckDBPyConnection", name: str, paths: list[str]) -> None:
        import duckdb

        try:
            connection.read_parquet(paths, union_by_name=True, hive_partitioning=False).create_view(name)
        except duckdb.Error as error:
            raise DataError(
                f"table {name!r}: its Parquet files cannot be read ({error}). Materialize those partitions again."
            ) from error


def _answer(connection: "duckdb.DuckDBPyConnection", sql: str, values: dict[str, Any]) -> "pa.Table":
    import duckdb

    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise DeclarationError(f"features.compute: needs one SELECT statement. The SQL was:\n{sql.strip()}")
        asked = statements[0].named_parameters
        if unknown := sorted(asked - values.keys()):
            raise DeclarationError(
                f"features.compute: no parameter ${', $'.join(unknown)}. There are: {', '.join(f'${name}' for name in sorted(values))}."
            )
        return normal(connection.sql(sql, params={name: values[name] for name in asked} or None).to_arrow_table())
    except duckdb.Error as error:
        there = sorted(row[0] for row in connection.execute("SHOW TABLES").fetchall())
        raise wrong(sql, error, f"The tables are: {', '.join(there)}.") from error
