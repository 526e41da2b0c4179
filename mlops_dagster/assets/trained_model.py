"""Stage 6: the estimator, its ONNX twin (or its MLflow model), what it was trained on as a profile, and the tracked run."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from mlops_dagster.assets import provenance
from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.artifact_files import Answers, answers, folder_key, upload
from mlops_dagster.assets.lake_paths import canonical, read_manifest, require_same, write_manifest
from mlops_dagster.assets.plots import distributions
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.stage import check_result, stage
from mlops_dagster.core.drift import Profile
from mlops_dagster.core.errors import DataError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.training import mlflow_export, onnx_export
from mlops_dagster.resources.training.onnx_export import Difference
from mlops_dagster.serving.artifact import FEATURES_FILE, MODEL_FILE, Feature, RequestInput, Signature, digest, write_signature

STAGE = "trained_model"
CHECKS = {
    "onnx": {"onnx_equals_native": ("The ONNX model answers what the native one does, on the held-out rows.", True)},
    "mlflow": {"mlflow_equals_native": ("MLflow's server answers what the estimator does, on the held-out rows.", True)},
}
SAMPLE_ROWS = 5_000


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, trained_model]`."""

    @stage(
        spec,
        STAGE,
        description="The trained estimator in the form that is served and its native one, with the reference profile for drift.",
        kinds={spec.training.format, "mlflow", *({spec.training.engine} - {"local"})},
        needs=["training_set", "best_parameters"],
        resources={"data_lake", "feature_store", "tracking", f"training_{spec.training.engine}"},
        checks=CHECKS[spec.training.format],
        code=["training.train", "training.export"],
    )
    def trained_model(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        training_set, best = read_manifest(lake, spec, "training_set"), read_manifest(lake, spec, "best_parameters")
        require_same("training_set", f"{spec.name}/best_parameters", best, f"{spec.name}/training_set", training_set)
        rows = lake.read(training_set["key"])
        estimator = fit(spec, context.resources, rows, training_set["features"], best["parameters"])
        signature = signature_of(spec, context.resources.feature_store.signature(spec.name), rows, estimator)
        definitions = context.resources.feature_store.definitions(spec.name)
        artifact, difference = store(spec, lake, estimator, signature, rows, definitions)
        manifest = {
            "digest": artifact,
            "native": keep_native(spec, lake, estimator, artifact),
            "training_set": training_set["training_set"],
            "parameters": best["parameters"],
            "code": provenance.keep(lake, spec, provenance.code_listing(spec)),
            "revision": provenance.code_revision(spec),
            "lock": provenance.keep(lake, spec, provenance.environment_listing()),
        }
        run = _track(spec, context.resources.tracking, manifest, training_set, signature)
        version = write_manifest(lake, spec, STAGE, {**manifest, "run_id": run.run_id})
        shown = {"mlflow": run.url_path, "feature_distributions": distributions(rows, training_set["features"])}
        return dg.MaterializeResult(
            metadata={**_metadata(manifest, signature, training_set), **shown},
            data_version=dg.DataVersion(version),
            check_results=[_same_answers(spec, difference)],
        )

    return trained_model


def fit(spec: ModelSpec, resources: Any, rows: pa.Table, features: list[str], parameters: dict[str, Any]) -> Any:
    """Train on the training rows only."""
    train = rows.filter(pc.equal(rows["split"], "train")).select([*features, spec.label.column])
    trainer = getattr(resources, f"training_{spec.training.engine}")
    return trainer.fit(load_callable(spec, "training.train"), train, spec.label.column, parameters)


def signature_of(spec: ModelSpec, declared: Any, rows: pa.Table, estimator: Any) -> Signature:
    """What the model takes and gives. Raises DataError for labels that are not numbers."""
    kind = rows.schema.field(spec.label.column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"label.column {spec.label.column!r} is {kind}; give classes as 0, 1, … and values as numbers in source.read"
        )
    # A column that never missed a value in training may still do so in service: only integers and booleans cannot hold NaN.
    features = tuple(Feature(name, dtype, nullable=dtype != "string") for name, dtype in declared.features)
    classes = _classes(estimator, rows[spec.label.column]) if spec.training.task == "classification" else None
    return Signature(
        model=spec.name,
        task=spec.training.task,
        features=features,
        entities=declared.entities,
        request=tuple(RequestInput(name, dtype) for name, dtype in declared.request),
        classes=classes,
        onnx_input="columns" if any(f.dtype == "string" for f in features) else "tensor",
        probabilities=spec.training.task == "classification" and hasattr(estimator, "predict_proba"),
    )


def _classes(estimator: Any, label: pa.ChunkedArray) -> tuple[Any, ...]:
    """What the estimator says its classes are; else the labels that occur, in order, as whole numbers where they are such."""
    if hasattr(estimator, "classes_"):
        return tuple(np.asarray(estimator.classes_).tolist())
    found = sorted(pc.unique(label.drop_null()).to_pylist())
    return tuple(int(c) if float(c).is_integer() else c for c in found)


def store(
    spec: ModelSpec, lake: Lake, estimator: Any, signature: Signature, rows: pa.Table, definitions: bytes
) -> tuple[str, Difference]:
    """Write the artifact to the lake; returns its digest and how far its answers on the held-out rows are from the estimator's."""
    features = rows.select([f.name for f in signature.features])
    with tempfile.TemporaryDirectory(prefix="mlops-artifact-") as temporary:
        folder = Path(temporary)
        write_model(spec, estimator, signature, folder)
        write_signature(folder, signature)
        (folder / FEATURES_FILE).write_bytes(definitions)
        given = answers(folder, digest(folder), rows)
        answered = with_answers(features, given)
        (folder / "reference_profile.json").write_bytes(canonical(Profile.of(answered).to_dict()))
        write_sample(answered, folder / "reference_sample.parquet")
        return upload(lake, spec, folder), _difference(spec, given, estimator, features, pc.equal(rows["split"], "test"))


def write_model(spec: ModelSpec, estimator: Any, signature: Signature, folder: Path) -> None:
    """Write the model in its declared format into an artifact folder."""
    if spec.training.format == "mlflow":
        mlflow_export.write(folder, estimator, signature, spec.package)
        return
    custom = load_callable(spec, "training.export") if spec.training.export else None
    (folder / MODEL_FILE).write_bytes(onnx_export.export(estimator, signature, custom))


def keep_native(spec: ModelSpec, lake: Lake, estimator: Any, artifact: str) -> str:
    """The lake's key of the pickled estimator: in the artifact itself, or stored beside it now."""
    if spec.training.format == "mlflow":
        return f"{folder_key(spec, artifact)}/{mlflow_export.ESTIMATOR_FILE}"
    key = f"{spec.name}/native_models/{artifact}.pkl"
    lake.write_bytes(key, pickle.dumps(estimator))
    return key


def _difference(spec: ModelSpec, given: Answers, estimator: Any, features: pa.Table, held_out: Any) -> Difference:
    """How far the artifact's answers on the held-out rows are from the estimator's own."""
    chosen = np.asarray(held_out.combine_chunks() if isinstance(held_out, pa.ChunkedArray) else held_out).astype(bool)
    probabilities = None if given.probabilities is None else given.probabilities[chosen]
    frame = features.filter(held_out).to_pandas()
    return onnx_export.difference(spec.training.task, given.prediction[chosen], probabilities, estimator, frame)


def with_answers(features: pa.Table, given: Answers) -> pa.Table:
    """The features with the columns `prediction` and, for two classes, `score`."""
    table = features.append_column("prediction", pa.array(given.prediction))
    return table if given.score is None else table.append_column("score", pa.array(given.score))


def write_sample(rows: pa.Table, file: Path) -> None:
    """Up to SAMPLE_ROWS rows, evenly spaced, as the reference of the drift reports."""
    import pyarrow.parquet as pq

    every = max(1, -(-rows.num_rows // SAMPLE_ROWS))
    pq.write_table(rows.take(pa.array(range(0, rows.num_rows, every))), file)


def _same_answers(spec: ModelSpec, found: Difference) -> dg.AssetCheckResult:
    because = f"{found.rows} rows: largest difference {found.largest:.2e}, {found.beyond} beyond the tolerance, {found.labels} other labels"
    return check_result(next(iter(CHECKS[spec.training.format])), found.within(), because)


def _track(spec: ModelSpec, tracking: Any, manifest: dict[str, Any], training_set: dict[str, Any], signature: Signature) -> Any:
    tags = {"training_set": manifest["training_set"], "artifact": manifest["digest"], "code": manifest["code"]}
    return tracking.log_run(
        spec.name,
        manifest["digest"],
        manifest["parameters"],
        {"train_rows": float(training_set["train_rows"]), "test_rows": float(training_set["test_rows"])},
        {f"mlops.{k}": v for k, v in tags.items()},
        {"signature.json": signature.to_json().encode()},
    )


def _metadata(manifest: dict[str, Any], signature: Signature, training_set: dict[str, Any]) -> dict[str, Any]:
    return {
        "digest": manifest["digest"],
        "parameters": manifest["parameters"],
        "features": [f.name for f in signature.features],
        "train_rows": training_set["train_rows"],
        "code": manifest["code"],
    }
