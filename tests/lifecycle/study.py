"""What a user puts beside the model into `defs/`: an asset that logs to the platform's MLflow."""

from typing import Any

import dagster as dg


@dg.asset(key_prefix="late_parcel", deps=[["late_parcel", "training_set"]])
def study(mlflow: dg.ResourceParam[Any]) -> None:
    """What answering `late` for every heavy parcel would gain."""
    mlflow.log_param("heavy_kg", 9.0)
    mlflow.log_metric("gain", 0.125)
    mlflow.log_dict({"rule": "weight"}, "rule.json")


late_parcel_study = dg.define_asset_job("late_parcel_study", selection=[study])
