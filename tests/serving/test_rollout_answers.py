"""What rollouts read of answers: the gateway's unit log, rows by their time of logging, and a tally that counts once."""

import datetime as dt
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from mlops_dagster.core.answers import Agreement
from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.inference_segments import FolderSegments
from mlops_dagster.resources.live_metrics.tally import SPREAD, Tally, Unit
from mlops_dagster.resources.live_metrics.units import read_units
from mlops_dagster.resources.serving.adopt import Record
from mlops_dagster.serving.segments import SegmentWriter, schema

T0 = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def at(seconds: float) -> dt.datetime:
    return T0 + dt.timedelta(seconds=seconds)


def line(seconds: float, number: int, model: str = "m", arm: str = "m/2|1") -> str:
    moment = f"{at(seconds).timestamp():.6f}"
    said = {"at": moment, "model": model, "request_id": f"r{number}", "key": f"k {number}", "arm": arm, "status": 200}
    return json.dumps(said) + "\n"


def test_the_unit_log_is_read_by_time_over_two_files_without_what_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    path.with_suffix(".1.jsonl").write_text("".join(line(number / 10, number) for number in range(20_000)))
    later = "".join(line(2000 + number / 10, 20_000 + number) for number in range(20_000))
    path.write_text(later + line(2000.5, 1, model="other") + "{damaged\n" + line(2000.05, 99_999)[:40])
    found = read_units(path, "m", at(1990), at(2010))
    assert found["request_id"].to_pylist() == [f"r{number}" for number in range(19_901, 20_101)]
    assert set(found["arm"].to_pylist()) == {"2"}
    assert read_units(path, "m", at(5000), at(6000)).num_rows == 0
    assert read_units(tmp_path / "none.jsonl", "m", at(0), at(1)).num_rows == 0


def test_rows_are_read_by_when_they_were_logged_whatever_day_they_stand_for(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "m", "1-1-", ZoneInfo("UTC"), fan_in=4)
    for number in range(9):
        row = {name: None for name in schema().names}
        days = dt.timedelta(days=number)
        row |= {"request_id": f"r{number}", "row_id": "#0", "logged_at": at(number), "event_timestamp": T0 - days, "version": "1"}
        writer.write(pa.Table.from_pylist([row, row | {"event_timestamp": T0}], schema()))
    writer.merge()
    segments = FolderSegments(root=str(tmp_path))
    found = segments.read_logged("m", at(2), at(6), ["version"])
    assert found["request_id"].to_pylist() == ["r3", "r4", "r5", "r6"]
    assert segments.read_logged("m", at(20), at(30), ["version"]).num_rows == 0
    assert segments.read_logged("nobody", at(0), at(9), ["version"]).num_rows == 0
    (tmp_path / "m" / "day=2024-01-01" / "broken.parquet").write_text("not a segment")
    with pytest.raises(StorageError, match="Move the broken file away"):
        segments.read_logged("m", at(0), at(9), ["version"])


def test_a_window_is_counted_by_one_of_many(tmp_path: Path) -> None:
    def count(_: int) -> bool:
        return Tally(tmp_path / "tally.db").count_agreement(None, at(10), Agreement(5, 1, 1, 5, 0.5))

    Tally(tmp_path / "tally.db").units()  # makes the file
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(count, range(8))) == [False] * 7 + [True]
    tally = Tally(tmp_path / "tally.db")
    assert (tally.until(), tally.agreement()) == (at(10), Agreement(5, 1, 1, 5, 0.5))
    assert tally.count_agreement(at(10), at(20), Agreement(1, 0, 0, 0, 0.0))
    assert not tally.count_agreement(at(10), at(20), Agreement(1, 0, 0, 0, 0.0)), "a window that is over"
    assert tally.agreement().compared == 6


def test_a_key_is_one_unit_and_one_trial_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert tally.count_units(None, at(1), [Unit("eve@example.org", "1", "r1", False, 1), Unit("bob", "2", "r2", True)])
    assert tally.count_units(
        at(1), at(2), [Unit("eve@example.org", "1", "r3", False, 0), Unit("eve@example.org", "2", "r4", True, 0)]
    )
    one = {"units": 1, "misassigned": 0, "trials": 1, "successes": 1}
    assert tally.units() == {"1": one, "2": {"units": 1, "misassigned": 1, "trials": 0, "successes": 0}}
    assert tally.open_requests() == ["r2"]
    assert b"eve@example" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_what_lands_together_is_shown_over_many_looks_and_no_later_than_that(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert tally.count_units(None, at(1), [Unit(f"key {n}", "1", f"r{n}", False) for n in range(1000)])
    labels = {f"2024-01-01/1/{part}": (10, part % 2) for part in range(SPREAD)}
    outcomes = {f"r{n}": n % 2 for n in range(1000)}
    tally.count_labels(at(2), {"2024-01-01": "digest"}, labels, outcomes)
    trials = []
    for look in range(SPREAD + 3):
        trials.append(tally.units()["1"]["trials"])
        assert len(tally.labels()) == min(look + 1, SPREAD)
        tally.look()
    assert trials == sorted(trials)
    assert (trials[SPREAD - 1], max(b - a for a, b in itertools.pairwise(trials)) < 120) == (1000, True)
    tally.count_labels(at(3), {}, tally.labels(everything=True), {"r1": 0})
    assert tally.units()["1"] == {"units": 1000, "misassigned": 0, "trials": 1000, "successes": 500}


def test_what_was_said_first_stays(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "tally.db")
    assert [tally.first("deaths", deaths) for deaths in (2, 2, 5)] == [2, 2, 2]


def test_a_record_of_before_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"pid": 1, "started": 1.0, "command": ["a"], "launched": 1.0, "quick": 0}))
    found = Record.read(path)
    assert found is not None
    assert (found.deaths, found.keeper) == (0, 0)
