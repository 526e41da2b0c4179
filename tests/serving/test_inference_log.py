"""The inference log of real processes: everything answered is in it, whatever happens to the process."""

import datetime as dt
import fcntl
import json
import re
import threading
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from predictor_processes import Model, Process, Starter, wait_until

from mlops_dagster.core.errors import StorageError
from mlops_dagster.serving.inference_log import CHUNK_EVENTS
from mlops_dagster.serving.log_losses import read_losses
from mlops_dagster.serving.segments import TIME, SegmentWriter, days, read_segments, schema

TODAY = dt.datetime.now(dt.UTC).date()


def ask(process: Process, instances: list[dict[str, Any]], **headers: str) -> dict[str, Any]:
    answer = httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": instances}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logged(root: Path, day: dt.date | None = None) -> pa.Table:
    listed = [day] if day else days(root, "m")
    return pa.concat_tables([read_segments(root, "m", d) for d in listed], promote_options="permissive")


def writer_ended(root: Path) -> bool:
    (path,) = (root / "m" / ".counters").glob("*.writer")
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def test_a_flush_brings_every_answered_row_with_its_answer(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--arm", "challenger", "--flush-seconds", "60")
    instances = [{**i, "id": f"row{n}"} for n, i in enumerate(number_model.instances(30))]
    one = ask(process, instances[:1], **{"x-request-id": "first"})
    many = ask(process, instances[1:], **{"x-request-id": "second", "x-mlops-shadow": "1"})
    infer = {"name": "features", "shape": [2, 5], "datatype": "FP32", "data": [0.5] * 10}
    httpx.post(f"{process.url}/v2/models/m/infer", json={"inputs": [infer], "id": "third"})
    assert process.flush()["log"] == {"accepted": 32, "written": 32, "waiting": 0, "dropped": 0, "possibly_lost_before": 0}

    rows = logged(tmp_path).to_pylist()
    assert [r["request_id"] for r in rows] == ["first"] + ["second"] * 29 + ["third"] * 2
    assert [r["row_id"] for r in rows if r["request_id"] != "third"].sort() == [i["id"] for i in instances].sort()
    assert [r["shadow"] for r in rows] == [False] + [True] * 29 + [False] * 2
    assert {(r["model"], r["version"], r["arm"]) for r in rows} == {("m", "7", "challenger")}
    by_id = {r["row_id"]: r for r in rows if r["request_id"] != "third"}
    for number, instance in enumerate(instances):
        row = by_id[instance["id"]]
        answer, at = (one, 0) if number == 0 else (many, number - 1)
        assert row["features"] == {k: v for k, v in instance.items() if k != "id"}
        assert (row["prediction"], row["prediction_label"]) == (answer["predictions"][at], None)
        assert row["score"] == answer["probabilities"][at][1]
        assert 0 < row["latency_ms"] < 5000
        assert row["event_timestamp"] == row["logged_at"]


def test_full_chunks_made_between_answers_and_the_rest_are_one_log(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    instances = number_model.instances(7)
    with httpx.Client() as client:
        for number in range(2 * CHUNK_EVENTS + 10):
            asked = instances[number % 7 :][: 1 + (number % 5 == 0)]
            body = {"instances": [{**i, "id": f"{number}-{n}"} for n, i in enumerate(asked)]}
            assert client.post(f"{process.url}/v1/models/m:predict", json=body).status_code == 200
    status = process.flush()["log"]
    rows = logged(tmp_path)
    assert status["accepted"] == status["written"] == rows.num_rows
    by_id = {r["row_id"]: r["features"] for r in rows.to_pylist()}
    assert len(by_id) == rows.num_rows
    assert all(features == instances[int(name.split("-")[0]) % 7 + int(name[-1])] for name, features in by_id.items())
    counted = httpx.get(f"{process.url}/metrics").text
    assert re.search(rf'mlops_predicted_rows_total{{.*shadow="false"}} {rows.num_rows}\n', counted)


def test_rows_are_stored_by_the_day_of_their_event_in_the_models_zone(
    start: Starter, number_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing Pandera sets this where pyspark is installed; a server that inherits it must not lose the offsets.
    monkeypatch.setenv("PYARROW_IGNORE_TIMEZONE", "1")
    process = start(number_model, "--log-root", str(tmp_path), "--timezone", "America/New_York")
    instance = number_model.instances(1)[0]
    moments = [
        "2013-02-17T04:59:59Z",
        "2013-02-17T05:00:00Z",
        "2013-07-01T00:00:00-04:00",
        "2013-07-01T03:59:59.999999",
        "2013-11-03T23:59:59-05:00",
    ]
    for number, moment in enumerate(moments):
        ask(process, [{**instance, "id": f"{number}", "event_timestamp": moment}])
    ask(process, [{**instance, "id": "together", "event_timestamp": m} | {"id": m} for m in moments] + [instance])
    process.flush()
    found = {d.isoformat(): read_segments(tmp_path, "m", d)["row_id"].to_pylist() for d in days(tmp_path, "m")}
    today = max(found)
    assert found == {
        "2013-02-16": ["0", moments[0]],
        "2013-02-17": ["1", moments[1]],
        "2013-06-30": ["3", moments[3]],
        "2013-07-01": ["2", moments[2]],
        "2013-11-03": ["4", moments[4]],
        today: found[today],
    }
    assert len(found) == 6
    utc = read_segments(tmp_path, "m", "2013-07-01")["event_timestamp"].to_pylist()
    assert utc[0] == dt.datetime(2013, 7, 1, 4, tzinfo=dt.UTC)


def test_nulls_strings_whole_numbers_and_booleans_keep_their_types(
    start: Starter, boosted_model: Model, mixed_model: Model, regression_model: Model, tmp_path: Path
) -> None:
    for name, model in (("boosted", boosted_model), ("mixed", mixed_model), ("regression", regression_model)):
        process = start(model, "--log-root", str(tmp_path / name))
        instances = model.instances(50)
        predictions = [ask(process, [i])["predictions"][0] for i in instances[:25]] + ask(process, instances[25:])["predictions"]
        process.flush()
        table = logged(tmp_path / name)
        assert table["features"].to_pylist() == instances
        labels = table["prediction_label"].to_pylist()
        if name == "mixed":
            assert labels == predictions
            assert table["prediction"].to_pylist() == [float(p == "on time") for p in predictions]
        else:
            assert set(labels) == {None}
            np.testing.assert_allclose(table["prediction"].to_numpy(), predictions)
        assert (table["score"].null_count == 50) == (name == "regression")


def test_a_repeated_request_is_read_once_and_a_mirrored_one_beside_it(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    instance = {**number_model.instances(1)[0], "id": "x"}
    for _ in range(3):
        ask(process, [instance], **{"x-request-id": "again"})
        process.flush()
    ask(process, [instance], **{"x-request-id": "again", "x-mlops-shadow": "1"})
    process.flush()
    assert logged(tmp_path)["shadow"].to_pylist() == [False, True]
    assert len(list((tmp_path / "m" / f"day={TODAY}").iterdir())) == 4


def test_a_killed_process_loses_at_most_the_last_second_and_its_successor_says_how_much(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    instance, answered = number_model.instances(1)[0], []
    stop = threading.Event()

    def send() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                try:
                    answer = client.post(f"{process.url}/v1/models/m:predict", json={"instances": [instance]})
                except httpx.HTTPError:
                    return
                answered.append((answer.headers["x-request-id"], dt.datetime.now(dt.UTC)))

    senders = [threading.Thread(target=send) for _ in range(3)]
    for sender in senders:
        sender.start()
    wait_until(lambda: len(answered) > 400 and bool(days(tmp_path, "m")))
    died = dt.datetime.now(dt.UTC)
    process.kill()
    stop.set()
    for sender in senders:
        sender.join()
    wait_until(lambda: writer_ended(tmp_path))  # it stores what the pipe still held
    stored = set(logged(tmp_path)["request_id"].to_pylist())
    lost = [(i, at) for i, at in answered if i not in stored]
    assert all(died - at < dt.timedelta(seconds=1) for _, at in lost)

    successor = start(number_model, "--log-root", str(tmp_path))
    said = successor.flush()["log"]["possibly_lost_before"]
    assert len(lost) <= said <= len(lost) + 3  # one row a sender may have been counted but not yet answered
    if said:
        assert f"at most {said} rows of its log are lost" in successor.text()
        assert [loss.possibly_lost for loss in read_losses(tmp_path, "m")] == [said]
    assert successor.stop() == 0
    assert start(number_model, "--log-root", str(tmp_path)).flush()["log"]["possibly_lost_before"] == 0
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_living_neighbour_is_not_taken_for_dead(start: Starter, number_model: Model, tmp_path: Path) -> None:
    first = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    ask(first, number_model.instances(2))
    second = start(number_model, "--log-root", str(tmp_path), version="8")
    assert second.flush()["log"]["possibly_lost_before"] == 0
    assert first.flush()["log"]["written"] == 2


def test_a_clean_stop_stores_the_rest(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    ask(process, number_model.instances(7))
    assert process.stop() == 0
    assert logged(tmp_path).num_rows == 7
    assert "7 rows logged, 0 not" in process.text()
    assert not list((tmp_path / "m" / ".counters").iterdir())


def test_a_disk_that_refuses_stops_no_answer_and_loses_no_row_once_it_is_back(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "0.05")
    blocker = tmp_path / "m" / f"day={TODAY}"
    blocker.write_text("a file where the folder should be")
    for _ in range(20):
        ask(process, number_model.instances(1))
    wait_until(lambda: "cannot be written" in process.text())
    assert process.flush()["log"]["waiting"] == 20
    assert "mlops_inference_log_failing{" in (metrics := httpx.get(f"{process.url}/metrics").text)
    assert next(line for line in metrics.splitlines() if line.startswith("mlops_inference_log_failing")).endswith(" 1")
    blocker.unlink()
    wait_until(lambda: process.flush()["log"]["waiting"] == 0)
    assert logged(tmp_path).num_rows == 20
    assert "can be written again" in process.text()


def test_many_small_segments_become_few(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    for _ in range(130):
        ask(process, number_model.instances(1))
        process.flush()
    assert len(list((tmp_path / "m" / f"day={TODAY}").iterdir())) == 2 + 2
    assert logged(tmp_path).num_rows == 130


def test_reading_days_without_rows_and_broken_segments(tmp_path: Path) -> None:
    assert days(tmp_path, "m") == []
    assert read_segments(tmp_path, "m", TODAY).num_rows == 0
    folder = tmp_path / "m" / f"day={TODAY}"
    folder.mkdir(parents=True)
    (folder / ".tmp-7-1-1.parquet").write_bytes(b"half")
    assert (days(tmp_path, "m"), read_segments(tmp_path, "m", TODAY).num_rows) == ([], 0)
    (folder / "7-1-1.parquet").write_bytes(b"not parquet")
    with pytest.raises(StorageError, match="Move the broken file away"):
        read_segments(tmp_path, "m", TODAY)


def test_versions_with_other_features_are_read_together(
    start: Starter, number_model: Model, mixed_model: Model, tmp_path: Path
) -> None:
    for model, version in ((number_model, "1"), (mixed_model, "2")):
        process = start(model, "--log-root", str(tmp_path), version=version)
        ask(process, model.instances(1))
        assert process.stop() == 0
    rows = logged(tmp_path).to_pylist()
    assert [r["version"] for r in rows] == ["1", "2"]
    assert rows[0]["features"]["carrier"] is None
    assert rows[1]["features"]["carrier"] == mixed_model.instances(1)[0]["carrier"]


def test_segments_are_ordinary_parquet(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    ask(process, number_model.instances(1))
    process.flush()
    (path,) = (tmp_path / "m").glob("day=*/*.parquet")
    assert path.name.startswith(f"7-{process.popen.pid}-")
    found = pq.read_table(path, partitioning=None)
    assert json.loads(json.dumps(found.column_names))[:4] == ["request_id", "row_id", "logged_at", "event_timestamp"]


def test_of_rows_of_two_days_none_is_stored_while_one_day_refuses(tmp_path: Path) -> None:
    moments = [dt.datetime(2026, 1, day, 12, tzinfo=dt.UTC) for day in (1, 2)]
    empty = schema().empty_table()
    columns = {f.name: pa.nulls(2, f.type) for f in empty.schema}
    table = pa.table(
        {**columns, "event_timestamp": pa.array(moments, TIME), "logged_at": pa.array(moments, TIME)}, schema=empty.schema
    )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "day=2026-01-02").write_text("a file where a folder is needed")
    writer = SegmentWriter(tmp_path, "m", "1-1-", ZoneInfo("UTC"))
    for _ in range(3):
        with pytest.raises(OSError, match="day=2026-01-02"):
            writer.write(table)
    assert not list(tmp_path.glob("m/day=2026-01-01/*"))
    (tmp_path / "m" / "day=2026-01-02").unlink()
    writer.write(table)
    assert [pq.read_metadata(p).num_rows for p in tmp_path.glob("m/day=*/*.parquet")] == [1, 1]
