"""Two versions' answers to the same rows, right answers, and a metric's values."""

import math

import polars as pl
import pytest

from mlops_dagster.core.answers import Agreement, advanced, agreement, outcomes, right


def log(*rows: tuple) -> pl.DataFrame:
    """Rows of (request, prediction, label, score)."""
    named = [{"request_id": r, "row_id": "#0", "prediction": p, "prediction_label": label, "score": s} for r, p, label, s in rows]
    kinds = {"request_id": pl.String, "row_id": pl.String, "prediction": pl.Float64, "prediction_label": pl.String}
    return pl.DataFrame(named, {**kinds, "score": pl.Float64})


def test_classes_and_scores_are_compared_row_by_row_and_only_pairs_count() -> None:
    mirrored = log(
        ("a", 1.0, None, 0.9), ("b", 1.0, None, 0.6), ("c", 0.0, None, 0.2), ("c", 0.0, None, 0.2), ("x", 1.0, None, 1)
    )
    answered = log(("a", 1.0, None, 0.7), ("b", 0.0, None, 0.55), ("c", 0.0, None, 0.2), ("y", 1.0, None, 1.0))
    found = agreement(mirrored, answered, "classification", 0.1)
    assert (found.compared, found.disagreed, found.shifted, found.measured) == (3, 1, 1, 3)
    assert found.distance == pytest.approx(0.25)
    assert (found + Agreement()).mean_distance == pytest.approx(0.25 / 3)


def test_class_names_are_compared_not_their_positions() -> None:
    one = log(("a", 0.0, "late", None), ("b", 0.0, "late", None), ("c", 1.0, "late", None))
    other = log(("a", 1.0, "late", None), ("b", 1.0, "late", None), ("c", 1.0, "early", None))
    found = agreement(one, other, "classification", 0.1)
    assert (found.compared, found.disagreed, found.shifted, found.mean_distance) == (3, 1, 1, None)


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [(100, 109, 0), (100, 120, 1), (0, 0, 0), (0.001, -0.001, 1), (math.nan, 1, 1), (math.nan, math.nan, 0), (-100, -95, 0)],
)
def test_values_may_differ_by_a_share_of_the_larger(one: float, other: float, differs: int) -> None:
    found = agreement(log(("a", one, None, None)), log(("a", other, None, None)), "regression", 0.1)
    assert (found.compared, found.disagreed, found.shifted) == (1, differs, differs)
    if not math.isnan(one):
        assert differs == (not math.isclose(one, other, rel_tol=0.1))


def test_nothing_to_compare_is_nothing() -> None:
    assert agreement(log(), log(), "classification", 0.1) == Agreement()


def test_right_is_unknown_without_a_label() -> None:
    rows = pl.DataFrame({"prediction": [1.0, 1.0, 1.0], "label": [1.0, 0.0, None]})
    assert rows.select(right("classification", 0.1)).to_series().to_list() == [True, False, None]
    assert rows.select(right("regression", 0.1)).to_series().to_list() == [True, False, None]


def test_counts_that_went_back_stay() -> None:
    known = {"day/1": (10, 3)}
    assert advanced(known, {"day/1": (12, 4), "day/2": (1, 1)}) == {"day/1": (12, 4), "day/2": (1, 1)}
    for impossible in ((9, 3), (11, 2), (10, 4)):
        assert advanced(known, {"day/1": impossible}) == known


def test_a_metric_gives_one_known_or_unknown_success_a_row() -> None:
    assert outcomes([True, 0, None, math.nan], 4) == [1, 0, None, None]
    with pytest.raises(ValueError, match="2 values for 3 rows"):
        outcomes([1, 0], 3)
    with pytest.raises(ValueError, match="it gave 0.5"):
        outcomes([0.5], 1)
