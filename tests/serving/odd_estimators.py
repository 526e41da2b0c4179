"""Estimators that have no ONNX form. MLflow's server must load them without this module: they are stored by value."""

import time

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin

FAILS_AT, WAITS_AT = 666.0, 777.0


class Votes(ClassifierMixin, BaseEstimator):
    """Three rules vote; the types of the columns matter to each of them."""

    def fit(self, rows: pd.DataFrame, label: np.ndarray) -> "Votes":
        self.classes_ = np.unique(label)
        self.names_ = list(rows.columns)
        self.middle_ = float(rows["distance"].median())
        return self

    def predict_proba(self, rows: pd.DataFrame) -> np.ndarray:
        if list(rows.columns) != self.names_:
            raise ValueError(f"not the order of training: {list(rows.columns)}")
        if rows["distance"].dtype != float or rows["hour"].dtype != (float if rows["hour"].isna().any() else int):
            raise TypeError(f"not the types of training: {rows.dtypes.to_dict()}")
        if (rows["distance"] == FAILS_AT).any():
            raise ValueError("a distance of 666 is beyond me")
        if (rows["distance"] == WAITS_AT).any():
            time.sleep(1.5)
        flag = rows["rush"].map({True: 1, False: 0, None: 0}) if rows["rush"].dtype == object else (~rows["rush"]).astype(int)
        votes = (rows["distance"].fillna(0) > self.middle_).astype(int) + flag + rows["carrier"].str.startswith("A").astype(int)
        share = (votes + rows["hour"].fillna(0).astype(int) % 2) / 4
        return np.column_stack([1 - share, share])

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        return self.classes_[(self.predict_proba(rows)[:, 1] >= 0.5).astype(int)]


class Far:
    """A plain Python class that only predicts."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def predict(self, rows: pd.DataFrame) -> np.ndarray:
        return rows["distance"].to_numpy() * 0.1 if self.value else (rows["distance"] > 0).to_numpy()
