"""The lifecycle's stages, one to a file; each is a factory that takes a ModelSpec."""

import dagster as dg

from mlops_dagster.assets import (
    best_parameters,
    deployment,
    drift_report,
    evaluation,
    features,
    inference_log,
    jobs,
    late_data,
    live_performance,
    model_version,
    raw_data,
    trained_model,
    training_set,
    validated_data,
)
from mlops_dagster.core.spec import ModelSpec

STAGES = (
    raw_data,
    validated_data,
    features,
    training_set,
    best_parameters,
    trained_model,
    evaluation,
    model_version,
    deployment,
    inference_log,
    live_performance,
    drift_report,
)


def build(spec: ModelSpec) -> dg.Definitions:
    """The twelve assets of a model with their checks, the node of corrections, and its jobs."""
    return dg.Definitions(
        assets=[*(stage.build(spec) for stage in STAGES), late_data.corrections(spec)],
        asset_checks=[late_data.build(spec)],
        jobs=jobs.build(spec),
    )
