"""Stage 4: labels joined with the features as they were at each row's moment, split by time."""

import datetime as dt
from dataclasses import dataclass
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
from mlops_dagster.lineage import quarantine, training_record
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
        before = files_read(spec, lake, context.resources.data_versions, window)
        entities, labelled = entity_rows(spec, lake, store.signature(spec.name), window)
        quarantine.require_recomputed(lake, spec.name, window)
        features = [name for name, _ in store.signature(spec.name).features]
        rows = joined(spec, features, store, entities, window)
        require_unchanged(spec, window, before, files_read(spec, lake, context.resources.data_versions, window))
        stored = lake.write(f"{spec.name}/{STAGE}/{rows_digest(rows)[:16]}.parquet", rows)
        manifest = _manifest(spec, features, rows, stored, window)
        manifest["inputs"] = _inputs(spec, lake, before, manifest, window)
        keys = [stored.key, manifest["inputs"]["key"]]
        manifest["dvc_commit"] = context.resources.data_versions.record(
            keys, f"{spec.name}: training set through {window[-1]}"
        ).commit
        version = write_manifest(lake, spec, STAGE, manifest)
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


@dataclass(frozen=True)
class FilesRead:
    """What the rows and features come from: stage -> key -> MD5, and the days that are in quarantine."""

    files: dict[str, dict[str, str]]
    without: list[dt.date]


def files_read(spec: ModelSpec, lake: Lake, versions: DataVersions, window: list[dt.date]) -> FilesRead:
    """What a training set over the window comes from, by the newest revision of now."""
    without = sorted(quarantine.days(lake, spec.name))
    return FilesRead(training_record.files_of(spec, versions, window, without), without)


def require_unchanged(spec: ModelSpec, window: list[dt.date], before: FilesRead, after: FilesRead) -> None:
    """Raises TransientError where a file was corrected, or a day taken out or back in, while the rows were read: nobody can tell then
    which content went in."""
    pairs = [(before.files[stage], after.files[stage]) for stage in before.files]
    changed = [key for old, new in pairs for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed += [
        f"quarantine of raw_data/{day}"
        for day in sorted((set(before.without) ^ set(after.without)) | (set(window) & set(before.without)))
    ]
    if changed:
        raise TransientError(
            f"{len(changed)} inputs of {spec.name} changed while its training set was made, for example {changed[0]}; wait until the "
            f"run that changes them has ended, then materialize {spec.name}/{STAGE} again"
        )


def _inputs(spec: ModelSpec, lake: Lake, before: FilesRead, manifest: dict[str, Any], window: list[dt.date]) -> dict[str, str]:
    """Store what the training set was made of; where that lies and its hash."""
    queries, without = load_callable(spec, "features.compute")(), before.without
    record = training_record.describe(spec, before.files, queries, tables(lake, spec), manifest, window, without)
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
