"""The process that stores the inference log: `python -m mlops_dagster.serving.log_writer`, started by the predictor alone.

It reads frames from its standard input: first what it is to write (JSON), then answered rows and orders to store them. How far it has
come it writes into the counters that it shares with the predictor, and there is no other answer. It ends when its input does, that
is when the predictor closes the pipe or is gone, and stores what came before; signals meant for the predictor it ignores.
"""

import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_losses import DRAIN_SECONDS, counters_of, remove_leftovers, say
from mlops_dagster.serving.log_rows import OPEN, ROWS, answer_times, frames, unpacked
from mlops_dagster.serving.log_table import EventTable
from mlops_dagster.serving.segments import SegmentWriter

ROWS_TOGETHER = 4096  # made into Arrow arrays at once
BYTES_TOGETHER = 16 << 20  # or so many bytes of the pipe: as Python's objects they take several times that
STORED_TOGETHER = 65_536  # rows; what a writer that is killed was at is begun again, so it must not be all
RETRY_SECONDS = 0.25
MERGE_RETRY_SECONDS = 60.0


class Writer:
    """Rows as they come, in tables that wait until they are stored."""

    def __init__(
        self,
        root: str,
        counters: str,
        signature: str,
        model: str,
        version: str,
        arm: str,
        zone: str,
        stem: str,
        generation: int,
        is_gone: Callable[[], bool] = lambda: False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_gone` says whether the predictor is: from then on all must be stored within `DRAIN_SECONDS`."""
        self._counters = counters_of(Path(counters))
        self._table = EventTable(Signature.from_json(signature), model, version, arm)
        remove_leftovers(Path(root), model, stem)  # of the writer before, which is gone
        self._segments = SegmentWriter(Path(root), model, f"{stem}-{generation}-", ZoneInfo(zone), progressed=self._progressed)
        self._is_gone, self._monotonic = is_gone, monotonic
        self._deadline: float | None = None
        self._merge_from = monotonic()
        self._bytes = 0
        self._events: list[tuple[Any, ...]] = []
        self._through = self._arranged = self._counters.stored_through
        self._waiting: deque[tuple[int, pa.Table]] = deque()
        self._counters.writer = os.getpid()

    def take(self, through: int, content: bytes) -> None:
        """Rows up to the number `through`."""
        self._events += unpacked(content)
        self._through = through
        self._bytes += len(content)
        if through - self._arranged >= ROWS_TOGETHER or self._bytes >= BYTES_TOGETHER:
            self._arrange()
        self._progressed()

    def store(self, order: int) -> None:
        """Store all that came, or find that the disk refuses, or that the predictor has been gone for too long."""
        self._arrange()
        while self._waiting and self._store_some():
            pass
        self._counters.attempted = max(order, self._counters.attempted)
        if self._monotonic() < self._merge_from:
            return
        try:
            self._segments.merge(self._ends)
        except (OSError, pa.ArrowException) as error:
            self._merge_from = self._monotonic() + MERGE_RETRY_SECONDS
            say(f"small segments of the inference log stay unmerged for {MERGE_RETRY_SECONDS:g} s: {error}")

    def end(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Store the rest, for the predictor sends no more: at once, or within `DRAIN_SECONDS` where the disk refuses."""
        if self._deadline is None:
            self._deadline = self._monotonic() + DRAIN_SECONDS
        self.store(self._counters.attempted)
        while self._waiting and not self._is_late():
            sleep(RETRY_SECONDS)
            self.store(self._counters.attempted)

    def _store_some(self) -> bool:
        """Store the oldest tables that wait; whether to go on."""
        counters = self._counters
        count = self._together()
        try:
            if not self._segments.write(pa.concat_tables([t for _, t in list(self._waiting)[:count]]), self._is_late):
                return False
        except (OSError, pa.ArrowException) as error:
            self._refused(error)
            return False
        counters.stored_through = self._waiting[count - 1][0]
        for _ in range(count):
            self._waiting.popleft()
        if counters.failing:
            counters.failing = 0
            say("the inference log can be written again")
        return True

    def _together(self) -> int:
        """How many tables make a batch; after a refusal, no more than what shows whether the disk takes rows again."""
        count, rows = 1, self._waiting[0][1].num_rows
        for _, table in list(self._waiting)[1:]:
            rows += table.num_rows
            if self._counters.failing or rows > STORED_TOGETHER:
                break
            count += 1
        return count

    def _ends(self) -> bool:
        """Whether the predictor sends no more; the time to store the rest begins when that is first seen."""
        if self._deadline is None and self._is_gone():
            self._deadline = self._monotonic() + DRAIN_SECONDS
        return self._deadline is not None

    def _is_late(self) -> bool:
        return self._ends() and self._monotonic() > (self._deadline or 0.0)

    def _progressed(self) -> None:
        self._counters.progress += 1

    def _arrange(self) -> None:
        """The events so far as a table, and no table that the predictor has given up as a whole."""
        if self._events:
            events, self._events, self._bytes = self._events, [], 0
            self._waiting.append((self._through, self._tabled(events)))
            self._arranged = self._through
        while self._waiting and self._waiting[0][0] <= self._counters.given_up_through:
            self._waiting.popleft()

    def _tabled(self, events: list[tuple[Any, ...]]) -> pa.Table:
        try:
            return self._table.table(self._table.chunks(events, answer_times([e[4] for e in events])))
        except Exception as error:
            if len(events) > 1:  # one of them is to blame: the others are kept
                return pa.concat_tables([self._tabled([e]) for e in events])
            self._counters.unusable += events[0][5]
            say(f"{events[0][5]} rows are missing in the inference log: {type(error).__name__}: {error}")
            return self._table.empty()

    def _refused(self, error: Exception) -> None:
        if not self._counters.failing:
            self._counters.failing = 1
            say(f"the inference log cannot be written: {error}. Rows wait in memory; free or fix the disk")


def _is_closed(number: int) -> bool:
    """Whether nobody can write into the pipe `number` any more, though it may still hold something."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def main() -> int:
    """Store what comes on standard input until it ends; returns 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the predictor, which the same signal stops, still has rows to send
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    writer = None
    for kind, number, content in frames(sys.stdin.fileno(), time.sleep):
        if kind == OPEN:
            arguments: dict[str, Any] = json.loads(content)
            try:
                writer = Writer(**arguments, is_gone=partial(_is_closed, sys.stdin.fileno()))
            except FileNotFoundError:
                return 0  # the predictor is gone, and its loss was noticed
        elif writer and kind == ROWS:
            writer.take(number, content)
        elif writer:
            writer.store(number)
    if writer:
        with suppress(OSError, AttributeError):  # not every system has it, nor lets everybody
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        writer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
