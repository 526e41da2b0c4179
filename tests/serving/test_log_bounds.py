"""The inference log under requests of many days or large rows, and over files that are damaged: none of them ends it."""

import datetime as dt
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predictor_processes import Model, Process, Starter, children, command, launch, wait_until

from mlops_dagster.serving import log_process, log_writer
from mlops_dagster.serving.artifact import Feature, Signature
from mlops_dagster.serving.log_losses import DRAIN_SECONDS, OwnCounters, notice_losses, read_losses
from mlops_dagster.serving.log_process import WriterProcess
from mlops_dagster.serving.log_rows import packed
from mlops_dagster.serving.log_writer import BYTES_TOGETHER, MERGE_RETRY_SECONDS, Writer
from mlops_dagster.serving.rows import MAXIMUM_DAYS, MAXIMUM_ID
from mlops_dagster.serving.segments import TIME, SegmentWriter, days, local_days, read_segments, schema

STEM = "7-1-1"
FIRST = dt.datetime(1950, 1, 1, 12, tzinfo=dt.UTC)


def moments(count: int) -> list[dt.datetime]:
    return [FIRST + dt.timedelta(days=n) for n in range(count)]


def table(times: list[dt.datetime]) -> pa.Table:
    """A row a time, with an id of its own."""
    empty = schema().empty_table()
    columns = {f.name: pa.nulls(len(times), f.type) for f in empty.schema}
    ids, found = pa.array([f"r{n}" for n in range(len(times))]), pa.array(times, TIME)
    return pa.table({**columns, "request_id": ids, "event_timestamp": found, "logged_at": found}, schema=empty.schema)


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("m/day=*/[!.]*.parquet"))


class Clock:
    """A time that passes by `step` at each look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def arguments(root: Path, counters: OwnCounters) -> dict[str, Any]:
    """What a writer is told, but for its generation."""
    signature = Signature("m", "regression", (Feature("x", "float64"),)).to_json()
    fixed = {"signature": signature, "model": "m", "version": "7", "arm": "champion", "zone": "UTC", "stem": STEM}
    return {"root": str(root), "counters": str(counters.path), **fixed}


def own_counters(root: Path) -> OwnCounters:
    return OwnCounters(root / "m" / ".counters" / f"{STEM}.rows")


def event(moment: dt.datetime, number: int) -> tuple[Any, ...]:
    return (f"r{number}", "v1", False, 1_700_000_000_000_000_000, (0, 1, 2, 3, 4), 1, "#0", moment, (1.0,), [0.5], None)


# Days ----------------------------------------------------------------------------------------------------------------


def test_a_request_of_more_days_than_a_year_has_is_refused_and_one_of_a_year_is_logged(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    count = MAXIMUM_DAYS + 1
    texts = [m.isoformat() for m in moments(count)]
    rows = [{**number_model.instances(1)[0], "event_timestamp": t, "id": n} for n, t in enumerate(texts)]
    tensors = [
        {"name": "features", "datatype": "FP32", "shape": [count, 5], "data": [0.5] * 5 * count},
        {"name": "event_timestamp", "datatype": "BYTES", "shape": [count], "data": texts},
    ]
    for path, body in (("/v1/models/m:predict", {"instances": rows}), ("/v2/models/m/infer", {"inputs": tensors})):
        answer = httpx.post(process.url + path, json=body)
        assert answer.status_code == 400
        assert f"event_timestamp values of the rows lie on {count} days; at most {MAXIMUM_DAYS}" in answer.json()["error"]
    rows[-1]["event_timestamp"] = texts[0]
    assert httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": rows}, timeout=30).status_code == 200
    assert process.flush()["log"]["written"] == count
    assert [d.isoformat() for d in days(tmp_path, "m")] == [t[:10] for t in texts[:-1]]
    assert read_segments(tmp_path, "m", FIRST.date())["row_id"].to_pylist() == ["0", str(count - 1)]


def test_rows_are_grouped_by_day_in_a_time_that_grows_with_their_number_alone() -> None:
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 70_000, 105_000)
    begun = time.process_time()
    found = local_days(numbers * 86_400_000_000, ZoneInfo("UTC"))
    assert time.process_time() - begun < 1.5  # a comparison of every day with every row takes 7,000,000,000 of them
    assert [day for day, _ in found] == [str(dt.date(1970, 1, 1) + dt.timedelta(days=int(n))) for n in np.unique(numbers)]
    by_day = {day: rows.tolist() for day, rows in found}
    assert all(
        by_day[str(dt.date(1970, 1, 1) + dt.timedelta(days=int(n)))] == np.flatnonzero(numbers == n).tolist()
        for n in numbers[:50]
    )
    assert local_days(np.array([], dtype=np.int64), ZoneInfo("UTC")) == []


def test_a_writer_killed_in_a_batch_of_many_days_leaves_only_what_the_next_one_removes(tmp_path: Path) -> None:
    live, dead = tmp_path / "live", tmp_path / "dead"
    steps = []

    def progressed() -> None:
        steps.append(len(segments(live)))
        if len(steps) == 20:
            shutil.copytree(live, dead)  # what a kill leaves at this moment

    SegmentWriter(live, "m", f"{STEM}-1-", ZoneInfo("UTC"), progressed=progressed).write(table(moments(30)))
    assert steps == [0] * 30 + list(range(1, 31))  # all are made before the first is named
    assert len(list(dead.rglob(".tmp-*"))) == 20
    Writer(**arguments(dead, own_counters(dead)), generation=2)
    assert not list(dead.rglob("*.parquet"))


def test_once_the_predictor_is_gone_the_writer_ends_in_time_also_within_a_batch(tmp_path: Path) -> None:
    clock, counters = Clock(0.1), own_counters(tmp_path)
    writer = Writer(**arguments(tmp_path, counters), generation=1, is_gone=lambda: True, monotonic=clock)
    counters.accepted = 500
    writer.take(500, packed([event(m, n) for n, m in enumerate(moments(500))]))
    writer.store(1)
    writer.end(sleep=lambda seconds: pytest.fail("it waits"))
    assert clock.now - 100 < DRAIN_SECONDS + 1
    assert 0 < len(segments(tmp_path)) < 50  # what it could do in the time is kept
    assert not list(tmp_path.rglob(".tmp-*"))
    assert counters.accepted - counters.written == 500  # said too high, never too low


def test_what_is_stored_is_said_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "ROWS_TOGETHER", 4)
    monkeypatch.setattr(log_writer, "STORED_TOGETHER", 10)
    counters, seen = own_counters(tmp_path), []
    writer = Writer(**arguments(tmp_path, counters), generation=1, is_gone=lambda: seen.append(counters.stored_through) or False)
    for first in range(0, 40, 4):
        writer.take(first + 4, packed([event(m, first + n) for n, m in enumerate(moments(4))]))
    writer.store(1)
    assert sorted(set(seen)) == [0, 8, 16, 24, 32]  # what a writer that is killed then does not begin again
    assert (counters.stored_through, len(segments(tmp_path))) == (40, 4 * 5)


def test_a_killed_predictors_writer_notices_it_in_the_middle_of_an_order(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    wait_until(lambda: len(children(process.popen.pid, "log_writer")) == 1)
    (writer,) = children(process.popen.pid, "log_writer")
    instance = number_model.instances(1)[0]
    with httpx.Client(timeout=60) as client:
        for first in range(0, 60 * MAXIMUM_DAYS, MAXIMUM_DAYS):
            times = moments(first + MAXIMUM_DAYS)[first:]
            rows = [{**instance, "event_timestamp": m.isoformat()} for m in times]
            assert client.post(f"{process.url}/v1/models/m:predict", json={"instances": rows}).status_code == 200
        with suppress(httpx.TimeoutException):
            client.post(f"{process.url}/admin/flush", timeout=1)
    process.kill()
    writer.wait(DRAIN_SECONDS + 5)
    assert 0 < len(segments(tmp_path)) < 60 * MAXIMUM_DAYS


def test_a_writer_is_stuck_when_it_makes_no_step_not_when_an_order_takes_long(tmp_path: Path) -> None:
    clock, counters = Clock(), own_counters(tmp_path)
    process = WriterProcess(counters, arguments(tmp_path, counters), clock)
    process.look()
    assert process._child is not None
    first = psutil.Process(process._child.pid)
    first.suspend()
    try:
        process.send(1, packed([event(FIRST, 1)]))
        process.order()
        for _ in range(5):
            clock.now += log_process.STUCK_SECONDS - 1
            counters.progress += 1  # as of a segment of many
            process.look()
            assert first.is_running()
        clock.now += log_process.STUCK_SECONDS + 1
        process.look()
        assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
        wait_until(lambda: process.look() or not process.behind, 30)
    finally:
        process.end(10)
    assert len(segments(tmp_path)) == 1


# Bytes ---------------------------------------------------------------------------------------------------------------


def test_what_waits_is_bounded_by_bytes_too(mixed_model: Model, tmp_path: Path) -> None:
    script, root = tmp_path / "narrow.py", tmp_path / "log"
    script.write_text(
        "from mlops_dagster.serving import log_process, server\nlog_process.MAXIMUM_WAITING_BYTES = 1 << 20\nserver.main()\n"
    )
    process = launch([sys.executable, str(script), *command(mixed_model)[3:], "--log-root", str(root), "--flush-seconds", "0.1"])
    try:
        blocker = root / "m" / f"day={dt.datetime.now(dt.UTC).date()}"
        blocker.write_text("a file where the folder should be")
        body = {"instances": [{**mixed_model.instances(1)[0], "carrier": "x" * 4000}]}  # at most 64 make a frame
        with httpx.Client() as client:
            asked = [client.post(f"{process.url}/v1/models/m:predict", json=body).headers["x-request-id"] for _ in range(600)]
        wait_until(lambda: 180 < process.flush()["log"]["waiting"] <= 262)
        status = process.flush()["log"]
        assert status["waiting"] + status["dropped"] == status["accepted"] == 600
        assert process.text().count("the oldest are given up") == 1
        blocker.unlink()
        wait_until(lambda: process.flush()["log"]["waiting"] == 0)
        stored = {i for d in days(root, "m") for i in read_segments(root, "m", d)["request_id"].to_pylist()}
        assert set(asked[-status["waiting"] :]) <= stored < set(asked)
    finally:
        process.kill()


def test_large_rows_do_not_wait_as_python_objects(tmp_path: Path) -> None:
    writer = Writer(**arguments(tmp_path, own_counters(tmp_path)), generation=1)
    frames = [packed([(*event(FIRST, n)[:6], f"{n:07d}" * 150_000, *event(FIRST, n)[7:])]) for n in range(60)]
    tracemalloc.start()
    try:
        for number, content in enumerate(frames, 1):
            writer.take(number, content)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.5 * BYTES_TOGETHER < sum(map(len, frames)) / 2
    writer.store(1)
    assert read_segments(tmp_path, "m", FIRST.date()).num_rows == 60


def test_long_ids_are_refused(served_numbers: Process, number_model: Model) -> None:
    instances = number_model.instances(2)
    block = {"name": "features", "datatype": "FP32", "shape": [1, 5], "data": [0.5] * 5}

    def status(path: str, body: dict[str, Any], says: str) -> int:
        answer = httpx.post(served_numbers.url + path, json=body)
        assert answer.status_code == 200 or says in answer.json()["error"], answer.text
        return answer.status_code

    for length, expected in ((MAXIMUM_ID, 200), (MAXIMUM_ID + 1, 400)):
        identity = "i" * length
        v1, v2 = "/v1/models/m:predict", "/v2/models/m/infer"
        says = f"id has {length} characters; at most {MAXIMUM_ID}"
        tensor = {"name": "id", "datatype": "BYTES", "shape": [1], "data": [identity]}
        assert status(v1, {"instances": [{**instances[0], "id": identity}]}, says) == expected
        assert status(v1, {"instances": [instances[0], {**instances[1], "id": identity}]}, f"instances[1].{says}") == expected
        assert status(v2, {"inputs": [block, tensor]}, says) == expected
        assert status(v2, {"inputs": [block], "id": identity}, f'"id" has {length} characters') == expected


# Damaged files -------------------------------------------------------------------------------------------------------


def test_half_a_line_of_losses_hides_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def lose(rows: int) -> None:
        counters = own_counters(tmp_path)
        counters.accepted = rows
        del counters  # and its lock
        assert [loss.possibly_lost for loss in notice_losses(tmp_path, "m", FIRST)] == [rows]

    lose(1)
    path = tmp_path / "m" / "losses.jsonl"
    path.write_bytes(path.read_bytes() + b'{"process": "7-2-2", "acc\xc3')
    lose(3)
    lose(4)
    assert [loss.possibly_lost for loss in read_losses(tmp_path, "m")] == [1, 3, 4]
    assert capfd.readouterr().err.count("line 2 of") == 1


@pytest.mark.parametrize("damage", [lambda b: b"damaged", lambda b: b[:4] + bytes(len(b) - 200) + b[-196:], lambda b: b""])
def test_a_damaged_segment_is_said_once_and_the_others_are_merged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    writer = SegmentWriter(tmp_path, "m", f"{STEM}-1-", ZoneInfo("UTC"), fan_in=4)
    for number in range(12):
        writer.write(table([FIRST]))
        if number == 1:
            damaged = segments(tmp_path)[1]
            damaged.write_bytes(damage(damaged.read_bytes()))
        writer.merge()
    assert len(segments(tmp_path)) == 1 + 3
    assert sum(pq.read_metadata(p).num_rows for p in segments(tmp_path) if p != damaged) == 11
    assert capfd.readouterr().err.count(str(damaged)) == 1


def test_a_disk_that_refuses_a_merge_is_not_asked_again_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clock, counters, now = Clock(), own_counters(tmp_path), FIRST
    writer = Writer(**arguments(tmp_path, counters), generation=1, monotonic=clock)
    folder = tmp_path / "m" / f"day={now.date()}"
    for number in range(1, 64 + 10):
        writer.take(number, packed([event(now, number)]))
        if number == 64:
            (folder / f"{STEM}-1-000065.parquet").mkdir()  # what the merged one would be called
        writer.store(number)
    assert capfd.readouterr().err.count("stay unmerged") == 1
    assert len(segments(tmp_path)) == 64 + 9 + 1
    clock.now += MERGE_RETRY_SECONDS
    writer.store(99)
    assert len(segments(tmp_path)) == 1 + 1
    (folder / f"{STEM}-1-000065.parquet").rmdir()
    assert read_segments(tmp_path, "m", FIRST.date()).num_rows == 73
