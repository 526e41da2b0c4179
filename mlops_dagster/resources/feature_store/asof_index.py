"""For each entity row, the source row that was valid at its time: sorted integers and binary search, no table is joined.

An ASOF join needs only keys and times. So keys become dense integers, key and time together one int64, one sort orders the source and one
binary search finds every match; the feature columns are then gathered by row number, whatever their type and however many they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlops_dagster.core.errors import DataError
from mlops_dagster.resources.feature_store.asof_time import LEAST, MOST, as_numpy
from mlops_dagster.resources.feature_store.asof_types import comparable

NO_ROW = -1
NO_KEY = -1
WIDEST_PRODUCT = 2**62
MOST_CODES = 2**31
STEPS = (10**3, 10**6, 10**9)


@dataclass(frozen=True)
class Codes:
    """Join keys as integers 0 … size - 1, equal exactly where all keys are equal; -1 where one of them is null (null never joins)."""

    entity: np.ndarray
    source: np.ndarray
    size: int


def key_codes(
    entity: list[pa.ChunkedArray],
    source: list[pa.ChunkedArray],
    names: list[str],
    rows: tuple[int, int],
    null_is_a_key: bool = False,
) -> Codes:
    """Codes of all key columns together; `rows` are the numbers of entity and source rows. Without keys every row has the code 0."""
    codes = None
    for left, right, name in zip(entity, source, names, strict=True):
        column = column_codes(*same_type(left, right, name))
        column = with_null_key(column) if null_is_a_key else column
        codes = product(codes, column) if codes else column
    if codes is None:
        return Codes(np.zeros(rows[0], np.int64), np.zeros(rows[1], np.int64), 1)
    return dense(codes) if codes.size > MOST_CODES else codes


def same_type(left: pa.ChunkedArray, right: pa.ChunkedArray, name: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Both columns in one type that holds the values of either; numbers join numbers, text joins text. Raises `DataError` otherwise."""
    left, right = plain(left), plain(right)
    families = {family(left.type), family(right.type)} - {"null"}
    for kind in (right.type, left.type, pa.int64(), pa.float64()) if len(families) < 2 else ():
        try:
            return left.cast(kind), right.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    raise DataError(
        f"Join key {name!r} is of type {left.type} in the entity rows but {right.type} in the source. Give both the same type."
    )


def family(kind: pa.DataType) -> str:
    """Types whose values may be equal are of one family."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_temporal(kind):
        return "time"
    return "text" if is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else str(kind)


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """In the type in which keys are compared (a pandas category or string dtype joins as its values)."""
    kind = comparable(values.type)
    return values if values.type == kind else values.cast(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def column_codes(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Codes:
    if pa.types.is_integer(left.type) and left.type != pa.uint64() and not left.null_count and not right.null_count:
        offsets = integer_offsets(as_numpy(left).astype(np.int64, copy=False), as_numpy(right).astype(np.int64, copy=False))
        if offsets:
            return offsets
    both = equal_zeros(pa.chunked_array([*left.chunks, *right.chunks], left.type)).combine_chunks()
    encoded = both.dictionary_encode()
    indices = encoded.indices.fill_null(NO_KEY).to_numpy(zero_copy_only=False).astype(np.int64)
    return Codes(indices[: len(left)], indices[len(left) :], max(len(encoded.dictionary), 1))


def equal_zeros(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats with -0.0 as 0.0, for both are one key, as they are in SQL."""
    if not pa.types.is_floating(values.type):
        return values
    return pc.add(values.cast(pa.float64()), 0.0)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)


def with_null_key(codes: Codes) -> Codes:
    entity, source = (np.where(c < 0, codes.size, c) for c in (codes.entity, codes.source))
    return Codes(entity, source, codes.size + 1)


def integer_offsets(left: np.ndarray, right: np.ndarray) -> Codes | None:
    """Integers of a narrow range are their own codes; None where the range is wide."""
    ends = [int(f(v)) for v in (left, right) if len(v) for f in (np.min, np.max)]
    if not ends:
        return Codes(left, right, 1)
    low, size = min(ends), max(ends) - min(ends) + 1
    return Codes(left - low, right - low, size) if size <= 2**24 + 4 * (len(left) + len(right)) else None


def product(a: Codes, b: Codes) -> Codes:
    if a.size * b.size > WIDEST_PRODUCT:
        a = dense(a)
    return Codes(joined(a.entity, b.entity, b.size), joined(a.source, b.source, b.size), a.size * b.size)


def joined(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    return np.where((a < 0) | (b < 0), NO_KEY, a * size + b)


def dense(codes: Codes) -> Codes:
    """The same codes without gaps."""
    values, indices = np.unique(np.concatenate([codes.entity, codes.source]), return_inverse=True)
    indices = indices - (1 if len(values) and values[0] == NO_KEY else 0)
    return Codes(indices[: len(codes.entity)], indices[len(codes.entity) :], max(len(values), 1))


@dataclass(frozen=True)
class SourceRows:
    """Keys and times of the source's rows, all times in one unit; `created` None where the source has no such column.

    `never_known` marks the rows whose created timestamp is null: they break ties last, and were never known at any time. `read_created` gives
    the created times where they serve for ties only, and so are not worth reading before there is one.
    """

    codes: np.ndarray
    times: np.ndarray
    created: np.ndarray | None = None
    never_known: np.ndarray | None = None
    read_created: Callable[[], np.ndarray] | None = None

    def created_for_ties(self) -> np.ndarray | None:
        return self.created if self.read_created is None else self.read_created()


def latest_rows(entity_codes: np.ndarray, entity_times: np.ndarray, size: int, source: SourceRows, as_known: bool) -> np.ndarray:
    """Per entity row the number of the source row with the same key and the latest time not after its own; `NO_ROW` where none is.

    Ties in time go to the later created timestamp, then to the later row. With `as_known`, rows created after the entity's time do not count.
    """
    rows = Sorted.of(source, size)
    found = rows.last_at(entity_codes, entity_times, rows.combined, rows.clock)
    if as_known and source.created is not None and len(rows.order):
        late = np.flatnonzero((found != NO_ROW) & rows.unknown_at(found, entity_times))
        if len(late):
            found[late] = rows.last_known_at(entity_codes[late], entity_times[late])
    return rows.row_numbers(found)


@dataclass(frozen=True)
class Clock:
    """Maps times to 1 … `span` - 1 in the same order, so that key and time fit one int64: steps since `first` where they fit, else ranks.

    0 is before every source row's time.
    """

    first: int
    last: int
    step: int
    span: int
    ranks: np.ndarray | None = None

    @staticmethod
    def of(values: np.ndarray, size: int) -> "Clock":
        first, last = int(values.min()), int(values.max())
        if size * (last - first + 2) < WIDEST_PRODUCT:
            return Clock(first, last, 1, last - first + 2)
        for step in STEPS:
            if (
                size * ((last - first) // step + 2) < WIDEST_PRODUCT
                and last - first < MOST
                and not ((values - first) % step).any()
            ):
                return Clock(first, last, step, (last - first) // step + 2)
        ranks = np.unique(values)
        return Clock(first, last, 1, len(ranks) + 1, ranks)

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        if self.ranks is not None:
            return np.searchsorted(self.ranks, values) + 1
        return values - (self.first - 1) if self.step == 1 else (values - self.first) // self.step + 1

    def of_entities(self, values: np.ndarray) -> np.ndarray:
        if self.ranks is not None:
            return np.searchsorted(self.ranks, values, side="right")
        offsets = np.clip(values, self.first - 1, self.last)
        offsets -= self.first
        if self.step != 1:
            offsets //= self.step
        offsets += 1
        return offsets


@dataclass(frozen=True)
class Sorted:
    """The source's rows by key, time, created and row number: `order` are row numbers, `combined` key and time of them as one integer."""

    source: SourceRows
    size: int
    order: np.ndarray
    combined: np.ndarray
    clock: Clock

    @staticmethod
    def of(source: SourceRows, size: int) -> "Sorted":
        kept = np.flatnonzero(source.codes >= 0) if (source.codes < 0).any() else None
        codes, values = (source.codes, source.times) if kept is None else (source.codes[kept], source.times[kept])
        if not len(codes):
            empty = np.empty(0, np.int64)
            return Sorted(source, size, empty, empty, Clock(0, 0, 1, 2))
        clock = Clock.of(values, size)
        combined = codes * clock.span
        combined += clock.of_rows(values)
        order, combined = ordered(combined)
        order = order if kept is None else kept[order]
        break_ties(order, combined, source)
        return Sorted(source, size, order, combined, clock)

    def last_at(self, codes: np.ndarray, moments: np.ndarray, combined: np.ndarray, clock: Clock) -> np.ndarray:
        """Positions in `combined` of the last row of each key not after its moment."""
        if not len(combined):
            return np.full(len(codes), NO_ROW, np.int64)
        return search(combined, combined_at(codes, moments, clock), codes, clock.span)

    def unknown_at(self, found: np.ndarray, moments: np.ndarray) -> np.ndarray:
        rows, created = self.order[found], self.source.created
        assert created is not None
        late = created[rows] > moments
        return late if self.source.never_known is None else late | self.source.never_known[rows]

    def last_known_at(self, codes: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """As `last_at`, among the rows that were created by then.

        A row is known from max(time, created) on. In the order of that, the running maximum of positions in time order is, at each moment,
        the latest row known; it starts anew with each key because positions of a later key are all greater.
        """
        source, positions = self.source, np.arange(len(self.order))
        assert source.created is not None
        if source.never_known is not None:
            positions = np.flatnonzero(~source.never_known[self.order])
        rows = self.order[positions]
        if not len(rows):
            return np.full(len(codes), NO_ROW, np.int64)
        known = np.maximum(source.times[rows], source.created[rows])
        clock = Clock.of(known, self.size)
        order, combined = ordered(source.codes[rows] * clock.span + clock.of_rows(known))
        newest = np.maximum.accumulate(positions[order])
        found = self.last_at(codes, moments, combined, clock)
        return np.where(found == NO_ROW, NO_ROW, newest[found])

    def last_of_each_key(self) -> np.ndarray:
        """Row numbers of the latest row of every key."""
        codes = self.source.codes[self.order]
        last = np.ones(len(codes), bool)
        last[:-1] = codes[1:] != codes[:-1]
        return self.order[last]

    def row_numbers(self, found: np.ndarray) -> np.ndarray:
        if not len(self.order):
            return found
        rows = self.order.take(found, mode="clip")
        rows[found == NO_ROW] = NO_ROW
        return rows


def ordered(combined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers in ascending order of `combined`, and it sorted; rows already in order cost one pass."""
    if (combined[1:] >= combined[:-1]).all():
        return np.arange(len(combined)), combined
    order = np.argsort(combined)
    return order, combined[order]


def break_ties(order: np.ndarray, combined: np.ndarray, source: SourceRows) -> None:
    """Reorders, in place, the rows of equal key and time by created timestamp, then by row number."""
    same = combined[1:] == combined[:-1]
    if not same.any():
        return
    tied = np.zeros(len(order), bool)
    tied[1:] |= same
    tied[:-1] |= same
    slots = np.flatnonzero(tied)
    rows, created = order[slots], source.created_for_ties()
    keys = (rows, combined[slots]) if created is None else (rows, created[rows], combined[slots])
    order[slots] = rows[np.lexsort(keys)]


def combined_at(codes: np.ndarray, moments: np.ndarray, clock: Clock) -> np.ndarray:
    """Key and moment of each entity row as one integer, to be compared with those of source rows."""
    combined = codes * clock.span
    combined += clock.of_entities(moments)
    return combined


def search(combined: np.ndarray, wanted: np.ndarray, codes: np.ndarray, span: int) -> np.ndarray:
    """Positions in `combined` of the last value that is not after `wanted` and of the same key (of `codes`); `NO_ROW` where there is none.

    All is asked in ascending order, so that neighbours share cache lines. What is done with is freed at once: this is where most is held.
    """
    order, ascending = ordered(wanted)
    del wanted
    position = np.searchsorted(combined, ascending, side="right")
    del ascending
    position -= 1
    first = codes[order]
    first *= span
    position[combined.take(position, mode="clip") < first] = NO_ROW  # clipped: -1 stays -1
    found = np.empty_like(position)
    found[order] = position
    return found


def not_older_than(rows: np.ndarray, source_times: np.ndarray, entity_times: np.ndarray, age: int) -> np.ndarray:
    """`rows` with `NO_ROW` where the row's time is before the entity's time less `age` (Feast's TTL; exactly that old still counts)."""
    if not len(source_times) or not len(rows):
        return rows
    oldest = np.maximum(entity_times, LEAST + age)
    oldest -= age
    return np.where(source_times.take(rows, mode="clip") >= oldest, rows, NO_ROW)
