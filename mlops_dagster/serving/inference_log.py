"""Every answered row, as Parquet segments, without slowing the answer.

The answer's path appends one tuple and counts it in a memory-mapped file. Every 64th answer writes the tuples so far into a pipe, as
bytes and without waiting; all else is done by another process (`log_writer`). Rows that it had not stored when it was killed are sent
to a new one. When this process is killed, the segments lack what had not reached the pipe, that is at most what came since the last
look of the log's thread, and the counters tell the next process how many rows that may have been.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from mlops_dagster.core.errors import StorageError
from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_losses import FOLDER, OwnCounters, notice_losses, say
from mlops_dagster.serving.log_process import WriterProcess
from mlops_dagster.serving.log_rows import answer_times, packed
from mlops_dagster.serving.metrics import Metrics

CHUNK_EVENTS = 64  # what is done without a pause while answers wait
COUNTED_TOGETHER = 256
LOOK_SECONDS = 0.25  # how long the writer's end, or its being late, may go unnoticed
ANSWER_SECONDS = 10.0  # how long `flush` waits for a writer that does not get on
END_SECONDS = 5.0


@dataclass(frozen=True)
class LogStatus:
    """Rows since the process began; `waiting` are not stored yet, `dropped` were given up because too many waited for too long."""

    accepted: int
    written: int
    waiting: int
    dropped: int
    possibly_lost_before: int


class InferenceLog:
    """Takes events from the answer's path, counts them for the metrics, and has them stored by a process of its own.

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
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._metrics = metrics
        self._flush_seconds = flush_seconds
        self._monotonic, self._sleep = monotonic, sleep
        self._events: deque[tuple[Any, ...]] = deque()
        self._uncounted: list[tuple[Any, ...]] = []
        self._take_lock, self._turn_lock = threading.Lock(), threading.Lock()  # a turn may take the first, never the other way
        self._stop, self._wake = threading.Event(), threading.Event()
        self._asked: list[Callable[[LogStatus], None]] = []
        self._unanswered: list[tuple[int, float, Callable[[LogStatus], None]]] = []  # order, when to give up, whom to answer
        self._due = monotonic() + flush_seconds
        self._counters: OwnCounters | None = None
        self._writer: WriterProcess | None = None
        self._lost_before = 0
        if root is not None:
            self._open(root, signature, model, version, arm, zone, clock())
        self.append: Callable[[Any], None] = self._accepting(self._counters) if self._counters else self._events.append
        self._thread = threading.Thread(target=self._work, name="inference-log", daemon=True)

    def _open(self, root: Path, signature: Signature, model: str, version: str, arm: str, zone: ZoneInfo, now: datetime) -> None:
        stem = f"{version}-{os.getpid()}-{int(now.timestamp() * 1000):x}"
        try:
            losses = notice_losses(root, model, now)
            self._counters = OwnCounters(root / model / FOLDER / f"{stem}.rows")
        except OSError as error:
            raise StorageError(
                f"Cannot write the inference log under {root}: {error}. Free or fix the disk, or choose another --log-root."
            ) from error
        for loss in losses:
            say(
                f"a predictor of {model} ended without a clean stop ({loss.process}): at most {loss.possibly_lost} rows of its log are lost"
            )
        self._lost_before = sum(loss.possibly_lost for loss in losses)
        names = {"model": model, "version": version, "arm": arm, "zone": str(zone), "stem": stem}
        paths = {"root": str(root), "counters": str(self._counters.path)}
        self._writer = WriterProcess(self._counters, {**names, **paths, "signature": signature.to_json()}, self._monotonic)

    def _accepting(self, counters: OwnCounters) -> Callable[[Any], None]:
        """A function that counts an event's rows and appends it, and hands over a chunk when there is one."""
        numbers, events, append = counters.numbers, self._events, self._events.append

        def accept(event: Any) -> None:
            numbers[0] += event[5]  # `accepted`, without the microsecond of a descriptor
            append(event)
            if len(events) >= CHUNK_EVENTS or event[5] >= CHUNK_EVENTS:
                self._take_if_free()

        return accept

    def start(self) -> None:
        """Begin to store."""
        if self._writer:
            with self._take_lock:
                self._writer.look()
        self._thread.start()

    def flush(self) -> LogStatus:
        """Have all that was appended so far stored; returns when it is, or when the disk refused it."""
        give_up = self._monotonic() + ANSWER_SECONDS
        with self._turn_lock:
            order = self._hand_over()
        while self._attempted() < order and self._monotonic() < give_up:
            with self._turn_lock:
                self._look()
            self._sleep(0.002)
        self._report()
        return self.status()

    def count(self) -> None:
        """Have the metrics know of all that was appended so far."""
        for _ in range(-(-len(self._events) // CHUNK_EVENTS)):
            with self._take_lock:
                self._take()
        with self._take_lock:
            self._count()

    def flush_then(self, answer: Callable[[LogStatus], None]) -> None:
        """Have all that was appended so far stored and then call `answer`, in the log's thread."""
        self._asked.append(answer)
        self._wake.set()

    def status(self) -> LogStatus:
        counters = self._counters
        if counters is None:
            return LogStatus(0, 0, 0, 0, 0)
        written, handled = counters.written, counters.handled_through
        accepted = counters.accepted  # read last: it is never behind the others then
        return LogStatus(accepted, written, max(0, accepted - handled), counters.dropped, self._lost_before)

    def close(self) -> LogStatus:
        """Have the rest stored and end; the counters go when nothing is left behind."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        if self._writer:
            self._writer.end(END_SECONDS)
        status = self.status()
        for answer in [*self._asked, *(a for _, _, a in self._unanswered)]:
            answer(status)
        if self._counters and not status.waiting and not status.dropped:
            self._counters.remove()
        return status

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._pause())
            self._wake.clear()
            try:
                with self._turn_lock:
                    self._turn()
            except Exception as error:  # the thread must outlive any one turn
                say(f"the inference log met an error and goes on: {type(error).__name__}: {error}")

    def _pause(self) -> float:
        due = max(0.0, self._due - self._monotonic())
        if self._unanswered:
            return 0.002
        if self._writer and self._writer.backlog:
            return min(due, 0.01)
        if self._writer and self._writer.behind:
            return min(due, 0.05)
        return min(due, LOOK_SECONDS)

    def _turn(self) -> None:
        now = self._monotonic()
        if self._asked or now >= self._due:
            asked, self._asked = self._asked, []
            self._due = now + self._flush_seconds
            order = self._hand_over(must=bool(asked))
            self._unanswered += [(order, now + ANSWER_SECONDS, answer) for answer in asked]
        self._look()
        self._report()
        attempted = self._attempted()
        answered = [u for u in self._unanswered if u[0] <= attempted or u[1] < now]
        self._unanswered = [u for u in self._unanswered if u not in answered]
        for _, _, answer in answered:
            answer(self.status())

    def _hand_over(self, must: bool = True) -> int:
        """Send all that was appended so far, with an order to store it unless one is still waiting; returns the last order's number."""
        self.count()
        if self._writer is None:
            return 0
        with self._take_lock:
            return self._writer.order() if must or not self._writer.behind else 0

    def _attempted(self) -> int:
        return self._counters.attempted if self._counters else 0

    def _look(self) -> None:
        if self._writer:
            with self._take_lock:
                self._writer.look()

    def _take_if_free(self) -> None:
        """A chunk of what was appended, unless the log's thread is at it; never raises, as an answer waits behind it."""
        if self._take_lock.acquire(blocking=False):
            try:
                self._take()
            except Exception as error:
                say(f"rows are missing in the inference log: {type(error).__name__}: {error}")
            finally:
                self._take_lock.release()

    def _take(self) -> None:
        """At most a chunk of what was appended, sent, and counted where that is worth it."""
        events = [self._events.popleft() for _ in range(min(len(self._events), CHUNK_EVENTS))]
        if self._writer and events:
            self._send(self._writer, events)
        self._uncounted += events
        if len(self._uncounted) >= COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        events, self._uncounted = self._uncounted, []
        if events:
            times = answer_times([e[4] for e in events])
            self._metrics.answered(times, [e[1] for e in events], [e[2] for e in events], [e[5] for e in events])

    @staticmethod
    def _send(writer: WriterProcess, events: list[tuple[Any, ...]]) -> None:
        rows = sum([e[5] for e in events])
        try:
            writer.send(rows, packed(events))
        except ValueError as error:
            if len(events) > 1:  # one of them is to blame: the others are sent
                for event in events:
                    InferenceLog._send(writer, [event])
                return
            writer.give_up(rows)
            say(f"{rows} rows are missing in the inference log: {error}")

    def _report(self) -> None:
        if self._counters is None or self._writer is None:
            return
        status = self.status()
        set_gauge = self._metrics.gauge
        set_gauge("mlops_inference_log_rows_total", "counter", "rows stored in the inference log", status.written)
        set_gauge("mlops_inference_log_waiting_rows", "gauge", "answered rows not yet stored", status.waiting)
        set_gauge("mlops_inference_log_dropped_rows_total", "counter", "rows given up because too many waited", status.dropped)
        set_gauge(
            "mlops_inference_log_lost_rows",
            "gauge",
            "at most so many rows were lost by processes that were killed before this one",
            self._lost_before,
        )
        failing = bool(self._counters.failing) or not self._writer.runs
        set_gauge("mlops_inference_log_failing", "gauge", "1 while the inference log cannot be written", float(failing))
