"""Envoy's unit log: one JSON line for each request whose sticky key chose the arm, newest last, in a file and the one before."""

import datetime as dt
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from mlops_dagster.core.errors import StorageError
from mlops_dagster.resources.live_metrics.unit_log import before, dropped

SCHEMA = pa.schema(
    [
        pa.field("at", pa.float64()),
        pa.field("request_id", pa.string()),
        pa.field("key", pa.string()),
        pa.field("arm", pa.string()),
        pa.field("status", pa.int64()),
    ]
)
LATE_SECONDS = 90.0  # a line is written when its request ends, so lines are in order only up to the longest request
LEAST_BYTES = 1 << 16


def read_units(path: Path, model: str, after: dt.datetime, until: dt.datetime) -> pa.Table:
    """The requests that began after `after` and not after `until`, in order, in the columns of SCHEMA (`at` in seconds since
    1970, `arm` as routed, `status` as answered).

    Raises StorageError when the log cannot be read, or when lines written after `after` are gone: a test that lacks keys is none.
    """
    begin, end = after.timestamp(), until.timestamp()
    found = []
    with _storage_errors(), ExitStack() as stack:
        files = _opened(path, stack)
        _check_whole(path, begin)  # after they were opened: what is removed from now on is still read
        for file in files:
            found += _rows(_lines_since(file, begin - LATE_SECONDS), model, begin, end)
    return pa.Table.from_pylist(sorted(found, key=lambda row: row["at"]), SCHEMA)


def _opened(path: Path, stack: ExitStack) -> list[BinaryIO]:
    """Both files. The newest is opened first: when it is put aside in between, it is found twice (and taken once), never missed."""
    files: dict[int, BinaryIO] = {}
    for part in (path, before(path)):
        with suppress(FileNotFoundError):
            file = stack.enter_context(part.open("rb"))
            files.setdefault(os.fstat(file.fileno()).st_ino, file)
    return list(files.values())


def _check_whole(path: Path, begin: float) -> None:
    with suppress(FileNotFoundError):
        if (until := float(dropped(path).read_text())) > begin:
            raise StorageError(
                f"the gateway's unit log was needed from {_told(begin)} on, but what was written until {_told(until)} is gone: "
                "it grew faster than it was read. Abort the rollout and start another, with the rollout sensor running."
            )


def _told(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="seconds")


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise StorageError(f"the gateway's unit log cannot be read ({error}). Check the disk.") from error


def _rows(lines: BytesIO, model: str, begin: float, end: float) -> list[dict[str, object]]:
    rows = []
    for line in lines:
        if not line.endswith(b"\n"):
            break  # not whole yet
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line cut short by a full disk
            said = json.loads(line)
            at = float(said["at"])
            if said["model"] == model and begin < at <= end:
                arm = said["arm"].removeprefix(f"{model}/").partition("|")[0]
                rows.append({"at": at, "arm": arm, **{name: said[name] for name in ("request_id", "key", "status")}})
    return rows


def _lines_since(file: BinaryIO, moment: float) -> BytesIO:
    """The part of the file that begins at or before its first line of `moment`, found by bisection."""
    low, high = 0, os.fstat(file.fileno()).st_size
    while high - low > LEAST_BYTES:
        middle = (low + high) // 2
        if _moment_after(file, middle) < moment:
            low = middle
        else:
            high = middle
    file.seek(low)
    if low:
        file.readline()
    return BytesIO(file.read())


def _moment_after(file: BinaryIO, place: int) -> float:
    """When the request of the first whole line after `place` began; of a damaged line, long ago."""
    file.seek(place)
    file.readline()
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(file.readline())["at"])
    return 0.0
