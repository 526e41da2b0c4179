"""The metrics that a gate or a tuning run can name, and which way each of them is better."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Metric:
    """A metric of scikit-learn's vocabulary: its name, its task, and whether more is better."""

    name: str
    task: Task
    greater_is_better: bool

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`, in the metric's own unit (negative: worse)."""
        return value - over if self.greater_is_better else over - value


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", "classification", True),
        Metric("balanced_accuracy", "classification", True),
        Metric("f1", "classification", True),
        Metric("precision", "classification", True),
        Metric("recall", "classification", True),
        Metric("roc_auc", "classification", True),
        Metric("average_precision", "classification", True),
        Metric("log_loss", "classification", False),
        Metric("brier_score", "classification", False),
        Metric("mean_absolute_error", "regression", False),
        Metric("median_absolute_error", "regression", False),
        Metric("root_mean_squared_error", "regression", False),
        Metric("r2", "regression", True),
    )
}

PRIMARY: dict[Task, str] = {"classification": "accuracy", "regression": "mean_absolute_error"}
"""The metric that live performance is judged by when a model says nothing else."""


def names_for(task: Task) -> list[str]:
    """The metrics that fit a task, in alphabetical order."""
    return sorted(m.name for m in METRICS.values() if m.task == task)
