"""The predictor's side of the log's writer: rows go to it through a pipe, and are kept until it says that they are stored.

Arrow and Parquet would take the interpreter from answers that are due; in a process of their own, to which the kernel gives only what
nobody else wants (SCHED_IDLE, sched(7)), they take nothing. A process that gets only that may get nothing for long, and cannot know
it; so the predictor, which sees that an order is not carried out, raises the writer until it has caught up.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlops_dagster.serving.log_losses import OwnCounters, say
from mlops_dagster.serving.log_rows import OPEN, ROWS, STORE, frame

MAXIMUM_WAITING = 500_000
MAXIMUM_WAITING_BYTES = 256 << 20  # of frames, for a row may be as large as a request
# Memory of its own: no threads' stacks, no huge pages for Arrow's allocator, and what that frees goes back at once (93 MB instead of 111).
SMALL = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MIMALLOC_ALLOW_THP": "0", "MIMALLOC_PURGE_DELAY": "0"}
PIPE_BYTES = 1 << 20  # what Linux lets anybody have
LATE_SECONDS = 0.5  # an order that waits for so long shows that the writer gets too little time
STUCK_SECONDS = 60.0  # and one that waits for so long, without any progress, that it will not get on at all
CALM_SECONDS = 2.0  # so long must it be in time again before it is lowered
REPLACED_CALM_SECONDS, LONGEST_CALM_SECONDS = 60.0, 3600.0
SETTLED_SECONDS, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 0.5, 30.0


class WriterProcess:
    """Starts the writer, starts it again when it ends, and sends it rows and orders.

    No method blocks, but for `end`. Not safe for several threads: the caller has a lock.
    """

    def __init__(
        self, counters: OwnCounters, arguments: Mapping[str, Any], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = counters
        self._arguments = arguments
        self._monotonic = monotonic
        self._priority = _Priority()
        self._through = self._kept_bytes = 0
        self._kept: deque[tuple[int, int, bytes]] = deque()  # number of the last row, rows, frame
        self._outgoing: deque[tuple[int, bytes | memoryview]] = (
            deque()
        )  # number of the last row (or 0), what is left of the frame
        self._orders: deque[tuple[int, float]] = deque()  # those not carried out, and when they were given
        self._last_order = 0
        self._progress, self._progress_at = 0, 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._generation = self._early_ends = 0
        self._started_at = self._next_start = 0.0
        self._giving_up = False

    @property
    def backlog(self) -> bool:
        """Whether the pipe did not take all that is to be sent."""
        return bool(self._outgoing)

    @property
    def behind(self) -> bool:
        """Whether an order is not carried out yet."""
        return bool(self._orders)

    @property
    def runs(self) -> bool:
        return self._child is not None

    def send(self, rows: int, content: bytes) -> None:
        """Hand over `rows` rows (packed events)."""
        self._through += rows
        made = frame(ROWS, self._through, content)
        self._kept.append((self._through, rows, made))
        self._kept_bytes += len(made)
        self._put(self._through, made)

    def give_up(self, rows: int) -> None:
        """Count rows that cannot be sent."""
        self._through += rows
        self._counters.given_up += rows

    def order(self) -> int:
        """Have all that was sent stored; returns a number that `counters.attempted` reaches when that was done, or the disk refused."""
        self._forget_stored()
        if self._kept:
            self._last_order += 1
            self._orders.append((self._last_order, self._monotonic()))
            self._put(0, frame(STORE, self._last_order))
        return self._last_order

    def look(self) -> None:
        """Do what is due: start the writer, send what the pipe had no room for, see to its priority, bound what waits."""
        now = self._monotonic()
        self._forget_stored()
        if self._child is not None and self._child.poll() is not None:
            self._ended(self._child.returncode, now)
        if self._child is None and now >= self._next_start:
            self._start(now)
        self._push()
        self._bound()
        if self._child is not None:
            waits = now - self._orders[0][1] if self._orders else 0.0
            ready = self._counters.writer == self._child.pid
            if not self._priority.settle(self._child.pid, ready, waits, now) or min(waits, self._halted(now)) > STUCK_SECONDS:
                self._replace(now)

    def _halted(self, now: float) -> float:
        """For how many seconds the writer has made no step."""
        if (progress := self._counters.progress) != self._progress:
            self._progress, self._progress_at = progress, now
        return now - self._progress_at

    def end(self, timeout_seconds: float) -> None:
        """Close the pipe, so that the writer stores the rest and ends; waits for that."""
        child, self._child = self._child, None
        if child is not None:
            _close(child)
            try:
                child.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                say(f"the log's writer did not end within {timeout_seconds:g} s and is killed")
                child.kill()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(1)

    def _put(self, through: int, made: bytes) -> None:
        if self._child is not None:
            self._outgoing.append((through, made))
            if len(self._outgoing) == 1:  # else the pipe is full, and `look` sends on
                self._push()

    def _push(self) -> None:
        if self._child is None or self._child.stdin is None:
            return
        number = self._child.stdin.fileno()
        while self._outgoing:
            through, left = self._outgoing[0]
            try:
                written = os.write(number, left)
            except OSError:
                return  # full; or the writer ended, which `look` finds
            if written < len(left):
                self._outgoing[0] = (through, memoryview(left)[written:])
                return
            self._outgoing.popleft()

    def _forget_stored(self) -> None:
        stored, attempted = self._counters.stored_through, self._counters.attempted
        while self._kept and self._kept[0][0] <= stored:
            self._kept_bytes -= len(self._kept.popleft()[2])
        while self._orders and self._orders[0][0] <= attempted:
            self._orders.popleft()

    def _bound(self) -> None:
        """Give up the oldest rows when too many, or too large ones, wait."""
        given_up = 0
        while self._kept and self._waits_more_than(1):
            through, rows, made = self._kept.popleft()
            self._kept_bytes -= len(made)
            self._counters.given_up += rows
            self._counters.given_up_through = through
            given_up += rows
        if given_up:
            limit = self._counters.given_up_through
            begun = [self._outgoing.popleft()] if self._outgoing else []  # it may be half sent
            self._outgoing = deque([*begun, *(o for o in self._outgoing if o[0] == 0 or o[0] > limit)])
            if not self._giving_up:
                say(
                    f"more than {MAXIMUM_WAITING:,} rows or {MAXIMUM_WAITING_BYTES >> 20} MiB wait to be stored in the inference log: "
                    "the oldest are given up"
                )
        self._giving_up = given_up > 0 or (self._giving_up and self._waits_more_than(0.5))

    def _waits_more_than(self, share: float) -> bool:
        """Whether what waits takes more than this share of what may wait."""
        rows = self._through - self._counters.handled_through
        return rows > share * MAXIMUM_WAITING or self._kept_bytes > share * MAXIMUM_WAITING_BYTES

    def _start(self, now: float) -> None:
        self._generation += 1
        self._started_at = now
        try:
            # In the predictor's own session: in another one the kernel may weigh it against the predictor whatever its policy.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "mlops_dagster.serving.log_writer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, **SMALL},
                pass_fds=(self._counters.writer_lock.fileno(),),
            )
        except OSError as error:
            self._ended(str(error), now)
            return
        assert self._child.stdin
        os.set_blocking(self._child.stdin.fileno(), False)
        with suppress(OSError, AttributeError):
            fcntl.fcntl(self._child.stdin.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        opening = json.dumps({**self._arguments, "generation": self._generation}).encode()
        self._outgoing = deque([(0, frame(OPEN, 0, opening)), *((through, made) for through, _, made in self._kept)])
        if self._orders:
            self._outgoing.append((0, frame(STORE, self._last_order)))
            self._orders = deque((number, now) for number, _ in self._orders)
        self._priority.started()

    def _ended(self, how: object, now: float) -> None:
        """It ended by itself, or never began: nothing is lost, for what it had not stored is kept here."""
        if self._child is not None:
            _close(self._child)
        self._child = None
        self._outgoing.clear()
        early = now - self._started_at < SETTLED_SECONDS
        self._early_ends = self._early_ends + 1 if early else 0
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (self._early_ends - 1)) if early else 0.0
        self._next_start = now + pause
        say(f"the writer of the inference log ended ({how}); it is started again in {pause:g} s and gets its rows again")

    def _replace(self, now: float) -> None:
        assert self._child is not None
        self._child.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk does not end; it gets no more rows
            self._child.wait(0.1)
        _close(self._child)
        self._child = None
        self._outgoing.clear()
        self._start(now)


class _Priority:
    """Whether the writer gets only what nobody else wants."""

    def __init__(self) -> None:
        self._lowered = False
        self._possible = hasattr(os, "SCHED_IDLE")
        self._calm_from = 0.0
        self._calm_seconds = CALM_SECONDS

    def started(self) -> None:
        self._lowered = False

    def settle(self, pid: int, ready: bool, waits_seconds: float, now: float) -> bool:
        """Lower or raise the writer; False where it must be replaced by one that was never lowered, for none but root may raise it."""
        if not self._possible:
            return True
        late = waits_seconds > LATE_SECONDS
        if late:
            self._calm_from = now + self._calm_seconds
        if late and self._lowered:
            self._lowered = False
            if not _schedule(pid, os.SCHED_OTHER):
                self._calm_seconds = min(LONGEST_CALM_SECONDS, max(REPLACED_CALM_SECONDS, 2 * self._calm_seconds))
                self._calm_from = now + self._calm_seconds
                return False
        elif ready and not self._lowered and now >= self._calm_from:
            self._possible = self._lowered = _schedule(pid, os.SCHED_IDLE)
        return True


def _schedule(pid: int, policy: int) -> bool:
    """Whether all threads of the process follow `policy` now."""
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
    except ProcessLookupError:
        return True  # it ended: `look` finds it
    except OSError:
        return False
    return True


def _close(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdin
    with suppress(OSError):
        child.stdin.close()
