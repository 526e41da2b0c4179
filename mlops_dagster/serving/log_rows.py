"""Answered requests on their way from the predictor to the log's writer."""

import marshal
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

# A frame: its kind, a number and the length of its content, and the content.
HEAD = struct.Struct("=cQQ")
OPEN = b"o"  # JSON: the arguments of `log_writer.Writer`
ROWS = b"r"  # events; the number is that of the last of their rows, counted since the predictor began
STORE = b"s"  # store all rows before this order; the number is that of the order
READ_BYTES = 1 << 20
GATHER_SECONDS = 0.02
EPOCH, MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
MARSHAL_VERSION = 2  # later ones look every string up among those written before, which takes longer than to write it again


class Event(NamedTuple):
    """One answered request; the answer's path makes a plain tuple of the same order, which costs a tenth.

    A request of one row that came as V1 has that row (a tuple) in `values` and single values in `row_ids` and `moments`; any other has
    columns in signature order and lists. `times_ns` are perf_counter times: arrived, body read, row checked, scored, answered.
    """

    request_id: str
    protocol: str
    shadow: bool
    wall_ns: int
    times_ns: tuple[int, int, int, int, int]
    count: int
    row_ids: Any
    moments: Any
    values: Any
    labels: list[Any]
    probabilities: list[list[float]] | None


def packed(events: Iterable[tuple[Any, ...]]) -> bytes:
    """Events (tuples in the order of `Event`) as bytes for `unpacked`; raises ValueError where a value is no plain one.

    In marshal's form, which is by far the quickest and which the same interpreter reads again: it goes through a pipe to a child that
    runs from the same executable, and nowhere else. Times become microseconds since 1970 in UTC, arrays their type and bytes.
    """
    plain = [e if e[7] is None and type(e[8]) is tuple else _plain(e) for e in events]
    return marshal.dumps(plain, MARSHAL_VERSION)


def unpacked(content: bytes) -> list[tuple[Any, ...]]:
    """The events of `packed`, as tuples: `moments` are microseconds since 1970 in UTC, columns are arrays or lists."""
    return [e if type(e[8]) is tuple else (*e[:8], [_column(c) for c in e[8]], *e[9:]) for e in marshal.loads(content)]


def frame(kind: bytes, number: int, content: bytes = b"") -> bytes:
    """A frame as bytes."""
    return HEAD.pack(kind, number, len(content)) + content


def frames(number: int, sleep: Callable[[float], None]) -> Iterator[tuple[bytes, int, bytes]]:
    """Kind, number and content of each frame that comes through the pipe `number`, until it ends.

    Half a frame at the end is of a predictor that was killed. Between reads it sleeps: a reader that always waits is woken by every
    frame, at the sender's cost.
    """
    held = bytearray()
    while piece := os.read(number, READ_BYTES):
        held += piece
        at = 0
        while len(held) >= at + HEAD.size:
            kind, count, length = HEAD.unpack_from(held, at)
            begin = at + HEAD.size
            if len(held) < begin + length:
                break
            at = begin + length
            yield kind, count, bytes(held[begin:at])
        del held[:at]
        if len(piece) < READ_BYTES // 2:
            sleep(GATHER_SECONDS)


def answer_times(times_ns: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The five times of each event as an array [events, 5]."""
    return np.fromiter(chain.from_iterable(times_ns), np.int64).reshape(-1, 5)


def _plain(event: tuple[Any, ...]) -> tuple[Any, ...]:
    moments, values = event[7], event[8]
    if type(values) is tuple:
        return (*event[:7], _microseconds(moments), values, *event[9:])
    listed = [None if m is None else _microseconds(m) for m in moments] if any(moments) else [None] * event[5]
    return (*event[:7], listed, [_bytes(c) for c in values], *event[9:])


def _microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // MICROSECOND


def _bytes(column: Any) -> Any:
    """A column of numbers as its type and bytes: thousands of values are then copied at once. Strings as a list."""
    if isinstance(column, np.ndarray):
        return column.tolist() if column.dtype.hasobject else (column.dtype.str, column.tobytes())
    return list(column)


def _column(found: Any) -> Any:
    return np.frombuffer(found[1], found[0]) if type(found) is tuple else found
