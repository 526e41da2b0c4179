"""Anything that speaks Arrow, as record batches, and their columns as numpy arrays without copies."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mlops_dagster.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 262_144
"""Rows of a block of a table that is in memory."""

INDEX_LEVEL = re.compile(r"__index_level_\d+__")
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True)
class Source:
    """Batches that can be opened, once (`again` false) or as often as wanted.

    `held`: all of them are in memory anyway. `sample`: opens batches that stand for the whole, where that is cheaper
    than reading the whole.
    """

    open: Callable[[], Iterator["pa.RecordBatch"]]
    again: bool = True
    held: bool = False
    sample: Callable[[int], Iterable["pa.RecordBatch"]] | None = None


def source_of(table: Any) -> Source:
    """How to read `table`: an object with the Arrow C stream or array interface, an iterable of such batches, or a
    function that opens one.

    Raises DataError for anything else.
    """
    import pyarrow as pa

    if isinstance(table, Source):
        return table
    if isinstance(table, pa.RecordBatch):
        return _held([table])
    if callable(getattr(table, "__arrow_c_stream__", None)):
        return _stream(table)
    if callable(table):
        opening: Any = table
        return Source(lambda: _batches(opening()), again=True, held=False)
    if isinstance(table, list | tuple):
        return _held([batch for item in table for batch in _opened(item)])
    if isinstance(table, Iterable) and not isinstance(table, str | bytes | dict):
        return Source(lambda: _batches(table), again=False, held=False)
    raise DataError(_not_arrow(table))


def _stream(table: Any) -> Source:
    """Frames are held; a DuckDB relation can be run again; any other stream is taken to be gone once it was read."""
    library = type(table).__module__.split(".")[0]
    if library in ("pyarrow", "pandas", "polars") and not hasattr(table, "read_next_batch"):
        return _held(list(_opened(table)))
    return Source(lambda: _opened(table), again=type(table).__name__ == "DuckDBPyRelation", held=False)


def _held(batches: list["pa.RecordBatch"]) -> Source:
    return Source(lambda: iter(batches), again=True, held=True)


def _batches(items: Iterable[Any]) -> Iterator["pa.RecordBatch"]:
    return (batch for item in items for batch in _opened(item))


def _opened(item: Any) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    if isinstance(item, pa.RecordBatch):
        return iter((item,))
    if callable(getattr(item, "__arrow_c_stream__", None)):
        return _read(pa.RecordBatchReader.from_stream(item))
    if callable(getattr(item, "__arrow_c_array__", None)):
        return iter((pa.record_batch(item),))
    raise DataError(_not_arrow(item))


def _read(reader: "pa.RecordBatchReader") -> Iterator["pa.RecordBatch"]:
    """All batches; an empty one, for its schema, when there is none."""
    import pyarrow as pa

    batch = None
    for batch in reader:
        yield batch
    if batch is None:
        yield pa.RecordBatch.from_pylist([], reader.schema)


def _not_arrow(value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return (
        f"The table is a {kind}, which has no Arrow C stream. Give a pyarrow Table, a Polars or pandas (>= 2.2) DataFrame, "
        f"a DuckDB relation, or an iterable of record batches (of a Polars LazyFrame: .collect())."
    )


STREAM_VALUES = 8_388_608
"""Values in a block of a table that is not in memory: 64 MiB of float64, unless that were too few rows to be quick."""

FEWEST_ROWS = 16_384


def blocks(batches: Iterable["pa.RecordBatch"], held: bool, columns: int) -> Iterator[list["pa.RecordBatch"]]:
    """The batches in lists of so many rows as are counted as one piece of work, in order; larger batches are cut without a
    copy.
    """
    most = BLOCK_ROWS if held else max(FEWEST_ROWS, min(BLOCK_ROWS, STREAM_VALUES // max(1, columns)))
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        for start in range(0, batch.num_rows, most):
            piece = batch.slice(start, most)
            if pending and rows + piece.num_rows > most:
                yield pending
                pending, rows = [], 0
            pending.append(piece)
            rows += piece.num_rows
    if pending:
        yield pending


def thinned(batches: Iterable["pa.RecordBatch"], rows: int) -> list["pa.RecordBatch"]:
    """A systematic sample of a stream of unknown length: every 2^k-th row, where k is the least that leaves at most 2 x
    `rows`.
    """
    kept: list[pa.RecordBatch] = []
    size, step, seen = 0, 1, 0
    for batch in batches:
        first = -seen % step
        seen += batch.num_rows
        kept.append(every(batch, first, step))
        size += kept[-1].num_rows
        while size > 2 * rows:
            kept, size, step = _halved(kept), (size + 1) // 2, step * 2
    return kept


def _halved(batches: list["pa.RecordBatch"]) -> list["pa.RecordBatch"]:
    kept, seen = [], 0
    for batch in batches:
        kept.append(every(batch, seen % 2, 2))
        seen += batch.num_rows
    return kept


def every(batch: "pa.RecordBatch", first: int, step: int) -> "pa.RecordBatch":
    """Rows first, first + step ... of the batch (the batch itself when that is all of them)."""
    return batch if step == 1 and first == 0 else batch.take(np.arange(first, batch.num_rows, step))


def first_rows(batches: Iterator["pa.RecordBatch"], rows: int) -> list["pa.RecordBatch"]:
    """Takes whole batches from the iterator until they have `rows` rows or there are no more."""
    taken: list[pa.RecordBatch] = []
    size = 0
    while size < rows and (head := list(islice(batches, 1))):
        taken += head
        size += head[0].num_rows
    return taken


def first_names(source: Source) -> tuple[str, ...]:
    """The columns of a source's first batch that can be profiled; none when it has no batch."""
    for batch in source.open():
        return names_of(batch.schema, None)
    return ()


def names_of(schema: "pa.Schema", wanted: Collection[str] | None) -> tuple[str, ...]:
    """The columns to profile: those wanted (each must be there, once), or all except a pandas index.

    Raises DataError naming the column that is not there or is there twice.
    """
    names = [n for n in schema.names if not INDEX_LEVEL.fullmatch(n)] if wanted is None else list(wanted)
    for name in names:
        found = len(schema.get_all_field_indices(name))
        if found == 0:
            raise DataError(f"Column {name!r} is not in the table, which has {', '.join(schema.names)}. Add it, or leave it out.")
        if found > 1:
            raise DataError(f"Column {name!r} is in the table {found} times. Rename or drop one of them.")
    return tuple(names)


def kind_of(name: str, type_: "pa.DataType") -> str:
    """One of number, time, duration, boolean, text, category, null; DataError for a type that cannot be profiled."""
    import pyarrow.types as t

    if t.is_dictionary(type_):
        return "text" if kind_of(name, type_.value_type) == "text" else "category"
    tests = {
        "null": (t.is_null,),
        "boolean": (t.is_boolean,),
        "number": (t.is_integer, t.is_floating, t.is_decimal),
        "time": (t.is_timestamp, t.is_date),
        "duration": (t.is_duration, t.is_time),
        "text": (t.is_string, t.is_large_string, t.is_string_view),
    }
    for kind, checks in tests.items():
        if any(check(type_) for check in checks):
            return kind
    raise DataError(
        f"Column {name!r} has the type {type_}, which cannot be profiled. Cast it to a number or text, "
        f"or name the other columns in `columns`."
    )


def column_of(batch: "pa.RecordBatch", name: str, kind: str) -> "pa.Array":
    """The column, which must be there once and of the kind; DataError otherwise. An all-null column passes for any kind."""
    names_of(batch.schema, (name,))
    array = batch.column(name)
    found = kind_of(name, array.type)
    if found in (kind, "null") or kind in ("null", "category"):
        return array
    raise DataError(
        f"Column {name!r} is of kind {found} ({array.type}) here but of kind {kind} in the reference or in earlier rows. "
        f"Cast it, or compute a new reference profile."
    )


@dataclass(frozen=True)
class Numbers:
    """An Arrow array as numpy: values as they lie in memory, `valid` where some are null, and the factor to microseconds."""

    values: np.ndarray
    valid: np.ndarray | None
    factor: int

    def part(self, room: np.ndarray, start: int) -> np.ndarray:
        """Up to len(room) values from `start` on as float64, null as NaN: as they lie in memory where that will do, else
        in `room`. Read only.
        """
        size = min(len(room), len(self.values) - start)
        if self.valid is None and self.factor == 1 and self.values.dtype == np.float64:
            return self.values[start : start + size]
        self.into(room[:size], start)
        return room[:size]

    def into(self, out: np.ndarray, start: int, step: int = 1) -> None:
        """Fills `out` (float64) with values start, start + step ...; a null becomes NaN."""
        part = slice(start, start + step * (len(out) - 1) + 1, step)
        np.copyto(out, self.values[part], casting="unsafe")
        if self.factor != 1:
            out *= self.factor
        if self.valid is not None:
            np.copyto(out, np.nan, where=~self.valid[part])


def numbers(array: "pa.Array") -> Numbers:
    """The numpy view of a numeric, temporal or all-null Arrow array; int64 beyond 2^53 are rounded to float64 later."""
    import pyarrow as pa
    import pyarrow.types as t

    type_, size = array.type, len(array)
    if t.is_null(type_):
        return Numbers(np.full(size, np.nan), None, 1)
    if t.is_decimal(type_):
        array = array.cast(pa.float64())
        type_ = array.type
    bits, data = array.buffers()
    dtype = (
        np.dtype(type_.to_pandas_dtype()) if t.is_integer(type_) or t.is_floating(type_) else np.dtype(f"i{type_.bit_width // 8}")
    )
    values = np.frombuffer(data, dtype, size, array.offset * dtype.itemsize) if data is not None else np.zeros(size, dtype)
    valid = None if bits is None or array.null_count == 0 else _unpacked(bits, array.offset, size)
    factor = (
        86_400_000_000
        if t.is_date32(type_)
        else 1_000
        if t.is_date64(type_)
        else MICROSECONDS.get(getattr(type_, "unit", "us"), 0)
    )
    # Nanoseconds divide as integers: as float64 they would already have lost what is below a quarter of a microsecond.
    return Numbers(values, valid, factor) if factor else Numbers(values // 1_000, valid, 1)


def _unpacked(bits: "pa.Buffer", offset: int, size: int) -> np.ndarray:
    packed = np.frombuffer(bits, np.uint8)[offset // 8 : (offset + size + 7) // 8]
    return np.unpackbits(packed, bitorder="little")[offset % 8 : offset % 8 + size].view(bool)
