"""Stage 12: how far the day's requests are from what the version was trained on."""

import datetime as dt
import json
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.lake_paths import canonical, day_key, day_range, stored_days
from mlops_dagster.assets.live_performance import hash_of
from mlops_dagster.assets.metadata import table
from mlops_dagster.assets.stage import check_result, days, stage
from mlops_dagster.core.drift import DriftOutcome, DriftVerdict, Profile, drifted
from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

STAGE = "drift_report"
CHECKS = {"psi": ("No feature and not the prediction is further than monitoring.max_psi from the training data.", False)}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, drift_report]`."""

    @stage(
        spec,
        STAGE,
        description="PSI of every feature and of the prediction over all rows; an Evidently report on a sample.",
        kinds={"evidently"},
        needs=["inference_log"],
        resources={"data_lake", "registry", "drift_reports"},
        partitioned=True,
        checks=CHECKS,
    )
    def drift_report(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        folder = reference_folder(spec, context.resources.registry)
        reference = Profile.from_dict(json.loads(lake.read_bytes(f"{folder}/reference_profile.json")))
        summary: dict[str, Any] = {}
        for day in days(context):
            summary, verdict = summarize(spec, lake, day, folder, reference)
            summary["report"] = _evidently(spec, context.resources.drift_reports, lake, day, folder, summary)
            lake.write_bytes(day_key(spec, STAGE, day, suffix="json"), canonical(summary))
            context.add_asset_metadata(_metadata(summary), partition_key=day.isoformat())
        return dg.MaterializeResult(data_version=dg.DataVersion(hash_of(summary)), check_results=[_check(verdict)])

    return drift_report


def reference_folder(spec: ModelSpec, registry: Any) -> str:
    """The lake folder of the champion's artifact, which holds its reference. Raises NotFoundError where nothing is deployed."""
    champion = next((v for v in registry.versions(spec.name) if "champion" in v.aliases), None)
    if champion is None:
        raise NotFoundError(
            f"{spec.name} has no champion to compare with; approve a version and materialize {spec.name}/deployment"
        )
    return f"{spec.name}/trained_model/{champion.digest}"


def observed(spec: ModelSpec, lake: Lake, day: dt.date) -> pa.Table:
    """The day's requests as a flat table: the features, the prediction and, for a classification, the score."""
    rows = lake.read(day_key(spec, "inference_log", day))
    rows = rows.filter(pc.invert(rows["shadow"]))
    features = rows["features"].combine_chunks()
    columns = {f.name: features.field(f.name) for f in rows.schema.field("features").type}
    kept = ["prediction"] if spec.training.task == "regression" else ["prediction", "score"]
    return pa.table({**columns, **{name: rows[name] for name in kept}})


def summarize(spec: ModelSpec, lake: Lake, day: dt.date, folder: str, reference: Profile) -> tuple[dict[str, Any], DriftVerdict]:
    """The day's profile, merged with those of its window, judged against the reference. A day already profiled is not read again."""
    wanted = set(day_range(day - dt.timedelta(days=spec.monitoring.window_days - 1), day))
    window = [d for d in stored_days(lake, spec, "inference_log") if d in wanted]
    profiles = {d: _profile(spec, lake, d, folder, reference, fresh=d == day) for d in window}
    merged = Profile.merge(profiles.values())
    judged = [c for c in reference.columns if c not in spec.monitoring.exclude]
    verdict = drifted(reference.select(judged), merged.select(judged), spec.monitoring.max_psi, spec.monitoring.minimum_rows)
    everything = drifted(reference, merged, spec.monitoring.max_psi, 1) if merged.rows else verdict
    summary = {
        "day": day.isoformat(),
        "reference": folder,
        "profile": profiles[day].to_dict(),
        "rows": profiles[day].rows,
        "window_rows": merged.rows,
        "window_days": len(window),
        "outcome": verdict.outcome.value,
        "drifted": list(verdict.drifted_columns),
        "reasons": [f"{name}: {verdict.columns[name].reason}" for name in verdict.drifted_columns] or list(verdict.reasons),
        "psi": {name: column.psi for name, column in everything.columns.items()},
        "effect": {name: column.effect for name, column in everything.columns.items()},
    }
    return summary, verdict


def _profile(spec: ModelSpec, lake: Lake, day: dt.date, folder: str, reference: Profile, fresh: bool) -> Profile:
    """The day's profile in the reference's cells: as stored, or counted anew for the day itself or for another reference."""
    if not fresh and lake.list(key := day_key(spec, STAGE, day, suffix="json")):
        stored = json.loads(lake.read_bytes(key))
        if stored["reference"] == folder:
            return Profile.from_dict(stored["profile"])
    return Profile.of(observed(spec, lake, day), like=reference)


def _evidently(spec: ModelSpec, reports: Any, lake: Lake, day: dt.date, folder: str, summary: dict[str, Any]) -> str | None:
    """Write the HTML report of the day; None for a day without requests."""
    current = observed(spec, lake, day)
    if current.num_rows == 0:
        return None
    reference = lake.read(f"{folder}/reference_sample.parquet").select(current.column_names)
    return str(reports.write(spec.name, day, reference, current, summary["psi"]).path)


def _metadata(summary: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {"column": name, "psi": psi, "without_sampling_bias": summary["effect"][name], "drifted": name in summary["drifted"]}
        for name, psi in sorted(summary["psi"].items(), key=lambda item: -item[1])
    ]
    return {
        "dagster/partition_row_count": summary["rows"],
        "outcome": summary["outcome"],
        "largest_psi": max(summary["psi"].values(), default=0.0),
        "window": f"{summary['window_rows']} rows of {summary['window_days']} days",
        **({"psi": table(rows)} if rows else {}),
        **({"report": dg.MetadataValue.path(summary["report"])} if summary["report"] else {}),
    }


def _check(verdict: DriftVerdict) -> dg.AssetCheckResult:
    inconclusive = verdict.outcome is DriftOutcome.INCONCLUSIVE
    drifted_columns = list(verdict.drifted_columns)
    because = f"{len(verdict.columns)} columns within the limit"
    if drifted_columns:
        worst = "; ".join(f"{name}: {verdict.columns[name].reason}" for name in drifted_columns[:3])
        because = f"{len(drifted_columns)} of {len(verdict.columns)} columns drifted ({', '.join(drifted_columns)}). {worst}"
    elif inconclusive:
        because = f"INCONCLUSIVE: {'; '.join(verdict.reasons[:3])}"
    return check_result("psi", not drifted_columns, because, {"drifted": drifted_columns}, warn=inconclusive)
