"""What answers say about versions: whether two versions agree on the same request, and whether an answer was right.

Two classes differ when they are not equal. Two values differ when they are farther apart than `tolerance` times the larger of
their sizes (as `math.isclose` has it, without an absolute part). A value that is not a number differs from every number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from mlops_dagster.core.metrics import Task

ROW = ["request_id", "row_id"]
ANSWER = ["prediction", "prediction_label", "score"]


@dataclass(frozen=True)
class Agreement:
    """Rows that two versions answered: how many, how many differ, how many are shifted, and the sum of their distances.

    A distance is that of the scores or, for a regression, of the values; `measured` rows have one. A row is shifted when its
    scores are more than the tolerance apart; where there is no score, when its answers differ.
    """

    compared: int = 0
    disagreed: int = 0
    shifted: int = 0
    measured: int = 0
    distance: float = 0.0

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            self.compared + other.compared,
            self.disagreed + other.disagreed,
            self.shifted + other.shifted,
            self.measured + other.measured,
            self.distance + other.distance,
        )

    @property
    def mean_distance(self) -> float | None:
        """The mean absolute distance; None where no row has one."""
        return self.distance / self.measured if self.measured else None


def agreement(mirrored: pl.DataFrame, answered: pl.DataFrame, task: Task, tolerance: float) -> Agreement:
    """How the mirrored answers compare with those that the callers got, row by row; rows without a counterpart do not count.

    Both frames have the columns ROW and ANSWER of the inference log; a row that was answered twice counts once.
    """
    one, other = (side.select(*ROW, *ANSWER).unique(ROW, keep="first") for side in (mirrored, answered))
    pairs = one.join(other, on=ROW, suffix="_there")
    if task == "regression":
        differs, distance = _apart("prediction", "prediction_there", tolerance), _distance("prediction")
        shifted = differs
    else:
        named = pl.col("prediction_label").is_not_null() & pl.col("prediction_label_there").is_not_null()
        differs = (
            pl.when(named)
            .then(pl.col("prediction_label") != pl.col("prediction_label_there"))
            .otherwise(pl.col("prediction").ne_missing(pl.col("prediction_there")))
        )
        distance = _distance("score")
        shifted = pl.coalesce(distance > tolerance, differs)
    found = pairs.select(
        compared=pl.len(),
        disagreed=differs.sum(),
        shifted=shifted.sum(),
        measured=distance.is_finite().sum(),
        distance=distance.filter(distance.is_finite()).sum(),
    ).row(0, named=True)
    return Agreement(**found)


def right(task: Task, tolerance: float, prediction: str = "prediction", label: str = "label") -> pl.Expr:
    """Whether a prediction is its label (a value: near enough to it); null where the label has not landed."""
    if task == "regression":
        return pl.when(pl.col(label).is_not_null()).then(~_apart(prediction, label, tolerance))
    return pl.col(prediction) == pl.col(label)


def advanced(known: Mapping[str, tuple[int, int]], found: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The (whole, part) counts by name after `found` was seen; a count that went back (labels were corrected) stays as it was."""
    result = dict(known)
    for name, (whole, part) in found.items():
        old_whole, old_part = result.get(name, (0, 0))
        if 0 <= part - old_part <= whole - old_whole:
            result[name] = (whole, part)
    return result


def _apart(one: str, other: str, tolerance: float) -> pl.Expr:
    a, b = pl.col(one).cast(pl.Float64), pl.col(other).cast(pl.Float64)
    far = (a - b).abs() > tolerance * pl.max_horizontal(a.abs(), b.abs())
    nothing = a.is_nan() | b.is_nan()
    return pl.when(nothing).then(a.is_nan() != b.is_nan()).otherwise(far)


def _distance(name: str) -> pl.Expr:
    return (pl.col(name) - pl.col(f"{name}_there")).abs()


def outcomes(values: Any, rows: int) -> list[int | None]:
    """A metric's answer for each of so many rows as 0, 1 or None; raises ValueError saying what is wrong with it."""
    series = pl.Series(values, strict=False) if not isinstance(values, pl.Series) else values
    if len(series) != rows:
        raise ValueError(f"it gave {len(series)} values for {rows} rows; give one for each, None where it is not known yet")
    known = series.cast(pl.Float64, strict=False).fill_nan(None)
    if wrong := [value for value in known.drop_nulls().unique().to_list() if value not in (0.0, 1.0)]:
        raise ValueError(f"it gave {wrong[0]:g}; give 1 for a success, 0 for none, None where it is not known yet")
    return [None if value is None else int(value) for value in known.to_list()]
