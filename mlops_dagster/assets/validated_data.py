"""Stage 2: the rows that pass the model's schema; the others are kept beside them with the reason."""

import datetime as dt
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.lake_paths import day_key, digest_of, tables
from mlops_dagster.assets.metadata import column_schema
from mlops_dagster.assets.references import load
from mlops_dagster.assets.stage import check_result, days, stage
from mlops_dagster.core.errors import DataError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import origins
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_lake.parquet import from_parquet

if TYPE_CHECKING:
    import pandas as pd

STAGE = "validated_data"
CHECKS = {"rejected_share": ("The schema rejects no more than source.max_rejected_share of a day's rows.", True)}


@dataclass(frozen=True)
class Validation:
    """One table of one day: what passed, what did not and why."""

    table: str
    accepted: pa.Table
    rejected: pa.Table
    reasons: dict[str, int]
    raw: tuple[str, str] | None = None
    """Key and MD5 of the raw partition that was read."""

    @property
    def rejected_share(self) -> float:
        total = self.accepted.num_rows + self.rejected.num_rows
        return self.rejected.num_rows / total if total else 0.0


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, validated_data]`."""

    @stage(
        spec,
        STAGE,
        description="The rows that meet the schema; rejected rows lie in `rejected_rows` with their reasons.",
        kinds={"pandera", "parquet"},
        needs=["raw_data"],
        resources={"data_lake", "data_versions"},
        partitioned=True,
        checks=CHECKS,
        code=["source.schema"],
    )
    def validated_data(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        schemas = _schemas(spec, tables(lake, spec))
        made = {day: _validate_day(spec, lake, schemas, day) for day in days(context)}
        for day, results in made.items():
            for result in results:
                if result.rejected.num_rows:
                    lake.write(day_key(spec, "rejected_rows", day, result.table), result.rejected)
        verdict = _share_check(spec, made)
        yield verdict
        if not verdict.passed:
            raise dg.Failure(f"{spec.name}/{STAGE}: {verdict.description}", allow_retries=False)
        stored = [lake.write(day_key(spec, STAGE, d, r.table), r.accepted) for d, results in made.items() for r in results]
        made_of = [origins.store(lake, spec.name, STAGE, d, dict(r.raw for r in rs if r.raw)) for d, rs in made.items()]
        context.resources.data_versions.record([*(f.key for f in stored), *made_of], f"{spec.name}: validated data")
        for day, results in made.items():
            context.add_asset_metadata(_day_metadata(results), partition_key=day.isoformat())
        yield dg.MaterializeResult(
            metadata={"dagster/column_schema": column_schema(made[max(made)][0].accepted)},
            data_version=dg.DataVersion(digest_of(f.sha256 for f in stored)),
        )

    return validated_data


def _schemas(spec: ModelSpec, names: list[str]) -> dict[str, Any]:
    declared = load(spec, "source.schema")
    schemas = declared if isinstance(declared, dict) else {names[0]: declared}
    unknown = sorted(schemas.keys() - set(names))
    if unknown:
        raise DataError(f"source.schema names the tables {unknown}, source.read returns {names}; make them the same")
    return {n: s.to_schema() if hasattr(s, "to_schema") else s for n, s in schemas.items()}


def _validate_day(spec: ModelSpec, lake: Lake, schemas: dict[str, Any], day: dt.date) -> list[Validation]:
    results = []
    for position, name in enumerate(tables(lake, spec)):
        key = day_key(spec, "raw_data", day, name)
        content = lake.read_bytes(key)
        rows = from_parquet(key, pa.BufferReader(content), None)
        if position == 0:
            require_columns(spec, name, rows)
        results.append(replace(validate(name, schemas.get(name), rows), raw=(key, origins.md5(content))))
    return results


def require_columns(spec: ModelSpec, name: str, rows: pa.Table) -> None:
    """The main table has what the platform joins by. Raises DataError naming field and columns."""
    wanted = {"id": "the key of a row", "event_timestamp": "the moment of prediction", spec.label.column: "label.column"}
    wanted |= {c: "source.known_after" for pair in spec.source.known_after.items() for c in pair}
    missing = {c: why for c, why in wanted.items() if c not in rows.column_names}
    if missing:
        named = ", ".join(f"{c!r} ({why})" for c, why in missing.items())
        raise DataError(f"table {name!r} of {spec.name} lacks {named}; source.read returns: {', '.join(rows.column_names)}")
    kind = rows.schema.field("event_timestamp").type
    if not pa.types.is_timestamp(kind) or kind.tz is None:
        raise DataError(f"column 'event_timestamp' of table {name!r} is {kind}; make it a timestamp with a time zone (UTC)")


def validate(name: str, schema: Any, rows: pa.Table) -> Validation:
    """Divide rows by a Pandera schema (pandas or Polars); no schema accepts all."""
    none = rows.slice(0, 0).append_column("reason", pa.array([], pa.string()))
    if schema is None or rows.num_rows == 0:
        return Validation(name, rows, none, {})
    reasons = _reasons(schema, rows)
    if not reasons:
        return Validation(name, rows, none, {})
    bad = sorted(reasons)
    keep = pa.array([i not in reasons for i in range(rows.num_rows)])
    rejected = rows.take(pa.array(bad)).append_column("reason", pa.array(["; ".join(reasons[i]) for i in bad]))
    counts: dict[str, int] = {}
    for texts in reasons.values():
        for text in texts:
            counts[text] = counts.get(text, 0) + 1
    return Validation(name, rows.filter(keep), rejected, counts)


def _reasons(schema: Any, rows: pa.Table) -> dict[int, list[str]]:
    """Row number -> why the schema refuses it. A fault of the whole table (a missing column, a wrong type) raises DataError."""
    from pandera.errors import SchemaErrors

    polars_backed = type(schema).__module__.startswith("pandera.api.polars")
    frame = _polars(rows) if polars_backed else rows.to_pandas()
    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        return _by_row(error.failure_cases.to_pandas() if polars_backed else error.failure_cases)
    return {}


def _polars(rows: pa.Table) -> Any:
    import polars as pl

    return pl.DataFrame(rows)


def _by_row(cases: "pd.DataFrame") -> dict[int, list[str]]:
    reasons: dict[int, list[str]] = {}
    for case in cases.to_dict("records"):
        text = f"{case['column']}: {case['check']}" if case.get("column") else str(case["check"])
        if case.get("index") is None or case["index"] != case["index"]:
            raise DataError(f"source.schema: {text}, found {case['failure_case']!r}; correct the source or the schema")
        reasons.setdefault(int(case["index"]), []).append(text)
    return reasons


def _day_metadata(results: list[Validation]) -> dict[str, Any]:
    return {
        "dagster/partition_row_count": results[0].accepted.num_rows,
        "accepted": {r.table: r.accepted.num_rows for r in results},
        "rejected": {r.table: r.rejected.num_rows for r in results},
        "reasons": {r.table: r.reasons for r in results if r.reasons},
    }


def _share_check(spec: ModelSpec, made: dict[dt.date, list[Validation]]) -> dg.AssetCheckResult:
    limit = spec.source.max_rejected_share
    over = [(day, r) for day, results in made.items() for r in results if r.rejected_share > limit]
    worst = max((r.rejected_share for results in made.values() for r in results), default=0.0)
    because = f"at most {worst:.1%} of a day's rows rejected, limit {limit:.1%}"
    if over:
        day, r = over[0]
        top = ", ".join(f"{text} ({n} rows)" for text, n in sorted(r.reasons.items(), key=lambda item: -item[1])[:3])
        because = (
            f"{day}: {r.rejected_share:.1%} of {r.table!r} rejected, limit source.max_rejected_share {limit:.1%}: {top}. "
            f"The rows and reasons are in {day_key(spec, 'rejected_rows', day, r.table)}; nothing was accepted. Correct the source or the schema"
        )
    return check_result("rejected_share", not over, because, {"worst_share": worst})
