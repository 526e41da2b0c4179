"""Features by DuckDB in this process: the default."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """FeatureEngine on DuckDB; what does not fit `memory_limit` goes to disk."""

    threads: int = Field(default=2, ge=1, description="Threads that a statement may use.")
    memory_limit: str = Field(default="4GB", description="Memory that a statement may use before it works on disk, such as 4GB.")

    def run(self, sql: str, tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> "pa.Table":
        return self.run_all({"": sql}, tables, parameters)[""]

    def run_all(
        self, statements: Mapping[str, str], tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
    ) -> "dict[str, pa.Table]":
        values = checked_parameters(parameters)
        with self._connection(checked_tables(tables)) as connection:
            return {name: _answer(connection, sql, values) for name, sql in statements.items()}

    def run_each(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        return [self.run_all(statements, tables, parameters) for tables, parameters in cases]

    @contextmanager
    def _connection(self, tables: Mapping[str, Any]) -> "Iterator[duckdb.DuckDBPyConnection]":
        import duckdb

        with duckdb.connect(config={"threads": self.threads, "memory_limit": self.memory_limit}) as connection:
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
