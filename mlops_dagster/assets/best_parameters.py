"""Stage 5: the parameters to train with, as declared or as a search found them."""

from typing import Any

import dagster as dg

from mlops_dagster.assets.arrow import pc
from mlops_dagster.assets.lake_paths import read_manifest, write_manifest
from mlops_dagster.assets.metadata import table
from mlops_dagster.assets.references import load_callable
from mlops_dagster.assets.scores import scores
from mlops_dagster.assets.stage import stage
from mlops_dagster.core.metrics import METRICS
from mlops_dagster.core.search_space import parse_search_space
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

STAGE = "best_parameters"
VALIDATION_SHARE = 0.2
SEED = 7


def build(spec: ModelSpec) -> dg.AssetsDefinition:
    """The asset `[<model>, best_parameters]`."""
    searching = spec.tuning.engine != "none"

    @stage(
        spec,
        STAGE,
        description="Hyperparameters: searched on the last fifth of the training rows, or as declared.",
        kinds={"optuna" if spec.tuning.engine == "local" else spec.tuning.engine} if searching else {"yaml"},
        needs=["training_set"],
        resources={"data_lake"} | ({f"tuning_{spec.tuning.engine}"} if searching else set()),
        code=["training.train"],
    )
    def best_parameters(context: dg.AssetExecutionContext):
        lake: Lake = context.resources.data_lake
        training_set = read_manifest(lake, spec, "training_set")
        found: dict[str, Any] = {"parameters": dict(spec.training.parameters), "trials": []}
        if searching:
            found = search(spec, lake, getattr(context.resources, f"tuning_{spec.tuning.engine}"), training_set)
        version = write_manifest(lake, spec, STAGE, {**found, "training_set": training_set["training_set"]})
        trials = {"trials": table(found["trials"])} if found["trials"] else {}
        return dg.MaterializeResult(metadata={"parameters": found["parameters"], **trials}, data_version=dg.DataVersion(version))

    return best_parameters


def search(spec: ModelSpec, lake: Lake, tuner: Any, training_set: dict[str, Any]) -> dict[str, Any]:
    """Search tuning.parameters; each trial trains on the first rows and is scored on the last fifth, so time is never mixed."""
    rows = lake.read(training_set["key"])
    rows = rows.filter(pc.equal(rows["split"], "train")).sort_by("event_timestamp")
    border = int(rows.num_rows * (1 - VALIDATION_SHARE))
    names = training_set["features"]
    features, label = rows.select(names).to_pandas(), rows[spec.label.column].to_pandas().astype(float)
    train, metric = load_callable(spec, "training.train"), METRICS[spec.tuning.metric or spec.active_gate.metric]

    def objective(parameters: dict[str, Any]) -> float:
        estimator = train(features[:border], label[:border], **{**spec.training.parameters, **parameters})
        score = estimator.predict_proba(features[border:])[:, 1] if hasattr(estimator, "predict_proba") else None
        predicted = estimator.predict(features[border:]).astype(float)
        return scores(spec.training.task, label[border:].to_numpy(), predicted, score)[metric.name]

    best = tuner.search(
        f"{spec.name}-{training_set['training_set'][:16]}",
        objective,
        parse_search_space(spec.tuning.parameters),
        spec.tuning.algorithm,
        spec.tuning.trials,
        "maximize" if metric.greater_is_better else "minimize",
        SEED,
    )
    trials = best.trials.select(["number", "value", "state", "parameters"]).to_pylist()
    return {"parameters": {**spec.training.parameters, **best.parameters}, "trials": trials, "value": best.value}
