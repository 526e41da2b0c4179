"""Every answered row, as Parquet segments, without slowing the answer.

The answer's path appends one tuple and counts it in a memory-mapped file. Under load every 256th answer turns the tuples so far into
columns (0.3 ms, then and there: a thread that did it would fight for the interpreter with answers that are due, and be put to sleep
holding it); a thread does the rest and stores them. When the process is killed, the segments lack what came after the last
flush, and the counters, which survive it in the page cache, tell the next process how many rows that may have been.
"""

import fcntl
import json
import mmap
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

from mlops_dagster.core.errors import StorageError
from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_rows import Event, EventTable, answer_times
from mlops_dagster.serving.metrics import Metrics
from mlops_dagster.serving.segments import SegmentWriter, remove_leftovers

COUNTERS = ".counters"
LOSSES = "losses.jsonl"
TWO_COUNTS = struct.Struct("=QQ")
MAXIMUM_WAITING = 500_000
CHUNK_EVENTS = 256  # what is done without a pause while answers wait


@dataclass(frozen=True)
class Loss:
    """What a process that was killed may have answered without logging: at most `possibly_lost` of its `accepted` rows."""

    process: str
    accepted: int
    written: int
    possibly_lost: int
    noticed_at: str


@dataclass(frozen=True)
class LogStatus:
    """Rows since the process began; `waiting` are in memory, `dropped` were given up because the disk refused them for too long."""

    accepted: int
    written: int
    waiting: int
    dropped: int
    possibly_lost_before: int


class Counters:
    """Accepted and written rows in a mapped file that is locked while its process lives."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        fresh = path.with_suffix(".new")  # it gets its name only when locked, so that no other process takes it for a dead one's
        self._file = open(fresh, "w+b")  # noqa: SIM115 - open as long as the process: it holds the lock
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(bytes(TWO_COUNTS.size))
        self._file.flush()
        fresh.rename(path)
        self._counts = memoryview(mmap.mmap(self._file.fileno(), TWO_COUNTS.size)).cast("Q")

    @property
    def accepted(self) -> int:
        return self._counts[0]

    @property
    def written(self) -> int:
        return self._counts[1]

    def wrote(self, rows: int) -> None:
        self._counts[1] += rows

    def accepting(self, events: deque[Event], take: Callable[[], None]) -> Callable[[Any], None]:
        """A function that counts an event's rows and appends it, and calls `take` when a chunk is full."""
        counts, append = self._counts, events.append

        def accept(event: Any) -> None:
            counts[0] += event[5]
            append(event)
            if len(events) >= CHUNK_EVENTS:
                take()

        return accept

    def remove(self) -> None:
        """Forget this process: all its rows are stored."""
        self.path.unlink(missing_ok=True)


def notice_losses(root: Path, model: str, now: datetime) -> list[Loss]:
    """Read, record in `losses.jsonl` and remove the counters of processes of `model` that are gone; their half-written segments too."""
    losses = []
    for path in sorted((root / model / COUNTERS).glob("*.rows")):
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process lives
            content = file.read(TWO_COUNTS.size)
            accepted, written = TWO_COUNTS.unpack(content) if len(content) == TWO_COUNTS.size else (0, 0)
            loss = Loss(path.stem, accepted, written, max(0, accepted - written), now.isoformat())
            if loss.possibly_lost:
                with open(root / model / LOSSES, "a") as losses_file:
                    losses_file.write(json.dumps(asdict(loss)) + "\n")
                losses.append(loss)
            remove_leftovers(root, model, path.stem)
            path.unlink(missing_ok=True)
    return losses


def read_losses(root: Path | str, model: str) -> list[Loss]:
    """All losses noticed so far, oldest first."""
    path = Path(root) / model / LOSSES
    return [Loss(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


class InferenceLog:
    """Takes events from the answer's path, counts them for the metrics, and stores them as segments in a thread of its own.

    Without `root` events are only counted. `append` is cheap and safe from any thread that holds the caller's gate.
    """

    def __init__(
        self,
        root: Path | None,
        signature: Signature,
        model: str,
        version: str,
        arm: str,
        metrics: Metrics,
        zone: ZoneInfo,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        flush_seconds: float = 0.25,
    ) -> None:
        self._metrics = metrics
        self._flush_seconds = flush_seconds
        self._events: deque[Event] = deque()
        self._chunks: deque[list[pa.Array]] = deque()
        self._unstored: pa.Table | None = None
        self._dropped = 0
        self._failing = False
        self._take_lock, self._store_lock = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._asked: list[Callable[[LogStatus], None]] = []
        self._writer: SegmentWriter | None = None
        self._counters: Counters | None = None
        self._lost_before = 0
        if root is not None:
            self._open(root, signature, model, version, arm, zone, clock())
        accepting = self._counters.accepting(self._events, self._take_if_free) if self._counters else self._events.append
        self.append: Callable[[Any], None] = accepting
        self._thread = threading.Thread(target=self._work, name="inference-log", daemon=True)

    def _open(self, root: Path, signature: Signature, model: str, version: str, arm: str, zone: ZoneInfo, now: datetime) -> None:
        stem = f"{version}-{os.getpid()}-{int(now.timestamp() * 1000):x}"
        try:
            losses = notice_losses(root, model, now)
            self._counters = Counters(root / model / COUNTERS / f"{stem}.rows")
        except OSError as error:
            raise StorageError(
                f"Cannot write the inference log under {root}: {error}. Free or fix the disk, or choose another --log-root."
            ) from error
        for loss in losses:
            _say(
                f"a predictor of {model} ended without a clean stop ({loss.process}): at most {loss.possibly_lost} rows of its log are lost"
            )
        self._lost_before = sum(loss.possibly_lost for loss in losses)
        self._table = EventTable(signature, model, version, arm)
        self._writer = SegmentWriter(root, model, stem, zone)

    def start(self) -> None:
        """Begin to store."""
        self._thread.start()

    def flush(self) -> LogStatus:
        """Store (and count) all that was appended so far, now, in this thread."""
        with self._store_lock:
            self.count()
            if self._chunks or self._unstored is not None:
                self._store()
            self._report()
            return self.status()

    def count(self) -> None:
        """Have the metrics know of all that was appended so far."""
        for _ in range(-(-len(self._events) // CHUNK_EVENTS)):
            with self._take_lock:
                self._take()

    def flush_then(self, answer: Callable[[LogStatus], None]) -> None:
        """Have the log's thread store all that was appended so far and then call `answer`."""
        self._asked.append(answer)
        self._wake.set()

    def status(self) -> LogStatus:
        counters = self._counters
        accepted, written = (counters.accepted, counters.written) if counters else (0, 0)
        return LogStatus(accepted, written, max(0, accepted - written - self._dropped), self._dropped, self._lost_before)

    def close(self) -> LogStatus:
        """Store the rest and end; the counters go when nothing is left behind."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        status = self.flush()
        if self._counters and not status.waiting and not status.dropped:
            self._counters.remove()
        return status

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            try:
                self._answer_and_flush()
            except Exception as error:  # the thread must outlive any one batch
                _say(f"the inference log met an error and goes on: {type(error).__name__}: {error}")

    def _answer_and_flush(self) -> None:
        asked, self._asked = self._asked, []
        try:
            self.flush()
        finally:
            status = self.status()
            for answer in asked:
                answer(status)

    def _take_if_free(self) -> None:
        """A chunk of what was appended, unless the log's thread is at it; never raises, as an answer waits behind it."""
        if self._take_lock.acquire(blocking=False):
            try:
                self._take()
            except Exception as error:
                _say(f"rows are missing in the inference log: {type(error).__name__}: {error}")
            finally:
                self._take_lock.release()

    def _take(self) -> None:
        """At most a chunk of what was appended, counted and as columns to be stored."""
        events = [self._events.popleft() for _ in range(min(len(self._events), CHUNK_EVENTS))]
        if not events:
            return
        by = Event(*zip(*events, strict=True))  # type: ignore[arg-type]
        times = answer_times(by.times_ns)  # type: ignore[arg-type]
        self._metrics.answered(times, by.protocol, by.shadow, by.count)  # type: ignore[arg-type]
        if self._writer:
            self._chunks.extend(self._table.chunks(events, times))

    def _store(self) -> None:
        assert self._writer
        assert self._counters
        chunks = [self._chunks.popleft() for _ in range(len(self._chunks))]
        tables = [*([self._unstored] if self._unstored is not None else []), *([self._table.table(chunks)] if chunks else [])]
        table = pa.concat_tables(tables)
        try:
            self._writer.write(table)
        except (OSError, pa.ArrowException) as error:
            self._keep_waiting(table, error)
            return
        self._unstored = None
        self._counters.wrote(table.num_rows)
        try:
            self._writer.merge()
        except (OSError, pa.ArrowException) as error:
            _say(f"small segments of the inference log stay unmerged: {error}")
        if self._failing:
            self._failing = False
            _say("the inference log can be written again")

    def _keep_waiting(self, table: pa.Table, error: Exception) -> None:
        """The disk refused: answers go on, rows wait in memory, and the oldest are given up when they are too many."""
        if not self._failing:
            self._failing = True
            _say(
                f"the inference log cannot be written: {error}. Rows wait in memory (at most {MAXIMUM_WAITING:,}); free or fix the disk"
            )
        excess = max(0, table.num_rows - MAXIMUM_WAITING)
        self._dropped += excess
        self._unstored = table.slice(excess)

    def _report(self) -> None:
        if self._counters is None:
            return
        status = self.status()
        set_gauge = self._metrics.gauge
        set_gauge("mlops_inference_log_rows_total", "counter", "rows stored in the inference log", status.written)
        set_gauge("mlops_inference_log_waiting_rows", "gauge", "answered rows not yet stored", status.waiting)
        set_gauge(
            "mlops_inference_log_dropped_rows_total", "counter", "rows given up because the disk refused them", status.dropped
        )
        set_gauge(
            "mlops_inference_log_lost_rows",
            "gauge",
            "at most so many rows were lost by processes that were killed before this one",
            self._lost_before,
        )
        set_gauge("mlops_inference_log_failing", "gauge", "1 while the disk refuses the inference log", float(self._failing))


def _say(message: str) -> None:
    print(f"mlops predictor: {message}", file=sys.stderr, flush=True)
