"""Stage 11: predictions joined with the labels as they land; provisional first, then final."""

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.lake_paths import canonical, day_key, day_range, stored_days, tables
from mlops_dagster.assets.metadata import table
from mlops_dagster.assets.scores import scores
from mlops_dagster.assets.stage import check_result, days, stage
from mlops_dagster.core.metrics import METRICS, PRIMARY
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

if TYPE_CHECKING:
    import polars as pl

STAGE = "live_performance"
CHECKS = {
    "online_accuracy": ("The primary metric is not further behind its held-out value than monitoring.max_accuracy_drop.", False)
}
COLUMNS = ["row_id", "version", "prediction", "score"]


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, live_performance]`."""

    @stage(
        spec,
        STAGE,
        description="Online metrics of the day and of the window that ends with it.",
        kinds={"parquet"},
        needs=["inference_log", "validated_data"],
        resources={"data_lake", "registry"},
        partitioned=True,
        checks=CHECKS,
    )
    def live_performance(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        held_out = {str(v.number): v.evidence["metrics"] for v in context.resources.registry.versions(spec.name)}
        summary: dict[str, Any] = {}
        for day in days(context):
            answered = labelled_rows(spec, lake, day)
            lake.write(day_key(spec, STAGE, day), answered)
            summary = summarize(spec, lake, day, held_out, now=dt.datetime.now(dt.UTC))
            lake.write_bytes(day_key(spec, STAGE, day, suffix="json"), canonical(summary))
            context.add_asset_metadata(_metadata(summary), partition_key=day.isoformat())
        return dg.MaterializeResult(data_version=dg.DataVersion(str(hash_of(summary))), check_results=[_check(spec, summary)])

    return live_performance


def labelled_rows(spec: ModelSpec, lake: Lake, day: dt.date) -> pa.Table:
    """The day's answers (shadow answers apart, the last one of a row id) with the label where it has landed."""
    import polars as pl

    log = pl.DataFrame(lake.read(day_key(spec, "inference_log", day))).filter(~pl.col("shadow"))
    log = log.sort("logged_at").unique("row_id", keep="last", maintain_order=True).select(COLUMNS)
    return with_labels(spec, lake, day, log).to_arrow()


def with_labels(spec: ModelSpec, lake: Lake, day: dt.date, answers: "pl.DataFrame") -> "pl.DataFrame":
    """The answers logged for a day with the column `label` (float), null where it has not landed."""
    import polars as pl

    main = tables(lake, spec)[0]
    # A row is filed under its own day, its request under that of its moment of prediction: neighbours may differ by one.
    around = set(day_range(day - dt.timedelta(days=1), day + dt.timedelta(days=1)))
    near = [day_key(spec, "validated_data", d, main) for d in stored_days(lake, spec, "validated_data", main) if d in around]
    if not near:
        return answers.with_columns(label=pl.lit(None, pl.Float64))
    labels = pl.DataFrame(lake.read(near, ["id", spec.label.column])).select(
        row_id=pl.col("id").cast(pl.String), label=pl.col(spec.label.column).cast(pl.Float64)
    )
    return answers.join(labels.unique("row_id", keep="last"), on="row_id", how="left", maintain_order="left")


def summarize(spec: ModelSpec, lake: Lake, day: dt.date, held_out: dict[str, Any], now: dt.datetime) -> dict[str, Any]:
    """The day's figures, the window's, and whether the newest version has fallen behind its held-out value."""
    rows = lake.read(day_key(spec, STAGE, day))
    labelled = rows.filter(pc.is_valid(rows["label"]))
    deadline = spec.source.partitions.bounds(day)[1] + dt.timedelta(hours=spec.label.lands_after_hours)
    final = labelled.num_rows == rows.num_rows or now >= deadline
    versions = {v: _metrics(spec, labelled, v) for v in sorted(pc.unique(labelled["version"]).to_pylist())}
    newest = max(versions, key=int, default=None)
    return {
        "day": day.isoformat(),
        "state": "final" if final else "provisional",
        "requests": rows.num_rows,
        "labelled": labelled.num_rows,
        "versions": versions,
        "window": window_figure(spec, lake, day, newest, held_out) if newest else None,
    }


def _metrics(spec: ModelSpec, rows: pa.Table, version: str) -> dict[str, float]:
    own = rows.filter(pc.equal(rows["version"], version))
    label, prediction = (own[c].cast(pa.float64()).to_numpy() for c in ("label", "prediction"))
    score = own["score"].cast(pa.float64()).to_numpy() if own["score"].null_count == 0 else None
    return {**scores(spec.training.task, label, prediction, score), "rows": float(own.num_rows)}


def window_figure(spec: ModelSpec, lake: Lake, day: dt.date, version: str, held_out: dict[str, Any]) -> dict[str, Any]:
    """The primary metric of one version over the window that ends with `day`, beside its held-out value.

    `violated` is None where the window has fewer than monitoring.minimum_rows labelled rows or nothing to compare with.
    """
    metric, limit = PRIMARY[spec.training.task], spec.monitoring.max_accuracy_drop
    wanted = set(day_range(day - dt.timedelta(days=spec.monitoring.window_days - 1), day))
    keys = [day_key(spec, STAGE, d) for d in stored_days(lake, spec, STAGE) if d in wanted]
    rows = lake.read(keys)
    own = rows.filter(pc.and_(pc.equal(rows["version"], version), pc.is_valid(rows["label"])))
    figure = {"metric": metric, "version": version, "rows": own.num_rows, "days": len(keys), "violated": None}
    expected = held_out.get(version, {}).get(metric)
    if own.num_rows < spec.monitoring.minimum_rows or expected is None:
        return figure | {
            "reason": f"{own.num_rows} labelled rows of version {version}, monitoring.minimum_rows {spec.monitoring.minimum_rows}"
        }
    value = _metrics(spec, own, version)[metric]
    behind = METRICS[metric].gain(expected, over=value)
    drop = behind if spec.training.task == "classification" else behind / max(expected, 1e-12)
    reason = f"{metric} {value:.4f} over {len(keys)} days, {expected:.4f} when held out: {drop:.4f} behind, limit {limit:g}"
    return figure | {"value": value, "expected": expected, "drop": drop, "violated": drop > limit, "reason": reason}


def hash_of(summary: dict[str, Any]) -> str:
    """SHA-256 of a summary's canonical JSON."""
    import hashlib

    return hashlib.sha256(canonical(json.loads(canonical(summary)))).hexdigest()


def _metadata(summary: dict[str, Any]) -> dict[str, Any]:
    per_version = [{"version": v, **m} for v, m in summary["versions"].items()]
    window = summary["window"] or {}
    return {
        "state": summary["state"],
        "requests": summary["requests"],
        "labelled": summary["labelled"],
        **({"by_version": table(per_version)} if per_version else {}),
        **({"window": window["reason"]} if window else {}),
        **({window["metric"]: window["value"]} if "value" in window else {}),
    }


def _check(spec: ModelSpec, summary: dict[str, Any]) -> dg.AssetCheckResult:
    window = summary["window"]
    if window is None:
        return check_result("online_accuracy", True, "INCONCLUSIVE: no label has landed yet", warn=True)
    if window["violated"] is None:
        return check_result("online_accuracy", True, f"INCONCLUSIVE: {window['reason']}", warn=True)
    return check_result("online_accuracy", not window["violated"], window["reason"], {"drop": window["drop"]})
