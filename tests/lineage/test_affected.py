import datetime as dt

import pyarrow as pa
import pytest

from mlops_dagster.lineage.affected import _rests_on
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.registry import Version
from tests.lineage.feature_life import NOW, History, at, day

DAYS = {"first_day": "2024-01-05", "last_day": "2024-01-09"}


def record(training_set: str, *days: int) -> TrainingRecord:
    raw = {f"m/raw_data/rows/2024-01-0{day}.parquet": "md5" for day in days}
    return TrainingRecord(training_set, "k", ["2024-01-05"], 2, ["rows"], raw, {})


@pytest.mark.parametrize(
    ("records", "day", "rests"),
    [
        ([record("t", 5)], 5, True),
        ([record("t", 5)], 6, False),
        ([record("other", 6)], 6, True),  # its own record is gone: its days count
        ([], 2, True),
        ([], 1, False),
    ],
)
def test_a_version_whose_record_is_gone_goes_by_its_days(records, day, rests):
    version = Version("m", 1, "d", {"training_set": "t", "inputs": {"key": "k"}, **DAYS}, "h", NOW, "u")
    at = dt.date(2024, 1, day)
    assert _rests_on(version, records, [r for r in records if r.touches(at)], at, 2) is rests


@pytest.fixture
def lake(tmp_path):
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.mark.parametrize(
    ("ttl_days", "returns", "depots", "carrying", "last_row_day"),
    [
        (None, 99, "ab", 3, None),
        (None, 99, "a", 0, None),
        (4, 99, "ab", 1, "2024-01-09"),
        (3, 99, "ab", 0, "2024-01-08"),
        (None, 9, "ab", 2, "2024-01-09"),
        (None, 5, "ab", 0, "2024-01-05"),
    ],
)
def test_a_value_that_nothing_replaced_is_followed_until_its_ttl(
    lake, tmp_path, ttl_days, returns, depots, carrying, last_row_day
):
    history = History(lake, tmp_path, ttl_days, returns)
    found = history.spread(history.training_set(8, 10, *depots))
    assert [t["rows_carrying_it"] for t in found.training_sets] == ([carrying] if carrying else [])
    assert [v["version"] for v in found.versions] == ([10] if carrying else [])
    assert found.row_days == ("2024-01-03", last_row_day)


def test_it_is_followed_though_its_partition_was_taken_out_or_made_anew(lake, tmp_path):
    history = History(lake, tmp_path, None)
    version = history.training_set(8, 10, "b")
    keys = [f"m/features/v/{day(n)}.parquet" for n in (3, 4)]
    for key in keys:
        lake.delete(key)
    history.versions.record(keys, "out")
    assert [v["version"] for v in history.spread(version).versions] == [10]
    moments = pa.array([at(4)], pa.timestamp("us", "UTC"))
    lake.write(keys[0], pa.table({"depot": ["a"], "x": [1.0], "event_timestamp": moments, "created_timestamp": moments}))
    history.versions.record(keys[:1], "made again without the day")
    assert [v["version"] for v in history.spread(version).versions] == [10]


def test_predictions_on_days_after_it_may_rest_on_such_values(lake, tmp_path):
    history = History(lake, tmp_path, 4)
    for number in (4, 9, 10):
        history.predicted(number)
    nothing = {"trained_on_it": 0}
    assert history.spread(history.training_set(12, 13, "a")).predictions == [
        {"day": "2024-01-04", **nothing, "featured_by_it": 2, "may_carry_it": 0},
        {"day": "2024-01-09", **nothing, "featured_by_it": 0, "may_carry_it": 2},
    ]


def test_a_training_set_from_before_keys_were_recorded_is_judged_by_its_raw_data(lake, tmp_path):
    history = History(lake, tmp_path, None)
    history.view = FeatureView("sql", "data", 20)
    assert history.spread(history.training_set(8, 10, "b")).versions == []
    assert [v["version"] for v in history.spread(history.training_set(5, 7, "a")).versions] == [7]
