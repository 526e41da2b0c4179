"""Tables as Spark's temporary views, of one case or of several at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

CASE = "__case"


@contextmanager
def views(session: "SparkSession", tables: Mapping[str, Any]) -> Iterator[None]:
    """The tables under their names, until the block ends. Raises DataError for one that Spark cannot read."""
    made = []
    try:
        for name, table in tables.items():
            _frame(session, name, table).createOrReplaceTempView(name)
            made.append(name)
        yield
    finally:
        for name in made:
            session.catalog.dropTempView(name)


@contextmanager
def views_of_each(session: "SparkSession", cases: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """The tables of every case as `<name>__<position>`, all those of a name with one schema, which is found out once."""
    made = []
    try:
        for name in cases[0]:
            for position, frame in enumerate(_frames(session, name, [case[name] for case in cases])):
                made.append(_numbered(name, position))
                frame.createOrReplaceTempView(made[-1])
        yield
    finally:
        for name in made:
            session.catalog.dropTempView(name)


def united(statements: Sequence[str], tables: Sequence[str]) -> str:
    """One statement that answers all cases' statements; each sees the tables of its own case under their plain names."""
    branches = []
    for position, sql in enumerate(statements):
        own = ", ".join(f"{name} AS (SELECT * FROM {_numbered(name, position)})" for name in tables)
        inside = f"WITH {own} SELECT * FROM ({sql})" if own else sql
        branches.append(f"SELECT {position} AS {CASE}, * FROM ({inside})")
    return "\nUNION ALL\n".join(branches)


def apart(answer: "pa.Table", cases: int) -> "list[pa.Table]":
    """The answer to a united statement, case by case, in the order that the answer has."""
    from pyarrow import compute

    equal = getattr(compute, "equal")  # noqa: B009 (made when pyarrow is loaded, so that no type checker finds it)
    plain = answer.drop_columns([CASE])
    return [plain.filter(equal(answer[CASE], position)).combine_chunks() for position in range(cases)]


def _numbered(name: str, position: int) -> str:
    return f"{name}__{position}"


def _frames(session: "SparkSession", name: str, tables: Sequence[Any]) -> Iterator[Any]:
    import pyarrow as pa

    if all(isinstance(table, list) for table in tables):
        files = [*dict.fromkeys(file for table in tables for file in table)]
        schema = _frame(session, name, files).schema
        yield from (session.read.schema(schema).option("recursiveFileLookup", "true").parquet(*table) for table in tables)
        return
    schema = pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
    yield from (_frame(session, name, _filled(table, schema)) for table in tables)


def _filled(table: "pa.Table", schema: "pa.Schema") -> "pa.Table":
    """The table with all columns of the schema, those that it lacks null."""
    import pyarrow as pa

    columns = [table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema]
    return pa.table(columns, schema=schema)


def _frame(session: "SparkSession", name: str, table: Any) -> Any:
    try:
        if isinstance(table, list):
            return session.read.option("mergeSchema", "true").option("recursiveFileLookup", "true").parquet(*table)
        return session.createDataFrame(_spark_types(table))
    except Exception as error:  # an unreadable file and a type that Spark does not have
        raise DataError(
            f"table {name!r}: cannot be read by Spark ({first_line(error)}). Materialize those partitions again."
        ) from error


def _spark_types(table: "pa.Table") -> "pa.Table":
    """Spark knows neither unsigned integers nor nanoseconds."""
    import pyarrow as pa

    schema = []
    for field in table.schema:
        kind = field.type
        if pa.types.is_unsigned_integer(kind):
            kind = pa.int64()
        elif pa.types.is_timestamp(kind):
            kind = pa.timestamp("us", tz=kind.tz)
        elif pa.types.is_null(kind):
            kind = pa.string()
        schema.append(pa.field(field.name, kind))
    return table.cast(pa.schema(schema))


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
