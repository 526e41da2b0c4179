import datetime as dt

import pytest

from mlops_dagster.lineage.affected import _rests_on
from mlops_dagster.lineage.training_record import TrainingRecord
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
    assert _rests_on(version, records, dt.date(2024, 1, day), 2) is rests
