import pyarrow as pa

from mlops_dagster.reproduce import Comparison, Reproduction, _lines, _metrics, _rows, show
from mlops_dagster.rerun import stretches

SAME, OTHER = Comparison("a", "a"), Comparison("a", "b", ("column x: 1 of 2 rows differ",))


def test_packages_and_files_that_differ_are_named():
    assert _lines(["numpy==2.1", "old==1"], ["new==1", "numpy==2.2"]) == [
        "new absent → 1",
        "numpy 2.1 → 2.2",
        "old 1 → absent",
    ]
    assert _lines(["aaaa  m/training.py"], ["bbbb  m/training.py"]) == ["m/training.py aaaa → bbbb"]


def test_columns_of_a_training_set_that_differ_are_named_with_their_rows():
    was = pa.table({"x": [1.0, None, 3.0], "y": [1, 2, 3]})
    assert _rows(was, pa.table({"x": [1.0, None, 4.0], "y": [1, 2, 3]})) == ["column x: 1 of 3 rows differ"]
    assert _rows(was, was.slice(1)) == ["3 rows became 2"]
    assert _rows(was, was.drop_columns(["y"])) == ["3 rows became 3; columns y are in one only"]


def test_metrics_that_differ_are_named_with_both_values():
    was, now = ({"candidate": {"accuracy": a, "f1": 0.5}, "baseline": None} for a in (0.7, 0.6))
    assert _metrics(was, now) == ["candidate accuracy: 0.7 → 0.6"]


def test_only_equal_data_and_equal_metrics_are_a_reproduction():
    def of(data, metrics):
        return Reproduction("m", 1, OTHER, OTHER, data, OTHER, metrics)

    assert of(SAME, SAME).identical
    assert not of(OTHER, SAME).identical
    assert not of(SAME, OTHER).identical
    assert "version 1 of m is NOT reproduced" in show(of(OTHER, SAME))
    assert "column x: 1 of 2 rows differ" in show(of(OTHER, SAME))


def test_days_with_gaps_are_made_in_stretches():
    days = ["2024-01-31", "2024-02-01", "2024-01-29", "2024-02-03"]
    assert stretches(days) == [("2024-01-29", "2024-01-29"), ("2024-01-31", "2024-02-01"), ("2024-02-03", "2024-02-03")]
