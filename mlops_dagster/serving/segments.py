"""The inference log on disk: `<root>/<model>/day=<YYYY-MM-DD>/<version>-<pid>-<sequence>.parquet`.

A segment appears under its name only when it is whole. The day is that of the event time in the model's time zone. A row may
occur twice (a request sent again, a compaction that was interrupted): readers see it once.
"""

import datetime as dt
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlops_dagster.core.errors import StorageError
from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_losses import TEMPORARY, say

TIME = pa.timestamp("us", tz="UTC")
ARROW: dict[str, pa.DataType] = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_()}
QUARTER_US = 15 * 60 * 1_000_000
# A repeated request keeps its id; another version, or the mirrored copy, answers the same id with a row of its own.
ROW_KEY = ("request_id", "row_id", "version", "shadow")
READ_ATTEMPTS = 20
# Dictionaries and statistics for all columns double the time that a segment of a few thousand rows takes to write.
REPETITIVE = ["model", "version", "arm", "prediction_label"]
WITH_STATISTICS = ["logged_at", "event_timestamp"]
LARGE = 1_000_000  # rows in a segment that is not merged any more: whoever merges keeps new rows waiting
LARGE_BYTES = 512 << 20  # and its bytes, as they are in memory
T = TypeVar("T")


def schema(signature: Signature | None = None) -> pa.Schema:
    """Columns of the log; `features` is a struct of the signature's features (left out without a signature)."""
    fields = [
        pa.field("request_id", pa.string()),
        pa.field("row_id", pa.string()),
        pa.field("logged_at", TIME),
        pa.field("event_timestamp", TIME),
        pa.field("model", pa.string()),
        pa.field("version", pa.string()),
        pa.field("arm", pa.string()),
        pa.field("shadow", pa.bool_()),
        pa.field("prediction", pa.float64()),
        pa.field("prediction_label", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("latency_ms", pa.float64()),
    ]
    if signature is not None:
        fields.insert(8, pa.field("features", pa.struct([pa.field(f.name, ARROW[f.dtype]) for f in signature.features])))
    return pa.schema(fields)


def local_days(moments_us: np.ndarray, zone: ZoneInfo) -> list[tuple[str, np.ndarray]]:
    """Row numbers for each local day (YYYY-MM-DD) of `moments_us` (UTC microseconds).

    Zone offsets change, and days begin, only at full quarters of an hour (since 1972), so one look-up for each quarter is enough.
    """
    if not len(moments_us):
        return []
    quarters, quarter_of = np.unique(moments_us // QUARTER_US, return_inverse=True)
    names, day_of = np.unique([str(dt.datetime.fromtimestamp(int(q) * 900, zone).date()) for q in quarters], return_inverse=True)
    by_row = day_of[quarter_of]
    order = np.argsort(by_row, kind="stable")
    return list(zip(names.tolist(), np.split(order, np.searchsorted(by_row[order], np.arange(1, len(names)))), strict=True))


def _never() -> bool:
    return False


def _nothing() -> None:
    pass


class SegmentWriter:
    """Writes whole segments, and merges `fan_in` small ones into a larger one, so that a day does not end as 100,000 files.

    `progressed` is called after each segment that was made, named or read: many days take long, and that is not being stuck.
    """

    def __init__(
        self,
        root: Path,
        model: str,
        stem: str,
        zone: ZoneInfo,
        fan_in: int = 64,
        progressed: Callable[[], None] = _nothing,
    ) -> None:
        self._folder = root / model
        self._stem = stem
        self._zone = zone
        self._fan_in = fan_in
        self._progressed = progressed
        self._sequence = itertools.count(1)
        self._levels: dict[tuple[str, int], list[Path]] = {}

    def write(self, table: pa.Table, late: Callable[[], bool] = _never) -> bool:
        """Store all rows of `table`, a segment for each day; raises OSError or ArrowException when the disk refuses.

        After an error nothing of it is there, so that trying again and again does not fill the disk with one of two days. Segments get
        their names when all are made: a process that is killed before leaves only what `remove_leftovers` finds. False when `late` said
        so before all were made; those that were are stored.
        """
        made: list[tuple[str, Path]] = []
        named: list[tuple[str, Path]] = []
        whole = True
        try:
            for day, part in self._by_day(table):
                if late():
                    whole = False
                    break
                made.append((day, self._make(day, part)))
            for day, temporary in made:
                named.append((day, self._name(temporary)))
        except BaseException:
            for _, path in (*made, *named):
                path.unlink(missing_ok=True)
            raise
        for day, path in named:
            self._levels.setdefault((day, 0), []).append(path)
        return whole

    def _by_day(self, table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        found = local_days(table["event_timestamp"].cast(pa.int64()).to_numpy(), self._zone)
        if len(found) > 1:
            table = table.take(pa.array(np.concatenate([rows for _, rows in found])))
        begin = 0
        for day, rows in found:
            yield day, table.slice(begin, len(rows))
            begin += len(rows)

    def merge(self, late: Callable[[], bool] = _never) -> None:
        """Merge segments that have become many, until `late` says so; raises OSError or ArrowException, and then all rows are still there.

        A segment that is damaged is named once and stays as it is: it is not merged.
        """
        for day, level in list(self._levels):
            while len(self._levels[day, level]) >= self._fan_in:
                if late():
                    return
                self._merge(day, level)
                level += 1
                self._levels.setdefault((day, level), [])

    def _merge(self, day: str, level: int) -> None:
        sizes = {p: s for p in self._levels[day, level] if (s := self._sound(_size, p))}
        small = {}
        if sum(rows for rows, _ in sizes.values()) <= LARGE and sum(size for _, size in sizes.values()) <= LARGE_BYTES:
            small = {p: t for p in sizes if (t := self._sound(_read, p)) is not None}
        if small:
            large = self._name(self._make(day, pa.concat_tables(small.values())))
            self._levels.setdefault((day, level + 1), []).append(large)
        self._levels[day, level] = []  # before they go: one that stays is not merged again and again
        for path in small:
            path.unlink(missing_ok=True)

    def _sound(self, read: Callable[[Path], T], path: Path) -> T | None:
        """What `read` gives, None where the segment is gone or damaged; raises OSError where the disk is to blame."""
        try:
            found = read(path)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # Parquet's own complaints have no number
                raise
            say(
                f"a segment of the inference log is damaged and is not merged: {path}: {error}. Move it away: its day cannot be read"
            )
            return None
        self._progressed()
        return found

    def _make(self, day: str, table: pa.Table) -> Path:
        """A whole segment that readers do not see."""
        folder = self._folder / f"day={day}"
        temporary = folder / f"{TEMPORARY}{self._stem}{next(self._sequence):06d}.parquet"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                table,
                temporary,
                compression="zstd",
                compression_level=1,
                use_dictionary=REPETITIVE,  # type: ignore[arg-type]
                write_statistics=WITH_STATISTICS,  # type: ignore[arg-type]
            )
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._progressed()
        return temporary

    def _name(self, temporary: Path) -> Path:
        """Have readers see a segment."""
        path = temporary.with_name(temporary.name.removeprefix(TEMPORARY))
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._progressed()
        return path


def days(root: Path | str, model: str) -> list[dt.date]:
    """The days that have at least one segment, in order."""
    folders = (Path(root) / model).glob("day=*")
    return sorted(dt.date.fromisoformat(f.name[4:]) for f in folders if any(f.glob("[!.]*.parquet")))


def read_segments(root: Path | str, model: str, day: dt.date | str) -> pa.Table:
    """Every logged row of `day` once, in the order of logging; an empty table when nothing was logged.

    Rows are told apart by request id, row id, version and whether they are a mirrored copy. Versions may have different features: the
    struct holds them all, null where a version has none. Raises StorageError when a segment cannot be read.
    """
    folder = Path(root) / model / f"day={day}"
    for _ in range(READ_ATTEMPTS):
        paths = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
        try:
            return _once([_read(p) for p in paths])
        except FileNotFoundError:
            continue  # merged into a larger segment since it was listed
        except pa.ArrowException as error:
            raise StorageError(
                f"Cannot read a segment in {folder}: {error}. Move the broken file away and read again."
            ) from error
    raise StorageError(f"The segments in {folder} changed at each of {READ_ATTEMPTS} attempts to read them; try again.")


def read_logged(root: Path | str, model: str, after: dt.datetime, until: dt.datetime, columns: Sequence[str]) -> pa.Table:
    """The rows logged after `after` and not after `until` (both with a zone), each once, in the order of logging.

    Only segments that can hold such rows are opened; a row is there from 0.25 s after its answer on, or later where the disk was
    busy. Raises StorageError when a segment cannot be read.
    """
    first, last = (pa.scalar(round(moment.timestamp() * 1e6), TIME) for moment in (after, until))
    wanted = (pc.field("logged_at") > first) & (pc.field("logged_at") <= last)
    needed = list(dict.fromkeys([*columns, *ROW_KEY, "logged_at"]))
    folder = Path(root) / model
    for _ in range(READ_ATTEMPTS):
        try:
            return _once(
                [
                    pq.read_table(path, columns=needed, filters=wanted, partitioning=None)  # type: ignore[arg-type]
                    for path in _written_since(folder, after)
                ]
            )
        except FileNotFoundError:
            continue  # merged into a larger segment since it was listed
        except pa.ArrowException as error:
            raise StorageError(f"Cannot read a segment of {model}: {error}. Move the broken file away and read again.") from error
    raise StorageError(f"The segments of {model} changed at each of {READ_ATTEMPTS} attempts to read them; try again.")


def _written_since(folder: Path, moment: dt.datetime) -> list[Path]:
    """Segments of any day (a row lies under the day of its event) that were written after `moment`; a second for coarse clocks."""
    limit = moment.timestamp() - 1
    folders = [day for day in folder.glob("day=*") if day.stat().st_mtime >= limit]
    return sorted(p for day in folders for p in day.glob("[!.]*.parquet") if p.stat().st_mtime >= limit)


def _size(path: Path) -> tuple[int, int]:
    """Rows, and bytes as they are in memory."""
    found = pq.read_metadata(path)
    return found.num_rows, sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))


def _read(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _once(tables: Sequence[pa.Table]) -> pa.Table:
    if not tables:
        return schema().empty_table()
    table = pa.concat_tables(tables, promote_options="permissive").sort_by(
        "logged_at"
    )  # stable: rows of one request keep their order
    keys = table.select(list(ROW_KEY)).append_column("at", pa.array(np.arange(table.num_rows)))
    first = keys.group_by(list(ROW_KEY), use_threads=False).aggregate([("at", "min")])["at_min"]
    if len(first) == table.num_rows:
        return table
    return table.take(pa.array(np.sort(first.to_numpy())))
