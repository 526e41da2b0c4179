"""A pickled estimator as MLflow's own server loads it: rows in, a DataFrame of predictions and probabilities out.

This file is copied into each artifact of the format `mlflow`, so that it is among the registered bytes; it imports nothing of this package.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy
import pandas  # noqa: TID253  (only MLflow's server imports this module)


class AnsweringEstimator:
    """Answers with `prediction` and, where the estimator has `predict_proba`, `probability_0`, `probability_1`, …

    `columns` are the features in the order of training, each with its type (float64, int64, bool or string).
    """

    def __init__(self, estimator: Any, columns: dict[str, str]) -> None:
        self.estimator = estimator
        self.columns = columns

    def predict(self, rows: pandas.DataFrame) -> pandas.DataFrame:
        """One answered row for each of `rows`."""
        given = self._as_trained(rows)
        answers = pandas.DataFrame({"prediction": numpy.asarray(self.estimator.predict(given)).reshape(len(given))})
        if hasattr(self.estimator, "predict_proba"):
            probabilities = numpy.asarray(self.estimator.predict_proba(given), dtype=float)
            for number in range(probabilities.shape[1]):
                answers[f"probability_{number}"] = probabilities[:, number]
        return answers

    def _as_trained(self, rows: pandas.DataFrame) -> pandas.DataFrame:
        """JSON knows numbers only: the types of the training rows again (a whole number beside missing ones is a float there)."""
        given: Any = rows if list(rows.columns) == list(self.columns) else rows[list(self.columns)]
        changed = {}
        for name, kind in self.columns.items():
            column, wanted = given[name], "object" if kind == "string" else kind
            if kind != "float64" and (missing := column.isna()).any():
                changed[name] = column.astype("float64") if kind == "int64" else _with_none(column, missing, kind)
            elif column.dtype != wanted:
                changed[name] = column.astype(wanted)
        return given.assign(**changed) if changed else given


def _with_none(column: Any, missing: Any, kind: str) -> pandas.Series:
    """Booleans or strings of which some are missing."""
    values = [None if gone else bool(value) if kind == "bool" else value for value, gone in zip(column, missing, strict=True)]
    return pandas.Series(values, index=column.index, dtype=object)


def _load_pyfunc(path: str, model_config: dict[str, Any]) -> AnsweringEstimator:
    """MLflow calls this with the path of the pickled estimator and the `config` of the file MLmodel."""
    return AnsweringEstimator(pickle.loads(Path(path).read_bytes()), dict(model_config["columns"]))
