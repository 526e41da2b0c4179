import datetime as dt
import os
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from mlops_dagster.lineage import request_index, request_search
from mlops_dagster.lineage.places import Places
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.serving.segments import SegmentWriter

DAY = "2024-01-02"
MOMENT = dt.datetime(2024, 1, 2, 6, 0, 0, 123456, tzinfo=dt.UTC)


def log(*ids: str, version: str = "1", first: int = 0) -> pa.Table:
    count = len(ids)
    return pa.table(
        {
            "request_id": pa.array(ids, pa.string()),
            "row_id": [f"row {first + n}" for n in range(count)],
            "logged_at": pa.array([MOMENT] * count, pa.timestamp("us", "UTC")),
            "event_timestamp": pa.array([MOMENT] * count, pa.timestamp("us", "UTC")),
            "version": [version] * count,
            "shadow": [False] * count,
            "features": pa.array([{"weight": float(n)} for n in range(count)]),
            "prediction": [float(n) for n in range(count)],
        }
    )


@pytest.fixture
def lake(tmp_path) -> FolderLake:
    (tmp_path / "lake").mkdir()
    return FolderLake(root=str(tmp_path / "lake"))


@pytest.fixture
def opened() -> list[str]:
    return []


@pytest.fixture
def places(tmp_path, lake, opened) -> Places:
    def writable() -> FolderLake:
        opened.append("to write")
        return lake

    return Places.embedded(tmp_path, None, writable)


def collect(lake: FolderLake, rows: pa.Table, day: str = DAY, begun: dt.datetime | None = None) -> None:
    begun = begun or dt.datetime.now(dt.UTC)
    lake.write(f"m/inference_log/{day}.parquet", rows)
    request_search.store_index(lake, "m", day, rows, begun)


def test_a_collected_request_is_found_with_its_features_without_the_lake_being_opened_to_write(lake, places, opened):
    collect(lake, log("a", "b", "c"))
    collect(lake, log("d"), "2024-01-03")
    (found,) = request_search.find(places, "m", "b")
    assert (found.day, found.file) == (DAY, f"m/inference_log/{DAY}.parquet")
    assert found.row["features"] == {"weight": 1.0}
    assert found.row["logged_at"] == MOMENT
    assert (request_search.find(places, "m", "d")[0].day, request_search.find(places, "m", "e"), opened) == ("2024-01-03", [], [])


def test_every_row_of_a_batch_request_is_found(lake, places):
    collect(lake, log("a", "batch", "b", "batch"))
    assert [f.row["row_id"] for f in request_search.find(places, "m", "batch")] == ["row 1", "row 3"]


@pytest.mark.parametrize("fault", ["missing", "broken", "of an earlier file"])
def test_an_index_that_is_missing_broken_or_stale_is_made_again(lake, places, opened, fault):
    collect(lake, log("old"))
    index = Path(lake.locate(request_search.index_key("m", DAY)))
    if fault == "missing":
        index.unlink()
    elif fault == "broken":
        index.write_bytes(index.read_bytes()[:-1])
    lake.write(f"m/inference_log/{DAY}.parquet", log("old", "new"))
    assert request_search.find(places, "m", "new")[0].row["row_id"] == "row 1"
    assert opened == ["to write"]
    request_search.find(places, "m", "new")
    assert opened == ["to write"], "kept, so made once"


def test_two_ids_of_one_hash_are_told_apart(lake, places, monkeypatch):
    monkeypatch.setattr(request_index, "_folded", lambda words, length: words[:, 0] * 0)
    collect(lake, log("a", "b", "c"))
    assert [f.row["request_id"] for f in request_search.find(places, "m", "b")] == ["b"]


def test_a_row_in_a_later_row_group_is_found(lake, places, monkeypatch):
    monkeypatch.setattr("mlops_dagster.resources.data_lake.parquet.ROWS_PER_GROUP", 3)
    collect(lake, log(*"abcdefgh"))
    assert request_search.find(places, "m", "h")[0].row["prediction"] == 7.0


@pytest.fixture(params=["scanned", "indexed"])
def segments(request, tmp_path, monkeypatch) -> SegmentWriter:
    """Segments of a size that is scanned, or that gets an index beside it."""
    if request.param == "indexed":
        monkeypatch.setattr(request_search, "SCANNED_ROWS", 0)
    return SegmentWriter(tmp_path / "serving" / "inference_log", "m", "1-77-", ZoneInfo("UTC"))


def test_a_request_of_today_is_found_in_the_segments(places, segments):
    segments.write(log("a", "b"))
    segments.write(log("c", first=2))
    for _ in range(2):
        (found,) = request_search.find(places, "m", "c")
        assert (found.day, found.row["row_id"], found.row["logged_at"]) == (DAY, "row 2", MOMENT)
    assert request_search.find(places, "m", "d") == []


def test_what_was_logged_after_the_day_was_collected_is_found_too(lake, places, segments):
    segments.write(log("a"))
    collect(lake, log("a"))
    segments.write(log("b", first=1))
    assert [f.row["row_id"] for f in request_search.find(places, "m", "b")] == ["row 1"]


def test_what_was_logged_while_the_day_was_collected_is_found_too(tmp_path, lake, places, segments):
    """After the segments were read and before the log lay in the lake; and the rest of a batch whose first row was collected."""
    segments.write(log("batch"))
    begun = dt.datetime.now(dt.UTC)
    segments.write(log("b", "batch", first=1))
    written = tmp_path / "serving" / "inference_log" / "m" / f"day={DAY}"
    collect(lake, log("batch"), begun=begun)
    assert written.stat().st_mtime <= Path(lake.locate(f"m/inference_log/{DAY}.parquet")).stat().st_mtime
    assert [f.row["row_id"] for f in request_search.find(places, "m", "b")] == ["row 1"]
    first, second = request_search.find(places, "m", "batch")
    assert (first.row["row_id"], first.file, second.row["row_id"]) == ("row 0", f"m/inference_log/{DAY}.parquet", "row 2")


def test_segments_that_were_not_written_to_since_are_not_read_again(tmp_path, lake, places, segments, monkeypatch):
    segments.write(log("a"))
    collect(lake, log("a"), begun=dt.datetime.now(dt.UTC) + dt.timedelta(seconds=60))
    monkeypatch.setattr(request_search, "_in_day", lambda *_: pytest.fail("read"))
    assert len(request_search.find(places, "m", "a")) == 1


def test_a_row_that_lies_in_two_segments_is_told_once(places, segments):
    segments.write(log("a"))
    segments.write(log("a"))
    assert len(request_search.find(places, "m", "a")) == 1


def test_indexes_of_segments_that_were_merged_away_go(tmp_path, places, monkeypatch):
    monkeypatch.setattr(request_search, "SCANNED_ROWS", 0)
    writer = SegmentWriter(tmp_path / "serving" / "inference_log", "m", "1-77-", ZoneInfo("UTC"))
    writer.write(log("a"))
    request_search.find(places, "m", "a")
    folder = tmp_path / "serving" / "inference_log" / "m" / f"day={DAY}"
    for old in folder.glob("*.parquet"):
        os.unlink(old)
    writer.write(log("b"))
    request_search.find(places, "m", "b")
    assert len(list((folder / ".request_index").iterdir())) == 1
