"""Envoy's unit log: one JSON line for each request whose sticky key chose the arm, newest last, in a file and the one before."""

import datetime as dt
import json
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from mlops_dagster.core.errors import StorageError

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
    1970, `arm` as routed, `status` as answered); raises StorageError when the log cannot be read.
    """
    begin, end = after.timestamp(), until.timestamp()
    found = []
    for part in (path.with_suffix(".1.jsonl"), path):
        with suppress(FileNotFoundError):
            found += _rows(_lines_since(part, begin - LATE_SECONDS), model, begin, end)
    return pa.Table.from_pylist(sorted(found, key=lambda row: row["at"]), SCHEMA)


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


def _lines_since(path: Path, moment: float) -> BytesIO:
    """The part of the file that begins at or before its first line of `moment`, found by bisection."""
    try:
        with path.open("rb") as file:
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
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"the gateway's unit log cannot be read ({error.strerror}). Check the disk.") from error


def _moment_after(file: BinaryIO, place: int) -> float:
    """When the request of the first whole line after `place` began; of a damaged line, long ago."""
    file.seek(place)
    file.readline()
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(file.readline())["at"])
    return 0.0
