"""Counting the columns of Arrow batches into fixed cells, in threads and bounded memory."""

import datetime as dt
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlops_dagster.core.errors import DataError
from mlops_dagster.core.profile_arrow import column_of, kind_of
from mlops_dagster.core.profile_columns import CategoryColumn, Column, NumberColumn
from mlops_dagster.core.profile_numbers import NumberCounts

if TYPE_CHECKING:
    import pyarrow as pa

SMALL = 65_536
"""Below this many values, handing work to a thread costs more than it saves."""


@dataclass(frozen=True)
class CategoriesFound:
    """One block's categories that are known by their position, the others by name while more may become known."""

    known: np.ndarray
    others: tuple[tuple[str, int], ...]
    unlisted: int
    missing: int


@dataclass
class CategoryCounts:
    """What was counted of a text or boolean column so far.

    With `limit` > 0, new categories become known until there are so many.
    """

    layout: CategoryColumn
    limit: int = 0

    def __post_init__(self) -> None:
        self.counts = dict(zip(self.layout.categories, self.layout.emptied().counts, strict=True))
        self.unlisted = self.missing = 0

    def task(self, arrays: list["pa.Array"]) -> CategoriesFound:
        """Counts a block; called in a thread, so it leaves `self` as it is."""
        known = tuple(self.counts)
        growing = len(known) < self.limit
        totals, others, unlisted, missing = np.zeros(len(known), np.int64), {}, 0, 0
        for array in arrays:
            names, counts, nulls = _tallied(array)
            missing += nulls
            moments = kind_of("", _value_type(array)) == "time"
            at = (
                _compute()
                .index_in(names, value_set=_text(map(_instant, known) if moments else known))
                .fill_null(-1)
                .to_numpy(zero_copy_only=False)
            )
            np.add.at(totals, at[at >= 0], counts[at >= 0])
            if not growing:
                unlisted += int(counts[at < 0].sum())
                continue
            rest = at < 0
            for name, count in zip(names.filter(_mask(rest)).to_pylist(), counts[rest].tolist(), strict=True):
                others[name] = others.get(name, 0) + count
        return CategoriesFound(totals, tuple(sorted(others.items(), key=_by_frequency)), unlisted, missing)

    def add(self, found: CategoriesFound) -> None:
        for name, count in zip(list(self.counts), found.known.tolist(), strict=False):
            self.counts[name] += count
        for name, count in found.others:
            if name in self.counts or len(self.counts) < self.limit:
                self.counts[name] = self.counts.get(name, 0) + count
            else:
                self.unlisted += count
        self.unlisted += found.unlisted
        self.missing += found.missing

    def column(self) -> CategoryColumn:
        """In the given order when the categories are fixed, else the most frequent first (equal counts by name)."""
        items = sorted(self.counts.items(), key=_by_frequency) if self.limit else list(self.counts.items())
        names, counts = tuple(name for name, _ in items), tuple(count for _, count in items)
        return CategoryColumn(self.layout.kind, names, self.layout.top, counts, self.unlisted, self.missing)


def _by_frequency(item: tuple[str, int]) -> tuple[int, str]:
    return (-item[1], item[0])


def _text(values: Iterable[str]) -> "pa.Array":
    import pyarrow as pa

    return pa.array(values, pa.large_string())


def _compute() -> Any:
    """pyarrow.compute, whose functions come into being at run time, where no type checker sees them."""
    import pyarrow.compute

    return pyarrow.compute


def _mask(where: np.ndarray) -> "pa.Array":
    import pyarrow as pa

    return pa.array(where)


def _tallied(array: "pa.Array") -> tuple["pa.Array", np.ndarray, int]:
    """The categories of an array as text (each at least once), how often each occurs, and how many nulls there are."""
    import pyarrow.types as t

    array = _plain_text(array)
    if t.is_dictionary(array.type):
        codes = _compute().value_counts(array.indices)
        names = _plain_text(array.dictionary).take(codes.field("values"))
    else:
        codes = _compute().value_counts(array)
        names = codes.field("values")
    counts = codes.field("counts").to_numpy()
    if t.is_floating(names.type):
        names = _compute().if_else(_compute().is_nan(names), None, names)
    present = names.is_valid().to_numpy(zero_copy_only=False)
    return _as_text(names.drop_null()), counts[present], int(counts[~present].sum())


def _value_type(array: "pa.Array") -> "pa.DataType":
    import pyarrow.types as t

    return array.type.value_type if t.is_dictionary(array.type) else array.type


def _as_text(names: "pa.Array") -> "pa.Array":
    """Numbers and texts as they are written; moments as `_instant` writes them."""
    import pyarrow as pa

    if kind_of("", names.type) != "time":
        return names.cast(pa.large_string())
    at = names.cast(pa.timestamp("s" if pa.types.is_date32(names.type) else getattr(names.type, "unit", "ms")))
    text = at.cast(pa.large_string())
    return text if at.type.unit == "s" else _compute().replace_substring_regex(text, pattern=r"\.?0+$", replacement="")


MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)(?: (\d\d:\d\d:\d\d)(?:\.(\d*))?(Z|[+-]\d\d:?\d\d)?)?")


def _instant(text: str) -> str:
    """A moment, written with any unit and zone, in UTC and with no more digits than it needs: earlier profiles have other forms."""
    found = MOMENT.fullmatch(text)
    if not found:
        return text
    day, time, fraction, zone = found.groups()
    moment = dt.datetime.fromisoformat(f"{day} {time or '00:00:00'}{'' if zone in (None, 'Z') else zone}")
    if moment.tzinfo is not None:
        moment = moment.astimezone(dt.UTC).replace(tzinfo=None)
    digits = (fraction or "").rstrip("0")
    return f"{moment}.{digits}" if digits else str(moment)


def _plain_text(array: "pa.Array") -> "pa.Array":
    """Of a string view, pyarrow 25 counts the nulls as empty text and cannot take rows."""
    import pyarrow as pa

    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


Counts = NumberCounts | CategoryCounts


class Tally:
    """Counters for some columns, fed with blocks, read once at the end.

    `limits`: how many categories may become known, for the columns whose categories are not fixed. `every`: see `NumberCounts`.
    """

    def __init__(self, layouts: Mapping[str, Column], limits: Mapping[str, int], every: int = 1) -> None:
        self._counts: dict[str, Counts] = {
            name: NumberCounts(layout, every) if isinstance(layout, NumberColumn) else CategoryCounts(layout, limits.get(name, 0))
            for name, layout in layouts.items()
        }
        self.rows = 0

    def tasks(self, block: list["pa.RecordBatch"]) -> list[tuple[Counts, list["pa.Array"]]]:
        """The work that a block makes; DataError where a column is not there or not of its kind."""
        self.rows += sum(batch.num_rows for batch in block)
        return [
            (counts, [column_of(batch, name, counts.layout.kind) for batch in block]) for name, counts in self._counts.items()
        ]

    def __len__(self) -> int:
        return len(self._counts)

    def columns(self) -> dict[str, Column]:
        return {name: counts.column() for name, counts in self._counts.items()}


@contextmanager
def workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool of `threads` (default: the processors this process may use), gone at the end, also after an error."""
    if threads is not None and threads < 1:
        raise DataError(f"threads is {threads}; it must be at least 1.")
    pool = ThreadPoolExecutor(threads or usable_processors(), "profile")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Work = list[tuple[Counts, list["pa.Array"]]]


def count_all(pieces: Iterable[list["pa.RecordBatch"]], tally: Tally, pool: Executor) -> None:
    """Counts every block into `tally`: one is counted while the next is read, so that no more than three are alive.

    The result does not depend on the number of threads.
    """
    waiting: deque[list[tuple[Work, Future[list[Any]] | list[Any]]]] = deque()
    for block in pieces:
        if len(waiting) == 2:
            _settle(waiting.popleft())
        waiting.append([(work, _begun(pool, work)) for work in _shares(tally.tasks(block))])
    for begun in waiting:
        _settle(begun)


def _shares(tasks: Work) -> Iterator[Work]:
    """The tasks in groups that are worth a thread's while."""
    share: Work = []
    for task in tasks:
        share.append(task)
        if _size(share) >= SMALL:
            yield share
            share = []
    if share:
        yield share


def _size(work: Work) -> int:
    return sum(len(array) for _, arrays in work for array in arrays)


def _begun(pool: Executor, work: Work) -> "Future[list[Any]] | list[Any]":
    return _done(work) if _size(work) < SMALL else pool.submit(_done, work)


def _done(work: Work) -> list[Any]:
    return [counts.task(arrays) for counts, arrays in work]


def _settle(begun: list[tuple[Work, "Future[list[Any]] | list[Any]"]]) -> None:
    for work, found in begun:
        for (counts, _), part in zip(work, found.result() if isinstance(found, Future) else found, strict=True):
            counts.add(part)


def in_threads(pool: Executor, work: Callable[[Any], Any], items: Collection[Any], size: int) -> list[Any]:
    """`work` of each item, in order; at once in this thread when the items are small."""
    return list(map(work, items) if size < SMALL else pool.map(work, items))
