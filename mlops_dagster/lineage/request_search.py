"""Finding a request among all that were logged: in the lake's days by their indexes, then in what the servers have written since."""

import datetime as dt
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlops_dagster.core.errors import DataError, MlopsError
from mlops_dagster.lineage import request_index
from mlops_dagster.lineage.places import Places, ReadableLake
from mlops_dagster.lineage.request_index import COLUMNS, Index
from mlops_dagster.resources.data_lake.stamps import folder_stamps

if TYPE_CHECKING:
    from mlops_dagster.resources.data_lake import Lake

LOG, INDEX = "inference_log", "request_index"
SCANNED_ROWS = 65_536  # a segment below this is read whole in a few milliseconds; a larger one gets an index beside it
ATTEMPTS = 20
CLOCKS_APART = 2.0  # seconds that a file system's times may lie behind the clock of who collects
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
TICKS_A_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class Found:
    """A row of the log: where it lies (`file`: a lake key or a segment's path) and what it holds."""

    model: str
    day: str
    file: str
    row: dict[str, Any]


def find(places: Places, model: str, request_id: str) -> list[Found]:
    """Every row that was logged under a request id, each once, empty where there is none. A request's rows may lie in both places: a
    server writes some of them while the others are collected."""
    found, collected = [], {}
    for key, index in indexes(places, model):
        collected[_day(key)] = index.summary.collected_at
        rows = rows_at(_source(places.lake, key), index.rows(request_id), request_id)
        found += [Found(model, _day(key), key, row) for row in rows]
    return _once(found + _in_segments(places, model, request_id, collected))


def indexes(places: Places, model: str) -> Iterator[tuple[str, Index]]:
    """Each collected day's log with its index, oldest first; one that is missing, broken or of an earlier file is made again."""
    made = places.lake.stamps(f"{model}/{INDEX}/")
    for key, stamp in sorted(places.lake.stamps(f"{model}/{LOG}/").items()):
        if key.endswith(".parquet"):
            beside = index_key(model, _day(key))
            yield key, (_known(places.lake, beside, stamp) if beside in made else None) or _made(places, key, stamp)


def index_key(model: str, day: str) -> str:
    """Where the index of a collected day lies in the lake."""
    return f"{model}/{INDEX}/{day}.index"


def store_index(lake: "Lake", model: str, day: str, rows: pa.Table, collected_at: dt.datetime) -> None:
    """Store the index of a day's log that was just written, so that nobody has to wait for it later. `collected_at`: a moment before the
    segments were read; what was written to them since is looked for there."""
    key = f"{model}/{LOG}/{day}.parquet"
    content = request_index.build(rows.select(list(COLUMNS)), lake.stamps(key)[key], collected_at)
    lake.write_bytes(index_key(model, day), content)


def _known(lake: ReadableLake, key: str, stamp: str) -> Index | None:
    place = lake.locate(key)
    try:
        index = request_index.opened(lake.read_bytes(key) if "://" in place else Path(place))
    except (MlopsError, OSError):
        return None
    return index if index.summary.stamp == stamp else None


def _made(places: Places, key: str, stamp: str) -> Index:
    """Make a day's index and keep it if the lake can be written to."""
    model = key.split("/")[0]
    content = request_index.build(_columns(_source(places.lake, key)), stamp)
    with suppress(MlopsError):  # a lake that is full or read-only can still be traced in, at the cost of a longer look
        places.writable().write_bytes(index_key(model, _day(key)), content)
    return request_index.opened(content)


def _columns(source: Any) -> pa.Table:
    with pq.ParquetFile(source) as file:
        return file.read(list(COLUMNS))


def _day(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def _source(lake: ReadableLake, key: str) -> Any:
    place = lake.locate(key)
    return pa.BufferReader(lake.read_bytes(key)) if "://" in place else place


def rows_at(source: Any, numbers: list[int], request_id: str) -> list[dict[str, Any]]:
    """Those of the numbered rows of a Parquet file that have the request id; only their row groups are read."""
    if not numbers:
        return []
    rows = []
    with pq.ParquetFile(source) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            inside = [n - first for n in numbers if first <= n < end]
            first = end
            if inside:
                table = file.read_row_group(group)
                rows += [_row(table, n) for n in inside]
    return [row for row in rows if row["request_id"] == request_id]


def _row(table: pa.Table, number: int) -> dict[str, Any]:
    """One row as plain values. Arrow's own conversion of a timestamp imports pandas, which takes a tenth of a second."""
    row: dict[str, Any] = {}
    for name in table.column_names:
        value = next(chunk for chunk in table[name].slice(number, 1).chunks if len(chunk))
        if pa.types.is_timestamp(value.type) and value.null_count == 0:
            ticks = value.view(pa.int64())[0].as_py()
            row[name] = EPOCH + dt.timedelta(microseconds=ticks * 1_000_000 // TICKS_A_SECOND[value.type.unit])
        else:
            row[name] = value[0].as_py()
    return row


def _in_segments(places: Places, model: str, request_id: str, collected: Mapping[str, str | None]) -> list[Found]:
    """The rows of a request in the servers' segments of days that may have been written to since they were `collected`."""
    found: list[Found] = []
    for folder in sorted((places.segments / model).glob("day=*"), reverse=True):
        day = folder.name.removeprefix("day=")
        at = collected.get(day)
        if at is None or folder.stat().st_mtime > dt.datetime.fromisoformat(at).timestamp() - CLOCKS_APART:
            found += [Found(model, day, name, row) for name, row in _in_day(folder, request_id)]
    return found


def _once(found: list[Found]) -> list[Found]:
    """A row that lies in the lake and a segment, or in a small segment and the merged one, once: where it was found first."""
    return list({(f.day, f.row["row_id"], f.row["version"], f.row["shadow"]): f for f in reversed(found)}.values())[::-1]


def _in_day(folder: Path, request_id: str) -> list[tuple[str, dict[str, Any]]]:
    for _ in range(ATTEMPTS):
        try:
            stamps = folder_stamps(folder, "")
            return [
                (str(folder / n), row)
                for n in stamps
                if n.endswith(".parquet")
                for row in _in_segment(folder / n, stamps[n], request_id)
            ]
        except FileNotFoundError:
            continue  # merged into a larger segment since it was listed
        except pa.ArrowException as error:
            raise DataError(f"a segment in {folder} cannot be read ({error}); move the broken file away and try again") from error
    return []


def _in_segment(path: Path, stamp: str, request_id: str) -> list[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        ids = file.read(["request_id"])["request_id"] if file.metadata.num_rows < SCANNED_ROWS else None
    if ids is not None:
        same = request_index.hashed(ids) == request_index.hash_of(request_id)
        return rows_at(path, [int(n) for n in same.nonzero()[0]], request_id)
    return rows_at(path, _segment_index(path, stamp).rows(request_id), request_id)


def _segment_index(path: Path, stamp: str) -> Index:
    """The index of a large segment, kept in a hidden folder beside it where that can be written to."""
    beside = path.parent / f".{INDEX}" / f"{path.name}.index"
    try:
        index = request_index.opened(beside)
        if index.summary.stamp == stamp:
            return index
    except (OSError, DataError):
        pass
    content = request_index.build(_columns(path), stamp)
    try:
        beside.parent.mkdir(exist_ok=True)
        for old in beside.parent.iterdir():
            if not (path.parent / old.name.removesuffix(".index")).exists():
                old.unlink(missing_ok=True)
        aside = beside.with_name(f"{uuid.uuid4().hex}.new")
        aside.write_bytes(content)
        os.replace(aside, beside)
    except OSError:
        pass
    return request_index.opened(content)
