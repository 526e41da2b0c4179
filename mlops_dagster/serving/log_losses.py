"""How far the inference log has come, in numbers that survive any of its processes, and what those that were killed left behind.

The numbers lie in a mapped file that the predictor locks; its writer has a lock of its own. A free first lock says that the predictor
is gone, a free second one that what it had handed over is stored.
"""

import fcntl
import json
import mmap
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

FOLDER = ".counters"
LOSSES = "losses.jsonl"
TEMPORARY = ".tmp-"
NUMBERS = 9
SIZE = 8 * NUMBERS
DRAIN_SECONDS = 3.0  # so long does a writer whose predictor is gone try to store the rest
PATIENCE_SECONDS = DRAIN_SECONDS + 3  # so long does the next predictor wait for it


@dataclass(frozen=True)
class Loss:
    """What a process that was killed may have answered without logging: at most `possibly_lost` of its `accepted` rows."""

    process: str
    accepted: int
    written: int
    possibly_lost: int
    noticed_at: str


class _Number:
    """A place in the file. It is written whole (a store of eight aligned bytes), so no reader sees a half."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __get__(self, counters: "Counters", owner: type) -> int:
        return counters.numbers[self._place]

    def __set__(self, counters: "Counters", value: int) -> None:
        counters.numbers[self._place] = value


class Counters:
    """Rows, counted in the order of their answers. Each number has one process that writes it, so none is ever wrong by a race.

    Where two of them go apart, because of a kill between them or because rows were given up while they were being stored, losses are said
    too high, never too low.
    """

    accepted = _Number(0)  # answered (predictor)
    stored_through = _Number(1)  # all rows up to this one are stored, or were told not to be (writer)
    given_up_through = _Number(2)  # rows up to this one need not be stored any more (predictor)
    given_up = _Number(3)  # so many of them there were (predictor)
    unusable = _Number(4)  # rows that could not be brought into the form of the log (writer)
    attempted = _Number(5)  # number of the last order to store that was carried out, or refused by the disk (writer)
    failing = _Number(6)  # 1 while the disk refuses (writer)
    writer = _Number(7)  # id of the writer that is ready (writer)
    progress = _Number(8)  # steps that the writer made: while it changes, the writer is not stuck (writer)

    def __init__(self, file: IO[bytes]) -> None:
        self.numbers = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("Q")

    @property
    def handled_through(self) -> int:
        return max(self.stored_through, self.given_up_through)

    @property
    def dropped(self) -> int:
        return self.given_up + self.unusable

    @property
    def written(self) -> int:
        return max(0, self.handled_through - self.dropped)


class OwnCounters(Counters):
    """The counters of this process, with both locks."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # The writer inherits this lock when it is started: it is free only when both are gone.
        self.writer_lock = open(path.with_suffix(".writer"), "wb")  # noqa: SIM115 - open as long as the process: it holds the lock
        fcntl.flock(self.writer_lock, fcntl.LOCK_EX)
        fresh = path.with_suffix(".new")  # it gets its name only when locked, so that no other process takes it for a dead one's
        self._file = open(fresh, "w+b")  # noqa: SIM115 - the same
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(bytes(SIZE))
        self._file.flush()
        fresh.rename(path)
        super().__init__(self._file)

    def remove(self) -> None:
        """Forget this process: all its rows are stored."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".writer").unlink(missing_ok=True)


def counters_of(path: Path) -> Counters:
    """The counters that a predictor keeps in `path`, for its writer; raises OSError when they are gone."""
    with open(path, "r+b") as file:
        return Counters(file)


def notice_losses(root: Path, model: str, now: datetime, sleep: Callable[[float], None] = time.sleep) -> list[Loss]:
    """Read, record in `losses.jsonl` and remove the counters of processes of `model` that are gone; their half-written segments too.

    Waits up to `PATIENCE_SECONDS` for a writer that still stores what its predictor had handed over.
    """
    losses = []
    for path in sorted((root / model / FOLDER).glob("*.rows")):
        with suppress(FileNotFoundError), open(path, "r+b") as file:  # another process may have noticed it first
            if not _is_free(file) or not path.exists():
                continue
            drained = _wait_for_writer(path.with_suffix(".writer"), sleep)
            file.truncate(SIZE)
            loss = _loss(path.stem, Counters(file), now)
            if loss.possibly_lost:
                _record(root / model / LOSSES, loss)
                losses.append(loss)
            if drained:
                remove_leftovers(root, model, path.stem)
            path.unlink(missing_ok=True)
            path.with_suffix(".writer").unlink(missing_ok=True)
    return losses


def _loss(process: str, counters: Counters, now: datetime) -> Loss:
    return Loss(process, counters.accepted, counters.written, max(0, counters.accepted - counters.written), now.isoformat())


def _record(path: Path, loss: Loss) -> None:
    """A line more, also after half a line that a full disk left."""
    with open(path, "ab+") as file:
        if end := file.tell():
            file.seek(end - 1)
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(asdict(loss)).encode() + b"\n")


def read_losses(root: Path | str, model: str) -> list[Loss]:
    """All losses noticed so far, oldest first; a line that cannot be read is said and left out."""
    path = Path(root) / model / LOSSES
    losses = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            losses.append(Loss(**json.loads(line)))
        except (ValueError, TypeError) as error:
            say(f"line {number} of {path} is no loss and is left out (a full disk may have cut it off): {error}")
    return losses


def remove_leftovers(root: Path, model: str, stem: str) -> None:
    """Delete half-written segments of a process that is gone."""
    for path in (root / model).glob(f"day=*/{TEMPORARY}{stem}*"):
        path.unlink(missing_ok=True)


def say(message: str) -> None:
    """A line on stderr; nobody may be there to read it."""
    with suppress(OSError):
        print(f"mlops predictor: {message}", file=sys.stderr, flush=True)


def _is_free(file: IO[bytes]) -> bool:
    """Whether nobody held the lock of `file`; this process does from now on, until it closes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait_for_writer(path: Path, sleep: Callable[[float], None], step_seconds: float = 0.02) -> bool:
    """Whether the writer that holds the lock of `path` ended in time."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        for _ in range(round(PATIENCE_SECONDS / step_seconds)):
            if _is_free(file):
                return True
            sleep(step_seconds)
        return False
    return True
