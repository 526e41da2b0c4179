"""Stage 10: what was asked and answered on a day, collected from the servers' segments."""

import datetime as dt

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.lake_paths import day_key, digest_of
from mlops_dagster.assets.metadata import column_schema, table
from mlops_dagster.assets.smoke import REQUEST_ID_PREFIX
from mlops_dagster.assets.stage import check_result, days, stage
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage.request_search import store_index

STAGE = "inference_log"
CHECKS = {
    "volume": ("The day has requests, and no second more than monitoring.max_requests_per_second.", False),
    "p99_latency": ("99 % of the answers took at most monitoring.max_p99_latency_ms.", False),
}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, inference_log]`."""

    @stage(
        spec,
        STAGE,
        description="Every request of the day: id, version, arm, features, prediction, latency.",
        kinds={"parquet"},
        needs=["deployment"],
        resources={"data_lake", "inference_segments"},
        partitioned=True,
        checks=CHECKS,
    )
    def inference_log(context: dg.AssetExecutionContext):
        begun = dt.datetime.now(dt.UTC)
        made = {day: callers_only(context.resources.inference_segments.read(spec.name, day)) for day in days(context)}
        stored = [context.resources.data_lake.write(day_key(spec, STAGE, day), rows) for day, rows in made.items()]
        for day, rows in made.items():
            store_index(context.resources.data_lake, spec.name, day.isoformat(), rows, begun)
            context.add_asset_metadata(
                {"dagster/partition_row_count": rows.num_rows, "by_arm": table(_by_arm(rows))}, partition_key=day.isoformat()
            )
        newest = made[max(made)]
        return dg.MaterializeResult(
            metadata={"dagster/column_schema": column_schema(newest)},
            data_version=dg.DataVersion(digest_of(f.sha256 for f in stored)),
            check_results=[volume_check(spec, newest), latency_check(spec, newest)],
        )

    return inference_log


def callers_only(rows: pa.Table) -> pa.Table:
    """The log without the platform's own smoke predictions."""
    return rows.filter(pc.invert(pc.starts_with(rows["request_id"], REQUEST_ID_PREFIX)))


def _by_arm(rows: pa.Table) -> list[dict[str, str | int | float]]:
    grouped = rows.group_by(["version", "arm", "shadow"]).aggregate(
        [("latency_ms", "count"), ("latency_ms", "max"), ("latency_ms", "mean")]
    )
    return [
        {
            "version": str(row["version"]),
            "arm": str(row["arm"]),
            "shadow": bool(row["shadow"]),
            "requests": row["latency_ms_count"],
            "mean_ms": row["latency_ms_mean"],
            "max_ms": row["latency_ms_max"],
        }
        for row in grouped.sort_by("version").to_pylist()
    ]


def volume_check(spec: ModelSpec, rows: pa.Table) -> dg.AssetCheckResult:
    """A day without requests is a warning, as is a busiest second above the limit."""
    if rows.num_rows == 0:
        return check_result("volume", False, "no request was logged on this day; is anything sent to the deployment?", warn=True)
    second = pc.floor_temporal(rows["logged_at"], unit="second")
    busiest = pc.max(pc.value_counts(second.combine_chunks()).field("counts")).as_py()
    limit = spec.monitoring.max_requests_per_second
    because = f"{rows.num_rows} requests, {busiest} in the busiest second, limit {limit:g}"
    return check_result("volume", busiest <= limit, because, {"requests": rows.num_rows, "busiest_second": busiest}, warn=True)


def latency_check(spec: ModelSpec, rows: pa.Table) -> dg.AssetCheckResult:
    """P99 of what the servers measured, in milliseconds."""
    limit = spec.monitoring.max_p99_latency_ms
    if rows.num_rows == 0:
        return check_result("p99_latency", True, "no request, no latency")
    p99 = pc.quantile(rows["latency_ms"], 0.99)[0].as_py()
    return check_result("p99_latency", p99 <= limit, f"P99 {p99:.2f} ms, limit {limit:g} ms", {"p99_ms": p99})
