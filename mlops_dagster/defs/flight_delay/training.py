"""How the estimator of flight_delay is made, and the rule of thumb that it must beat."""

from typing import Any

import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier

from mlops_dagster.defs.flight_delay.source import LATE_MINUTES

_PARAMETERS: dict[str, Any] = {
    "n_estimators": 300,
    "learning_rate": 0.04,
    "num_leaves": 15,
    "min_child_samples": 100,
    "colsample_bytree": 0.5,
    "subsample": 0.8,
    "subsample_freq": 1,
    "reg_lambda": 5.0,
}
# The same rows and parameters give the same trees, on any number of threads.
_FIXED: dict[str, Any] = {"random_state": 1, "deterministic": True, "force_row_wise": True, "n_jobs": 2, "verbose": -1}


def train(features: pd.DataFrame, label: pd.Series, **parameters: Any) -> LGBMClassifier:
    """Gradient-boosted trees on all features as they are: numbers, of which each may be missing.

    `parameters` are LightGBM's; those not given have the values that did best on months after the training months (docs/flight_delay.md).
    """
    return LGBMClassifier(**{**_PARAMETERS, **parameters, **_FIXED}).fit(features, label.astype("int64"))


def naive(features: pd.DataFrame) -> np.ndarray:
    """The rule of thumb: a flight arrives late if it left 15 minutes late or more."""
    return (features["departure_delay"] >= LATE_MINUTES).to_numpy().astype("int64")
