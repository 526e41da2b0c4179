"""The log's writer as a process of its own: what happens when it, its predictor, the disk or the scheduler fails."""

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from predictor_processes import ROOT, Model, Process, Starter, children, command, launch, wait_until

from mlops_dagster.serving.log_losses import DRAIN_SECONDS, notice_losses, read_losses
from mlops_dagster.serving.log_rows import OPEN, frame
from mlops_dagster.serving.segments import days, read_segments

TODAY = dt.datetime.now(dt.UTC).date()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def writers(predictor: int) -> list[int]:
    return [c.pid for c in children(predictor, "log_writer")]


def writer_of(process: Process) -> int:
    wait_until(lambda: len(writers(process.popen.pid)) == 1)
    return writers(process.popen.pid)[0]


def stored(root: Path) -> set[str]:
    return {i for d in days(root, "m") for i in read_segments(root, "m", d)["request_id"].to_pylist()}


def written_by(process: Process) -> int:
    return httpx.get(f"{process.url}/admin/status").json()["log"]["written"]


class Load:
    """Callers that note which requests were answered, and when."""

    def __init__(self, process: Process, body: dict[str, object], callers: int = 3) -> None:
        self.answered: list[tuple[str, float]] = []
        self._process, self._body = process, body
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(callers)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> set[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return {i for i, _ in self.answered}

    def _send(self) -> None:
        with httpx.Client() as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self._process.url}/v1/models/m:predict", json=self._body)
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200, answer.text
                self.answered.append((answer.headers["x-request-id"], time.monotonic()))


@contextmanager
def load(process: Process, model: Model, rows: int = 1) -> Iterator[Load]:
    running = Load(process, {"instances": model.instances(rows)})
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def busy_cores(each: int = 2) -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(each * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def test_a_killed_writer_loses_nothing_under_load(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    seen, written = set(), 0
    with load(process, number_model) as callers:
        for _ in range(3):
            wait_until(lambda before=written: written_by(process) > before + 300, 20)  # so that each has segments to its name
            written = written_by(process)
            seen.add(writer := writer_of(process))
            os.kill(writer, signal.SIGKILL)
        wait_until(lambda: written_by(process) > written + 300, 20)
    status = process.flush()["log"]
    assert len(seen) == 3
    assert {i for i, _ in callers.answered} <= stored(tmp_path)
    assert (status["waiting"], status["dropped"]) == (0, 0)
    assert status["written"] == status["accepted"] == len(stored(tmp_path))
    assert "ended (-9)" in process.text()
    assert process.stop() == 0
    assert not list((tmp_path / "m" / ".counters").iterdir())
    assert not list(tmp_path.rglob(".tmp-*"))


def test_rows_of_many_kinds_come_through_a_new_writer_unchanged(start: Starter, mixed_model: Model, tmp_path: Path) -> None:
    process = start(mixed_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    instances = mixed_model.instances(40)
    moment = "2024-03-01T12:00:00.123456+02:00"
    asked = [[i] for i in instances[:10]] + [instances[10:], [instances[0] | {"event_timestamp": moment, "id": "x"}]]
    for body in asked:
        assert httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": body}).status_code == 200
    os.kill(writer_of(process), signal.SIGKILL)
    assert process.flush()["log"]["written"] == 41
    rows = [r for d in days(tmp_path, "m") for r in read_segments(tmp_path, "m", d).to_pylist()]
    (timed,) = [r for r in rows if r["row_id"] == "x"]
    assert timed["event_timestamp"] == dt.datetime(2024, 3, 1, 10, 0, 0, 123456, tzinfo=dt.UTC)
    assert timed["features"] == instances[0]
    assert [r["features"] for r in rows if r["row_id"] != "x"] == instances


def test_a_killed_predictor_loses_at_most_the_last_second_and_its_writer_ends(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    writer = writer_of(process)
    with load(process, number_model, rows=3) as callers:
        wait_until(lambda: len(callers.answered) > 600 and bool(days(tmp_path, "m")))
        died = time.monotonic()
        process.kill()
    wait_until(lambda: not alive(writer), DRAIN_SECONDS + 5)
    found = stored(tmp_path)
    lost = [at for identity, at in callers.answered if identity not in found]
    assert all(died - at < 1 for at in lost)
    successor = start(number_model, "--log-root", str(tmp_path))
    said = successor.flush()["log"]["possibly_lost_before"]
    last_second = 3 * sum(died - at < 1 for _, at in callers.answered) + 9  # three rows a caller may be counted, not yet answered
    assert 3 * len(lost) <= said <= last_second
    assert sum(loss.possibly_lost for loss in read_losses(tmp_path, "m")) == said


def test_a_successor_that_comes_at_once_waits_for_what_is_still_stored(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    writer = writer_of(process)
    with load(process, number_model) as callers:
        wait_until(lambda: len(callers.answered) > 500)
    os.kill(writer, signal.SIGSTOP)
    process.kill()
    threading.Timer(1.5, os.kill, (writer, signal.SIGCONT)).start()
    begun = time.monotonic()
    losses = notice_losses(tmp_path, "m", dt.datetime.now(dt.UTC))
    assert time.monotonic() - begun > 1.4
    missing = len({i for i, _ in callers.answered} - stored(tmp_path))
    assert 0 < missing < 64  # what had not made a whole chunk: the last look was to be a minute later
    assert [loss.possibly_lost for loss in losses] == [missing]
    assert not list((tmp_path / "m" / ".counters").iterdir())


def test_a_writer_that_hangs_does_not_hide_the_loss(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": number_model.instances(5)})
    writer = writer_of(process)
    os.kill(writer, signal.SIGSTOP)
    try:
        process.kill()
        paused: list[float] = []
        (loss,) = notice_losses(tmp_path, "m", dt.datetime.now(dt.UTC), paused.append)
        assert (loss.accepted, loss.possibly_lost) == (5, 5)
        assert DRAIN_SECONDS < sum(paused) < 10
    finally:
        os.kill(writer, signal.SIGCONT)
    wait_until(lambda: not alive(writer), DRAIN_SECONDS + 5)
    assert notice_losses(tmp_path, "m", dt.datetime.now(dt.UTC)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_loses_nothing(number_model: Model, tmp_path: Path, number: signal.Signals) -> None:
    process = launch(["setsid", "-w", *command(number_model), "--log-root", str(tmp_path), "--flush-seconds", "60"])
    predictor = httpx.get(f"{process.url}/admin/status").json()["pid"]
    try:
        wait_until(lambda: len(writers(predictor)) == 1)
        (writer,) = writers(predictor)
        wait_until(lambda: ignores(writer, number))
        with load(process, number_model) as callers:
            wait_until(lambda: len(callers.answered) > 200)
        os.killpg(os.getpgid(predictor), number)
        assert process.popen.wait(20) == 0
    finally:
        if alive(predictor):
            os.kill(predictor, signal.SIGKILL)
    assert {i for i, _ in callers.answered} == stored(tmp_path)
    assert not alive(writer)
    assert not list((tmp_path / "m" / ".counters").iterdir())


def ignores(pid: int, number: signal.Signals) -> bool:
    mask = next(t.split()[1] for t in Path(f"/proc/{pid}/status").read_text().splitlines() if t.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("opened", [False, True])
def test_a_writer_whose_predictor_never_spoke_or_left_no_counters_ends(tmp_path: Path, opened: bool) -> None:
    said = frame(OPEN, 0, b'{"root": "r", "counters": "gone", "signature": "", "model": "m", "version": "1", "arm": "a", '
                 b'"zone": "UTC", "stem": "s", "generation": 1}')  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "mlops_dagster.serving.log_writer"],
        cwd=ROOT,
        input=said if opened else said[:30],
        capture_output=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_flush_is_answered_only_when_the_rows_are_stored(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "60")
    writer = writer_of(process)
    httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": number_model.instances(5)})
    os.kill(writer, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (writer, signal.SIGCONT)).start()
    begun = time.monotonic()
    assert process.flush()["log"]["written"] == 5
    assert time.monotonic() - begun > 0.9
    assert read_segments(tmp_path, "m", TODAY).num_rows == 5


def test_rows_are_readable_soon_though_others_take_every_core(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    writer = writer_of(process)
    wait_until(lambda: os.sched_getscheduler(writer) == os.SCHED_IDLE)
    with busy_cores():
        for number in range(3):
            httpx.post(
                f"{process.url}/v1/models/m:predict",
                json={"instances": number_model.instances(1)},
                headers={"x-request-id": f"r{number}"},
                timeout=30,
            )
            wait_until(lambda n=number: f"r{n}" in stored(tmp_path), 3)
            time.sleep(0.6)
    assert writers(process.popen.pid) == [writer]
    wait_until(lambda: os.sched_getscheduler(writer) == os.SCHED_IDLE)


def test_where_none_but_root_may_raise_it_a_late_writer_is_replaced(number_model: Model, tmp_path: Path) -> None:
    script = tmp_path / "unprivileged.py"
    script.write_text(
        "import os\n"
        "def refuse(pid, policy, parameter, real=os.sched_setscheduler):\n"
        "    if policy == os.SCHED_OTHER: raise PermissionError\n"
        "    real(pid, policy, parameter)\n"
        "os.sched_setscheduler = refuse\n"
        "from mlops_dagster.serving import server\nserver.main()\n"
    )
    process = launch([sys.executable, str(script), *command(number_model)[3:], "--log-root", str(tmp_path / "log")])
    try:
        first = writer_of(process)
        wait_until(lambda: os.sched_getscheduler(first) == os.SCHED_IDLE)
        os.kill(first, signal.SIGSTOP)  # as starved as can be
        for _ in range(10):
            httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": number_model.instances(2)})
        assert process.flush()["log"]["written"] == 20
        assert not alive(first)
        second = writer_of(process)
        time.sleep(1)
        assert os.sched_getscheduler(second) == os.SCHED_OTHER
        assert process.stop() == 0
    finally:
        process.kill()


def test_what_waits_is_bounded_and_what_is_given_up_is_counted(number_model: Model, tmp_path: Path) -> None:
    script = tmp_path / "narrow.py"
    script.write_text(
        "from mlops_dagster.serving import log_process, server\nlog_process.MAXIMUM_WAITING = 1000\nserver.main()\n"
    )
    root = tmp_path / "log"
    process = launch([sys.executable, str(script), *command(number_model)[3:], "--log-root", str(root), "--flush-seconds", "0.1"])
    try:
        blocker = root / "m" / f"day={TODAY}"
        blocker.write_text("a file where the folder should be")
        body = {"instances": number_model.instances(10) * 10}
        asked = [httpx.post(f"{process.url}/v1/models/m:predict", json=body).headers["x-request-id"] for _ in range(50)]
        wait_until(lambda: process.flush()["log"]["waiting"] == 1000)
        status = process.flush()["log"]
        assert (status["accepted"], status["written"], status["dropped"]) == (5000, 0, 4000)
        assert "mlops_inference_log_dropped_rows_total" in (text := httpx.get(f"{process.url}/metrics").text)
        assert float(next(t for t in text.splitlines() if t.startswith("mlops_inference_log_dropped")).split()[-1]) == 4000
        assert process.text().count("are given up") == 1
        blocker.unlink()
        wait_until(lambda: process.flush()["log"]["written"] == 1000)
        # Requests of 100 rows each: the newest, and perhaps some that were given up after they had been put together with them.
        assert set(asked[-10:]) <= stored(root) < set(asked)
        assert process.stop() == 0
        assert "1000 rows logged, 4000 not" in process.text()
        assert [loss.possibly_lost for loss in notice_losses(root, "m", dt.datetime.now(dt.UTC))] == [4000]
    finally:
        process.kill()


def test_a_disk_that_refuses_through_a_restart_of_the_writer_loses_nothing(
    start: Starter, number_model: Model, tmp_path: Path
) -> None:
    process = start(number_model, "--log-root", str(tmp_path), "--flush-seconds", "0.05")
    blocker = tmp_path / "m" / f"day={TODAY}"
    blocker.write_text("a file where the folder should be")
    with load(process, number_model) as callers:
        wait_until(lambda: len(callers.answered) > 200 and "cannot be written" in process.text())
        os.kill(writer_of(process), signal.SIGKILL)
        wait_until(lambda: len(callers.answered) > 600)
        blocker.unlink()
        wait_until(lambda: "can be written again" in process.text())
    assert process.flush()["log"]["waiting"] == 0
    assert {i for i, _ in callers.answered} == stored(tmp_path)
    assert process.text().count("cannot be written") == 1


def test_large_requests_fill_the_pipe_and_all_arrive(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    body = {"instances": (number_model.instances(50) * 100)[:5000]}
    with httpx.Client() as client:
        for _ in range(40):
            assert client.post(f"{process.url}/v1/models/m:predict", json=body).status_code == 200
    status = process.flush()["log"]
    assert status["written"] == status["accepted"] == 200_000
    rows = [read_segments(tmp_path, "m", d).num_rows for d in days(tmp_path, "m")]
    assert sum(rows) == 200_000


def test_a_stop_while_the_disk_refuses_says_what_is_lost(start: Starter, number_model: Model, tmp_path: Path) -> None:
    process = start(number_model, "--log-root", str(tmp_path))
    writer = writer_of(process)
    blocker = tmp_path / "m" / f"day={TODAY}"
    blocker.write_text("a file where the folder should be")
    httpx.post(f"{process.url}/v1/models/m:predict", json={"instances": number_model.instances(7)})
    assert process.stop() == 0
    assert not alive(writer)
    assert "0 rows logged, 7 not" in process.text()
    blocker.unlink()
    assert start(number_model, "--log-root", str(tmp_path)).flush()["log"]["possibly_lost_before"] == 7
