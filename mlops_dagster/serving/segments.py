"""The inference log on disk: `<root>/<model>/day=<YYYY-MM-DD>/<version>-<pid>-<sequence>.parquet`.

A segment appears under its name only when it is whole. The day is that of the event time in the model's time zone. A row may
occur twice (a request sent again, a compaction that was interrupted): readers see it once.
"""

import datetime as dt
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlops_dagster.core.errors import StorageError
from mlops_dagster.serving.artifact import Signature
from mlops_dagster.serving.log_losses import TEMPORARY

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
    quarters, inverse = np.unique(moments_us // QUARTER_US, return_inverse=True)
    names = np.array([dt.datetime.fromtimestamp(int(q) * 900, zone).strftime("%Y-%m-%d") for q in quarters])
    by_row = names[inverse]
    return [(str(day), np.flatnonzero(by_row == day)) for day in sorted(set(names.tolist()))]


class SegmentWriter:
    """Writes whole segments, and merges `fan_in` small ones into a larger one, so that a day does not end as 100,000 files."""

    def __init__(self, root: Path, model: str, stem: str, zone: ZoneInfo, fan_in: int = 64) -> None:
        self._folder = root / model
        self._stem = stem
        self._zone = zone
        self._fan_in = fan_in
        self._sequence = itertools.count(1)
        self._levels: dict[tuple[str, int], list[Path]] = {}

    def write(self, table: pa.Table) -> None:
        """Store all rows of `table`, a segment for each day; raises OSError or ArrowException when the disk refuses.

        After an error nothing of it is there, so that trying again and again does not fill the disk with one of two days.
        """
        moments = table["event_timestamp"].cast(pa.int64()).to_numpy()
        stored: list[tuple[str, Path]] = []
        try:
            for day, rows in local_days(moments, self._zone):
                part = table if len(rows) == table.num_rows else table.take(pa.array(rows))
                stored.append((day, self._put(day, part)))
        except BaseException:
            for _, path in stored:
                path.unlink(missing_ok=True)
            raise
        for day, path in stored:
            self._levels.setdefault((day, 0), []).append(path)

    def merge(self) -> None:
        """Merge segments that have become many; raises OSError or ArrowException, and then all segments are still there."""
        for day, level in list(self._levels):
            while len(self._levels[day, level]) >= self._fan_in:
                small = [p for p in self._levels[day, level] if p.exists()]
                if sum(pq.read_metadata(p).num_rows for p in small) <= LARGE:
                    self._merge(day, level + 1, small)
                self._levels[day, level] = []
                level += 1
                self._levels.setdefault((day, level), [])

    def _merge(self, day: str, level: int, small: list[Path]) -> None:
        if small:
            self._levels.setdefault((day, level), []).append(self._put(day, pa.concat_tables(map(_read, small))))
        for path in small:
            path.unlink(missing_ok=True)

    def _put(self, day: str, table: pa.Table) -> Path:
        folder = self._folder / f"day={day}"
        name = f"{self._stem}{next(self._sequence):06d}.parquet"
        temporary = folder / f"{TEMPORARY}{name}"
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
            os.replace(temporary, folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return folder / name


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
