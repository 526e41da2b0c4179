"""Features by Spark, in this process or on a cluster: DuckDB's SQL, translated by sqlglot."""

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from dagster import ConfigurableResource
from pydantic import Field

from mlops_dagster.core.errors import DeclarationError, ServingError
from mlops_dagster.resources.feature_engine import Case, spark_tables
from mlops_dagster.resources.feature_engine.answers import checked_parameters, checked_tables, normal, wrong
from mlops_dagster.resources.feature_engine.spark_tables import first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession
    from sqlglot import exp


CASES_AT_ONCE = 16  # Spark's planner takes longer than a job does from about a hundred branches on


class SparkEngine(ConfigurableResource):
    """FeatureEngine on Spark. Raises ServingError when there is no Java or the cluster does not answer.

    In this process sums of floats are the same bits each time. On a cluster they are added in the order in which the executors' parts
    arrive and may differ in the last bit; round them in the SQL where features must be made again bit for bit.
    """

    master: str = Field(
        default="local[2]", description="local[N] in this process, or the address of Spark Connect: sc://host:15002."
    )
    settings: dict[str, str] = Field(default_factory=dict, description="Further Spark settings, by their full names.")

    def run(self, sql: str, tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> "pa.Table":
        return self.run_all({"": sql}, tables, parameters)[""]

    def run_all(
        self, statements: Mapping[str, str], tables: Mapping[str, Any], parameters: Mapping[str, Any] | None = None
    ) -> "dict[str, pa.Table]":
        values = checked_parameters(parameters)
        inputs = checked_tables(tables)
        translated = {name: translate(sql, values) for name, sql in statements.items()}
        session = self._session()
        with spark_tables.views(session, inputs):
            return {name: _answer(session, statements[name], sql, sorted(inputs)) for name, sql in translated.items()}

    def run_each(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        """Up to CASES_AT_ONCE cases are one Spark statement: planning and starting a job costs more than a day's rows."""
        found: list[dict[str, pa.Table]] = []
        for begin in range(0, len(cases), CASES_AT_ONCE):
            some = cases[begin : begin + CASES_AT_ONCE]
            found += [self.run_all(statements, *some[0])] if len(some) == 1 else self._at_once(statements, some)
        return found

    def _at_once(self, statements: Mapping[str, str], cases: Sequence[Case]) -> "list[dict[str, pa.Table]]":
        inputs = [checked_tables(tables) for tables, _ in cases]
        values = [checked_parameters(parameters) for _, parameters in cases]
        tables = sorted(inputs[0])
        united = {name: spark_tables.united([translate(sql, one) for one in values], tables) for name, sql in statements.items()}
        session = self._session()
        with spark_tables.views_of_each(session, inputs):
            answers = {name: _answer(session, statements[name], sql, tables) for name, sql in united.items()}
        apart = {name: spark_tables.apart(answer, len(cases)) for name, answer in answers.items()}
        return [{name: tables[position] for name, tables in apart.items()} for position in range(len(cases))]

    def _session(self) -> "SparkSession":
        from pyspark.sql import SparkSession

        settings = {
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.enabled": "false",
            "spark.sql.execution.arrow.pyspark.enabled": "true",
            **self.settings,
        }
        if self.master.startswith("sc://"):
            builder = SparkSession.builder.remote(self.master)
        else:
            _require_java()
            builder = SparkSession.builder.master(self.master).config("spark.ui.enabled", "false")
            builder = builder.config("spark.ui.showConsoleProgress", "false").config("spark.sql.shuffle.partitions", "2")
            builder = builder.config("spark.driver.bindAddress", "127.0.0.1").config("spark.driver.host", "127.0.0.1")
        for name, value in settings.items():
            builder = builder.config(name, value)
        try:
            return builder.appName("mlops_dagster features").getOrCreate()
        except Exception as error:  # py4j and gRPC each raise their own
            raise ServingError(
                f"Spark at {self.master!r}: does not start or answer ({error}). Check its address and its log."
            ) from error


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if not (os.path.exists(os.path.join(home, "bin", "java")) if home else shutil.which("java")):
        raise ServingError(
            "features.engine 'spark': there is no Java here. Install one (Debian: openjdk-17-jre-headless), point JAVA_HOME at it, "
            "or use the engine 'duckdb'."
        )


def _answer(session: "SparkSession", sql: str, translated: str, tables: list[str]) -> "pa.Table":
    try:
        return normal(session.sql(translated).toArrow())
    except Exception as error:  # analysis and run time errors come in many classes
        raise wrong(
            sql, RuntimeError(first_line(error)), f"The tables are: {', '.join(tables)}. For Spark it reads:\n{translated}\n"
        ) from error


def translate(sql: str, values: Mapping[str, Any]) -> str:
    """One SELECT of DuckDB's dialect in Spark's, with the parameters put in as literals."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        parsed = [statement for statement in sqlglot.parse(sql, read="duckdb") if statement is not None]
    except SqlglotError as error:
        raise wrong(sql, error, "It is not DuckDB's SQL.") from error
    if len(parsed) != 1 or not isinstance(parsed[0], exp.Query):
        raise DeclarationError(f"features.compute: needs one SELECT statement. The SQL was:\n{sql.strip()}")

    def filled(node: "exp.Expr") -> "exp.Expr":
        if not isinstance(node, (exp.Parameter, exp.Placeholder)):
            return node
        name = node.name
        if name not in values:
            known = ", ".join(f"${one}" for one in sorted(values))
            raise DeclarationError(f"features.compute: no parameter ${name}. There are: {known}.")
        return _literal(values[name])

    return parsed[0].transform(filled).sql(dialect="spark")


def _literal(value: Any) -> "exp.Expr":
    from sqlglot import exp

    if isinstance(value, datetime):
        return exp.cast(exp.Literal.string(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00:00")), "TIMESTAMPTZ")
    if isinstance(value, date):
        return exp.cast(exp.Literal.string(value.isoformat()), "DATE")
    return exp.convert(value)
