"""Stage 7: the version on the held-out rows, beside the naive rule and the champion, against the gate."""

from dataclasses import asdict
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.artifact_files import Answers, answers, local_copy
from mlops_dagster.assets.lake_paths import read_manifest, require_same, write_manifest
from mlops_dagster.assets.metadata import table
from mlops_dagster.assets.plots import plots
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.scores import by_slice, scores
from mlops_dagster.assets.stage import check_result, stage
from mlops_dagster.core.errors import MlopsError
from mlops_dagster.core.gate import GateResult, judge
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

STAGE = "evaluation"
CHECKS = {"gate": ("The declared gate: an absolute limit, the naive baseline, the champion on the same rows.", False)}


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, evaluation]`."""

    @stage(
        spec,
        STAGE,
        description="Metrics, plots and slices on the held-out period; the gate's verdict.",
        kinds={"scikitlearn"},
        needs=["trained_model", "training_set"],
        resources={"data_lake", "registry"},
        checks=CHECKS,
        code=["training.baseline"],
    )
    def evaluation(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        model, training_set = read_manifest(lake, spec, "trained_model"), read_manifest(lake, spec, "training_set")
        require_same("training_set", f"{spec.name}/trained_model", model, f"{spec.name}/training_set", training_set)
        rows = held_out(lake, training_set)
        label = rows[spec.label.column].cast(pa.float64()).to_numpy()
        candidate = _answers(spec, lake, model["digest"], rows)
        metrics = {
            "candidate": scores(spec.training.task, label, candidate.prediction, candidate.score),
            "baseline": scores(spec.training.task, label, naive(spec, lake, training_set, rows)),
        }
        champion = champion_metrics(spec, lake, context.resources.registry, rows, label, context.log.warning)
        result = judge(spec.active_gate, metrics["candidate"], metrics["baseline"], champion)
        manifest = {
            **metrics,
            "champion": champion,
            "gate": asdict(result),
            "digest": model["digest"],
            "training_set": model["training_set"],
        }
        version = write_manifest(lake, spec, STAGE, manifest)
        return dg.MaterializeResult(
            metadata=_metadata(spec, rows, label, candidate, manifest, result),
            data_version=dg.DataVersion(version),
            check_results=[check_result("gate", result.passed, result.sentence(), metrics["candidate"])],
        )

    return evaluation


def held_out(lake: Lake, training_set: dict[str, Any]) -> pa.Table:
    """The test rows of a training set."""
    rows = lake.read(training_set["key"])
    return rows.filter(pc.equal(rows["split"], "test"))


def _answers(spec: ModelSpec, lake: Lake, digest: str, rows: pa.Table) -> Answers:
    with local_copy(lake, spec, digest) as folder:
        return answers(folder, digest, rows)


def naive(spec: ModelSpec, lake: Lake, training_set: dict[str, Any], rows: pa.Table) -> np.ndarray:
    """The declared naive rule, or the majority class or mean of the training rows, for each held-out row."""
    if spec.training.baseline:
        features = rows.select(training_set["features"]).to_pandas()
        return np.asarray(load_callable(spec, "training.baseline")(features), dtype=float).reshape(-1)
    known = lake.read(training_set["key"])
    label = known.filter(pc.equal(known["split"], "train"))[spec.label.column].cast(pa.float64()).to_numpy()
    values, counts = np.unique(label, return_counts=True)
    constant = values[counts.argmax()] if spec.training.task == "classification" else label.mean()
    return np.full(rows.num_rows, constant)


def champion_metrics(
    spec: ModelSpec, lake: Lake, registry: Any, rows: pa.Table, label: np.ndarray, warn: Any
) -> dict[str, float] | None:
    """The champion's metrics on the same rows; None without one, or where it asks for features that these rows do not have."""
    champion = next((v for v in registry.versions(spec.name) if "champion" in v.aliases), None)
    if champion is None:
        return None
    try:
        known = _answers(spec, lake, champion.digest, rows)
    except (KeyError, MlopsError) as error:
        warn(f"version {champion.number} cannot be asked about these rows, so it is left out of the gate: {error}")
        return None
    return scores(spec.training.task, label, known.prediction, known.score)


def _metadata(
    spec: ModelSpec, rows: pa.Table, label: np.ndarray, candidate: Answers, manifest: dict[str, Any], result: GateResult
) -> dict[str, Any]:
    columns = {c: rows[c].to_numpy(zero_copy_only=False) for c in spec.evaluation.slices if c in rows.column_names}
    sliced = by_slice(spec.training.task, columns, label, candidate.prediction, result.metric) if columns else []
    names = manifest["candidate"].keys()
    compared = [
        {
            "metric": n,
            **{who: manifest[who][n] for who in ("candidate", "baseline", "champion") if manifest[who] and n in manifest[who]},
        }
        for n in names
        if n in manifest["baseline"] and (not manifest["champion"] or n in manifest["champion"])
    ]
    return {
        **manifest["candidate"],
        "gate": result.sentence(),
        "dagster/row_count": rows.num_rows,
        "compared": table(compared),
        **({"slices": table(sliced)} if sliced else {}),
        **plots(spec.training.task, label, candidate.prediction, candidate.score),
    }
