import datetime as dt

import pyarrow as pa
import pytest

from mlops_dagster.lineage import training_record
from mlops_dagster.lineage.affected import _rests_on, spread
from mlops_dagster.lineage.places import Places
from mlops_dagster.lineage.request_search import store_index
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.registry import Version

NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
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


BAD, LOOKBACK = dt.date(2024, 1, 3), 1


def day(number: int) -> dt.date:
    return dt.date(2024, 1, number)


def at(number: int, hour: int = 0) -> dt.datetime:
    return dt.datetime(2024, 1, number, hour, tzinfo=dt.UTC)


@pytest.fixture
def lake(tmp_path):
    return FolderLake(root=str(tmp_path / "lake"))


class History:
    """Raw days and a view of a lake: depot `a` sends every day, `b` on the third for the last time until it `returns`."""

    def __init__(self, lake, tmp_path, ttl_days: float | None, returns: int = 99) -> None:
        self.lake, self.versions = lake, DvcVersions(root=lake.root)
        self.view = FeatureView("sql", "data", 20, ["depot"], ttl_days and ttl_days * 86_400)
        self.places = Places(lake, lambda: lake, tmp_path / "segments", lambda model: [], lambda: ["m"])
        for number in range(1, 21):
            # A day's features look back on the day before it and are known at its end.
            depots = ["a", "b"] if number <= BAD.day + LOOKBACK or number >= returns else ["a"]
            moments = pa.array([at(number + 1)] * len(depots), pa.timestamp("us", "UTC"))
            rows = {"depot": depots, "x": [1.0] * len(depots), "event_timestamp": moments, "created_timestamp": moments}
            lake.write(f"m/features/v/{day(number)}.parquet", pa.table(rows))
            lake.write(f"m/raw_data/rows/{day(number)}.parquet", pa.table({"n": [number]}))
        self.versions.record(lake.list("m/"), "in")

    def training_set(self, first: int, last: int, *depots: str) -> Version:
        """A registered version of the rows of these depots at noon of each day."""
        name, days = f"{first}-{last}", range(first, last + 1)
        moments = pa.array([at(n, 12) for n in days for _ in depots], pa.timestamp("us", "UTC"))
        key = f"m/training_set/{name}.parquet"
        self.lake.write(key, pa.table({"depot": list(depots) * len(days), "event_timestamp": moments}))
        raw = {f"m/raw_data/rows/{day(n)}.parquet": "md5" for n in range(first - LOOKBACK - 1, last + 1)}
        record = TrainingRecord(name, key, [str(day(n)) for n in days], LOOKBACK, ["rows"], raw, {"v": self.view})
        inputs = training_record.store(self.lake, "m", record)
        return Version("m", last, "d", {"training_set": name, "inputs": inputs}, "h", NOW, "u")

    def predicted(self, number: int) -> None:
        key = f"m/inference_log/{day(number)}.parquet"
        log = {
            "request_id": ["r1", "r2"],
            "version": ["1", "1"],
            "logged_at": pa.array([at(number)] * 2, pa.timestamp("us", "UTC")),
        }
        self.lake.write(key, pa.table(log))
        store_index(self.lake, "m", str(day(number)), pa.table(log), at(number))

    def spread(self, *registered: Version):
        found = spread(self.places, self.lake, self.versions, registered, "m", BAD, LOOKBACK)
        assert found is not None
        return found


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
