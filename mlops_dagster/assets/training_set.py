"""Stage 4: labels joined with the features as they were at each row's moment, split by time."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets import late_data, leakage
from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.lake_paths import day_key, day_range, stored_days, tables, write_manifest
from mlops_dagster.assets.metadata import column_schema, picture
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.stage import check_result, stage
from mlops_dagster.core.errors import DataError, NotFoundError, TransientError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.lineage import origins, quarantine, training_record
from mlops_dagster.lineage.training_record import Inputs
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions

STAGE = "training_set"
CHECKS = {
    "no_future_data": ("Features recomputed with everything later than a moment masked are the same up to that moment.", True),
    "label_share": ("Enough rows are labelled, and no class is all or nothing.", True),
}
LEAST_LABELLED = 0.5


class TrainingSetConfig(dg.Config):
    """Which days a training set covers."""

    through: str = ""
    """Last day (YYYY-MM-DD); empty: the newest validated day."""


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, training_set]`."""

    @stage(
        spec,
        STAGE,
        description="Point-in-time join of labels and features; the last days are held out. Its hash identifies it.",
        kinds={"feast", "parquet"},
        needs=["validated_data", "features", late_data.CORRECTIONS],
        resources={"data_lake", "data_versions", f"feature_engine_{spec.features.engine}", "feature_store"},
        checks=CHECKS,
    )
    def training_set(context: dg.AssetExecutionContext, config: TrainingSetConfig):
        lake, store = context.resources.data_lake, context.resources.feature_store
        engine = getattr(context.resources, f"feature_engine_{spec.features.engine}")
        window = covered_days(spec, lake, config.through)
        versions = context.resources.data_versions
        before = inputs_now(spec, lake, versions, window)
        entities, labelled = entity_rows(spec, lake, store.signature(spec.name), window)
        quarantine.require_recomputed(lake, spec.name, window)
        features = [name for name, _ in store.signature(spec.name).features]
        rows = joined(spec, features, store, entities, window)
        with quarantine.undecided(versions, spec.name):  # so that the revision that records it has the features it was made of
            require_unchanged(spec, lake, versions, window, before)
            stored = lake.write(f"{spec.name}/{STAGE}/{rows_digest(rows)[:16]}.parquet", rows)
            manifest = _manifest(spec, features, rows, stored, window)
            manifest["inputs"] = _inputs(spec, context.resources, before, manifest, window)
            keys = [stored.key, manifest["inputs"]["key"]]
            manifest["dvc_commit"] = versions.record(keys, f"{spec.name}: training set through {window[-1]}").commit
        version = write_manifest(lake, spec, STAGE, manifest)
        # After the manifest, as raw data looks for the manifest after it has recorded: of the two, one sees the other.
        if corrected := late_data.correction(spec, lake, versions):
            context.log_event(corrected)
        return dg.MaterializeResult(
            metadata=_metadata(spec, rows, manifest),
            data_version=dg.DataVersion(version),
            check_results=[leakage.check(spec, lake, engine, window), _label_check(spec, rows, labelled)],
        )

    return training_set


def covered_days(spec: ModelSpec, lake: Lake, through: str) -> list[dt.date]:
    """The stored days of the window that ends with `through`. Raises NotFoundError or DataError."""
    stored = stored_days(lake, spec, "validated_data", tables(lake, spec)[0])
    if not stored:
        raise NotFoundError(f"{spec.name} has no validated day; materialize {spec.name}/validated_data first")
    last = dt.date.fromisoformat(through) if through else stored[-1]
    wanted = set(day_range(last - dt.timedelta(days=spec.training.window_days - 1), last))
    window = [day for day in stored if day in wanted]
    if len(window) <= spec.training.test_days:
        raise DataError(
            f"training.window_days {spec.training.window_days} up to {last} has {len(window)} stored days, training.test_days are "
            f"{spec.training.test_days}; ingest more days or lower test_days"
        )
    return window


def entity_rows(spec: ModelSpec, lake: Lake, signature: Any, window: list[dt.date]) -> tuple[pa.Table, float]:
    """The labelled rows of the main table with what Feast joins by, and the share of rows that are labelled. Raises DataError."""
    request = [name for name, _ in signature.request]
    late = [name for name in request if name in spec.source.known_after]
    if late:
        raise DataError(
            f"{late} are request-time values of {spec.name}, but source.known_after says that they are known only later"
        )
    wanted = ["id", "event_timestamp", *signature.entities, *request, spec.label.column]
    main = tables(lake, spec)[0]
    rows = lake.read([day_key(spec, "validated_data", day, main) for day in window])
    missing = [c for c in dict.fromkeys(wanted) if c not in rows.column_names]
    if missing:
        raise DataError(f"table {main!r} lacks {missing}, which {spec.name} needs (join keys, request-time values, label)")
    labelled = rows.select(list(dict.fromkeys(wanted))).filter(pc.is_valid(rows[spec.label.column]))
    return labelled, labelled.num_rows / max(rows.num_rows, 1)


def joined(spec: ModelSpec, names: list[str], store: Any, entities: pa.Table, window: list[dt.date]) -> pa.Table:
    """Entity rows with the features at their moments and a column `split` (train or test), in the order of the entity rows."""
    rows = store.historical(spec.name, entities)
    first_test = spec.source.partitions.bounds(window[-spec.training.test_days])[0]
    moment = rows["event_timestamp"].cast(pa.timestamp("us", "UTC"))
    split = pc.if_else(pc.less(moment, pa.scalar(first_test, pa.timestamp("us", "UTC"))), "train", "test")
    keep = [c for c in entities.column_names if c not in names]
    columns = {c: rows[c] for c in [*keep, *names]} | {"split": split}
    return pa.table(columns)


def rows_digest(rows: pa.Table) -> str:
    """SHA-256 of the rows in Arrow's IPC form: identifies a training set whatever file it is in."""
    import hashlib

    sink = pa.BufferOutputStream()
    plain = rows.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def inputs_now(spec: ModelSpec, lake: Lake, versions: DataVersions, window: list[dt.date]) -> Inputs:
    """What a training set over the window reads, by the newest revision of now."""
    without = sorted(quarantine.days(lake, spec.name))
    files = {s: origins.recorded(versions, spec.name, s, *span) for s, span in _spans(spec, window, without).items()}
    raw, other = origins.raw_used(lake, versions, spec.name, window, spec.features.lookback_days, without)
    return Inputs(files, raw, other, without)


def _spans(
    spec: ModelSpec, window: list[dt.date], without: Sequence[dt.date]
) -> dict[str, tuple[dt.date, dt.date, Sequence[dt.date]]]:
    """Stage -> first and last day that are read of it, and the days that are left out."""
    first, last = training_record.reach(window[0], window[-1], spec.features.lookback_days)
    return {"validated_data": (window[0], last, without), "features": (first, last, [])}


def require_unchanged(spec: ModelSpec, lake: Lake, versions: DataVersions, window: list[dt.date], before: Inputs) -> None:
    """Raises TransientError where a file was corrected, or a day taken out or back in, while the rows were read: nobody can tell then
    which content went in. Raw data may change: what the rows and features were computed from was kept with them."""
    for name, span in _spans(spec, window, before.quarantined).items():
        origins.require_recorded(lake, versions, spec.name, name, before.files[name], span, f"{spec.name}/{STAGE}")
    out = set(before.quarantined)
    if days := sorted((out ^ quarantine.days(lake, spec.name)) | (set(window) & out)):
        raise TransientError(
            f"quarantine of raw_data/{', '.join(map(str, days))} of {spec.name} changed while its training set was made; materialize "
            f"{spec.name}/{STAGE} again"
        )


def _inputs(spec: ModelSpec, resources: Any, read: Inputs, manifest: dict[str, Any], window: list[dt.date]) -> dict[str, str]:
    """Store what the training set was made of; where that lies and its hash."""
    lake, lifetimes = resources.data_lake, resources.feature_store.lifetimes(spec.name)
    queries = load_callable(spec, "features.compute")()
    record = training_record.describe(spec, read, queries, lifetimes, tables(lake, spec), manifest, window)
    return training_record.store(lake, spec.name, record)


def _manifest(spec: ModelSpec, features: list[str], rows: pa.Table, stored: Any, window: list[dt.date]) -> dict[str, Any]:
    split = rows["split"].to_numpy(zero_copy_only=False)
    return {
        "key": stored.key,
        "features": features,
        "sha256": stored.sha256,
        "training_set": rows_digest(rows),
        "first_day": window[0].isoformat(),
        "last_day": window[-1].isoformat(),
        "first_test_day": window[-spec.training.test_days].isoformat(),
        "rows": rows.num_rows,
        "train_rows": int((split == "train").sum()),
        "test_rows": int((split == "test").sum()),
    }


def _metadata(spec: ModelSpec, rows: pa.Table, manifest: dict[str, Any]) -> dict[str, Any]:
    label = rows[spec.label.column].cast(pa.float64()).to_numpy()
    return {
        **{k: v for k, v in manifest.items() if k != "rows"},
        "dagster/row_count": rows.num_rows,
        "dagster/column_schema": column_schema(rows),
        "label_mean": float(label.mean()),
        "label": picture(lambda axes: _draw_label(axes, label), f"Distribution of {spec.label.column}"),
    }


def _draw_label(axes: Any, label: Any) -> None:
    axes.hist(label, bins=50)
    axes.set_xlabel("value")
    axes.set_ylabel("rows")


def _label_check(spec: ModelSpec, rows: pa.Table, labelled: float) -> dg.AssetCheckResult:
    label = rows[spec.label.column]
    distinct = pc.count_distinct(label).as_py()
    passed = labelled >= LEAST_LABELLED and distinct > 1
    because = f"{labelled:.1%} of the rows are labelled (least {LEAST_LABELLED:.0%}), {distinct} different labels (least 2)"
    return check_result("label_share", passed, because, {"labelled_share": labelled, "rows": rows.num_rows})
