"""Metrics of predictions against labels, by scikit-learn, under the names of core.metrics."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlops_dagster.core.metrics import METRICS, Task

if TYPE_CHECKING:
    import numpy as np


def scores(task: Task, label: "np.ndarray", prediction: "np.ndarray", score: "np.ndarray | None" = None) -> dict[str, float]:
    """Every metric of the task that can be computed: those that need `score` (probability of the positive class) only with it.

    All arrays have shape [rows]; classification labels are 0 and 1 or, for several classes, class numbers.
    """
    return _classification(label, prediction, score) if task == "classification" else _regression(label, prediction)


def _classification(label: "np.ndarray", prediction: "np.ndarray", score: "np.ndarray | None") -> dict[str, float]:
    from sklearn import metrics

    # Its annotations say that zero_division is text; its documentation, that it is text or a number.
    sk: Any = metrics
    average = "binary" if set(label) | set(prediction) <= {0, 1} else "macro"
    found = {
        "accuracy": sk.accuracy_score(label, prediction),
        "balanced_accuracy": sk.balanced_accuracy_score(label, prediction),
        "f1": sk.f1_score(label, prediction, average=average, zero_division=0),
        "precision": sk.precision_score(label, prediction, average=average, zero_division=0),
        "recall": sk.recall_score(label, prediction, average=average, zero_division=0),
    }
    if score is not None and len(set(label)) == 2 and average == "binary":
        found |= {
            "roc_auc": sk.roc_auc_score(label, score),
            "average_precision": sk.average_precision_score(label, score),
            "log_loss": sk.log_loss(label, score, labels=[0, 1]),
            "brier_score": sk.brier_score_loss(label, score),
        }
    return {name: float(value) for name, value in found.items()}


def _regression(label: "np.ndarray", prediction: "np.ndarray") -> dict[str, float]:
    from sklearn import metrics as sk

    return {
        "mean_absolute_error": float(sk.mean_absolute_error(label, prediction)),
        "median_absolute_error": float(sk.median_absolute_error(label, prediction)),
        "root_mean_squared_error": float(sk.root_mean_squared_error(label, prediction)),
        "r2": float(sk.r2_score(label, prediction)),
    }


def by_slice(
    task: Task,
    slices: Mapping[str, "np.ndarray"],
    label: "np.ndarray",
    prediction: "np.ndarray",
    metric: str,
    least_rows: int = 50,
) -> list[dict[str, str | int | float]]:
    """The metric on each value of each slicing column that has at least `least_rows` rows, worst first."""
    import numpy as np

    found: list[dict[str, str | int | float]] = []
    for column, values in slices.items():
        text = values.astype(str)
        for value in np.unique(text):
            rows = text == value
            if rows.sum() >= least_rows:
                found.append(
                    {
                        "slice": f"{column}={value}",
                        "rows": int(rows.sum()),
                        metric: scores(task, label[rows], prediction[rows])[metric],
                    }
                )
    return sorted(found, key=lambda row: float(row[metric]), reverse=not METRICS[metric].greater_is_better)
