"""The jobs of a model: parts of its lifecycle that are run together."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from mlops_dagster.assets import approve, late_data
from mlops_dagster.assets.stage import key, partitions
from mlops_dagster.core.spec import ModelSpec

PARTS: dict[str, Sequence[str]] = {
    "ingest": ("raw_data", "validated_data", "features"),
    "train": ("training_set", "best_parameters", "trained_model", "evaluation", "model_version"),
    "deploy": ("deployment",),
    "monitor": ("inference_log", "live_performance", "drift_report"),
}
BY_DAY = {"ingest", "monitor"}


def name(model: str, part: str) -> str:
    """The name of a model's job, such as `flight_delay_train`."""
    return f"{model}_{part}"


def build(spec: ModelSpec) -> list[Any]:
    """The jobs of a model: its four parts, of which no two runs ever overlap (see `dagster.yaml`), and decisions about versions."""
    parts = [
        dg.define_asset_job(
            name(spec.name, part),
            selection=dg.AssetSelection.assets(*(key(spec, stage) for stage in stages)) | _checked_after(spec, part),
            description=f"{spec.name}: {', '.join(stages)}.",
            tags={"mlops/model": spec.name, "mlops/part": part, "mlops/exclusive": name(spec.name, part)},
            partitions_def=partitions(spec) if part in BY_DAY else None,
            executor_def=dg.in_process_executor,
        )
        for part, stages in PARTS.items()
    ]
    return [*parts, approve.build(spec, name(spec.name, "approve"))]


def _checked_after(spec: ModelSpec, part: str) -> dg.AssetSelection:
    """Checks of other stages that a part runs: whether what was ingested had been used in another form."""
    late = dg.AssetCheckKey(key(spec, "training_set"), late_data.NAME)
    return dg.AssetSelection.checks(*([late] if part == "ingest" else []))
