"""Stage 1: the source's rows of a day, as Parquet in the lake, versioned by DVC."""

import datetime as dt
import json
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets import late_data
from mlops_dagster.assets.lake_paths import day_key, digest_of, stored_days
from mlops_dagster.assets.metadata import column_schema
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.stage import check_result, days, stage
from mlops_dagster.core.errors import DataError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake, StoredFile

STAGE = "raw_data"
CHECKS = {
    "not_empty": ("Every day has rows.", False),
    "columns_and_types": ("Columns and types are those of the first stored day.", True),
}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, raw_data]`."""

    @stage(
        spec,
        STAGE,
        description="The source's rows of a day as they came, content-addressed.",
        kinds={"parquet", "dvc"},
        resources={"data_lake", "data_versions"},
        partitioned=True,
        checks=CHECKS,
        code=["source.read"],
    )
    def raw_data(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        read = load_callable(spec, "source.read")
        made = {day: read_day(spec, read, day) for day in days(context)}
        lake.write_bytes(f"{spec.name}/{STAGE}/tables.json", json.dumps(list(next(iter(made.values())))).encode())
        stored = {day: [lake.write(day_key(spec, STAGE, day, n), t) for n, t in tables.items()] for day, tables in made.items()}
        revision = context.resources.data_versions.record(
            [f.key for files in stored.values() for f in files], f"{spec.name}: raw data"
        )
        if corrected := late_data.correction(spec, lake, context.resources.data_versions, revision.files):
            context.log_event(corrected)
        for day, files in stored.items():
            context.add_asset_metadata(_day_metadata(made[day], files, revision.commit), partition_key=day.isoformat())
        return dg.MaterializeResult(
            metadata={"dagster/column_schema": column_schema(next(iter(made[max(made)].values())))},
            data_version=dg.DataVersion(digest_of(f.sha256 for files in stored.values() for f in files)),
            check_results=[_not_empty(made), _same_columns(lake, spec, made)],
        )

    return raw_data


def read_day(spec: ModelSpec, read: Any, day: dt.date) -> dict[str, pa.Table]:
    """One day from the user's function, as Arrow tables. Raises DataError."""
    result = read(day)
    named = result if isinstance(result, dict) else {"rows": result}
    tables = {}
    for name, table in named.items():
        if table is None or not hasattr(table, "__arrow_c_stream__"):
            raise DataError(
                f"source.read returned {type(table).__name__} for {day} (table {name!r}); return a pyarrow, polars or pandas table, "
                "empty where the day has no rows"
            )
        tables[name] = plain_types(pa.table(table))
    return tables


def plain_types(table: pa.Table) -> pa.Table:
    """The table in the types that every engine shares: timestamps in microseconds (which Feast can store), one string type."""
    return table.cast(pa.schema([f.with_type(_plain(f.type)) for f in table.schema]), safe=False)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    return kind


def _day_metadata(tables: dict[str, pa.Table], files: list[StoredFile], commit: str) -> dict[str, Any]:
    rows = [table.num_rows for table in tables.values()]
    return {
        "dagster/partition_row_count": rows[0],
        "rows": dict(zip(tables, rows, strict=True)),
        "sha256": {file.key: file.sha256 for file in files},
        "bytes": sum(file.bytes for file in files),
        "dvc_commit": commit,
    }


def _not_empty(made: dict[dt.date, dict[str, pa.Table]]) -> dg.AssetCheckResult:
    empty = [f"{day} {name}" for day, tables in made.items() for name, table in tables.items() if table.num_rows == 0]
    because = (
        f"no rows: {', '.join(empty[:10])}; is the source late or the day wrong?" if empty else f"{len(made)} day(s) have rows"
    )
    return check_result("not_empty", not empty, because, {"empty": empty})


def _same_columns(lake: Lake, spec: ModelSpec, made: dict[dt.date, dict[str, pa.Table]]) -> dg.AssetCheckResult:
    """Compare each table with the first day that the lake has of it."""
    different = []
    for name in next(iter(made.values())):
        first = lake.read(day_key(spec, STAGE, stored_days(lake, spec, STAGE, name)[0], name)).schema
        expected = {f.name: str(f.type) for f in first}
        for day, tables in made.items():
            found = {f.name: str(f.type) for f in tables[name].schema} if name in tables else {}
            different += [
                f"{day} {name}.{column}: {expected.get(column, 'absent')} became {found.get(column, 'absent')}"
                for column in sorted(expected.keys() | found.keys())
                if expected.get(column) != found.get(column)
            ]
    because = "; ".join(different[:10]) or "as on the first stored day"
    return check_result("columns_and_types", not different, because, {"different": different[:100]})
