"""From a table to the cells of its columns and their counts."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mlops_dagster.core.errors import DataError
from mlops_dagster.core.profile_arrow import Source, blocks, column_of, first_rows, kind_of, names_of, source_of, thinned
from mlops_dagster.core.profile_columns import NUMBER_KINDS, CategoryColumn, Column, NumberColumn
from mlops_dagster.core.profile_counting import Tally, count_all, in_threads, workers
from mlops_dagster.core.profile_numbers import sample_of
from mlops_dagster.core.profile_values import GREATEST, enclosing

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_ROWS = 1_048_576
"""Up to so many rows the quantiles are exact; beyond, the share below an edge is off by about 0.05 % (one standard error)."""

SAMPLE_VALUES = 16_777_216
"""Values held at most (128 MiB) of a table that is not in memory."""

CELLS_PER_BIN = 10
KNOWN_CATEGORIES = 1_000
MOST_SLICES = 1_000


@dataclass(frozen=True)
class Plan:
    """Which columns to profile, and how to divide them."""

    bins: int = 10
    columns: Collection[str] | None = None
    edges: Mapping[str, Sequence[float]] = ()  # type: ignore[assignment]
    categorical: frozenset[str] = frozenset()
    top_categories: int = 20
    cells_every: int = 1

    def __post_init__(self) -> None:
        for field, least in (("bins", 2), ("top_categories", 1), ("cells_every", 1)):
            if getattr(self, field) < least:
                raise DataError(f"{field} is {getattr(self, field)}; it must be at least {least}.")
        for name, given in dict(self.edges).items():
            if not len(given) or not np.isfinite(given).all() or not (np.diff(given) > 0).all():
                raise DataError(
                    f"The edges of column {name!r} are {list(given)}; they must be finite, ascending and at least one."
                )


def profile(table: Any, plan: Plan, like: Mapping[str, Column] | None, threads: int | None) -> tuple[int, dict[str, Column]]:
    """The rows and the counted columns of `table`."""
    source = source_of(table)
    with workers(threads) as pool:
        if like is not None:
            batches, tally = source.open(), Tally(_wanted(like, plan), {}, plan.cells_every)
        else:
            sample, batches = _sampled(source, plan)
            tally = learned(sample, plan, pool)
        count_all(blocks(batches, source.held, len(tally)), tally, pool)
    return tally.rows, tally.columns()


def _wanted(like: Mapping[str, Column], plan: Plan) -> dict[str, Column]:
    for name in plan.columns or ():
        if name not in like:
            raise DataError(f"Column {name!r} is not in the reference profile, which has {', '.join(like)}.")
    return {name: like[name] for name in (like if plan.columns is None else plan.columns)}


def _sampled(source: Source, plan: Plan) -> tuple[list["pa.RecordBatch"], Iterator["pa.RecordBatch"]]:
    """Batches to learn the cells from, and all batches to count."""
    if source.held:
        return list(source.open()), source.open()
    if source.sample:
        return list(source.sample(SAMPLE_VALUES)), source.open()
    batches = source.open()
    head = first_rows(batches, 1)
    if not head:
        return [], iter(())
    width = max(1, len(plan.columns) if plan.columns is not None else head[0].num_columns)
    rows = max(1, min(SAMPLE_ROWS, SAMPLE_VALUES // width))
    if source.again:
        return thinned(chain(head, batches), rows // 2), source.open()
    head += first_rows(batches, rows - head[0].num_rows)
    return head, chain(head, batches)


def learned(sample: list["pa.RecordBatch"], plan: Plan, pool: Executor) -> Tally:
    """An empty tally with the cells that fit the sample (taken as the whole table, where that is held)."""
    if not sample:
        raise DataError(
            "The table has no record batch, so its columns are not known. Give at least an empty one, or a reference in `like`."
        )
    schema = sample[0].schema
    names = names_of(schema, plan.columns)
    _check_named(plan, names)
    kinds = {name: "category" if name in plan.categorical else kind_of(name, schema.field(name).type) for name in names}
    rows = sum(batch.num_rows for batch in sample)
    step = max(1, math.ceil(rows / SAMPLE_ROWS))

    def layout(name: str) -> Column:
        if kinds[name] not in NUMBER_KINDS:
            return CategoryColumn(kinds[name], (), plan.top_categories, ())
        ordered = sample_of([column_of(batch, name, kinds[name]) for batch in sample], step)
        return number_layout(kinds[name], ordered, plan.bins, dict(plan.edges).get(name))

    layouts = dict(zip(names, in_threads(pool, layout, names, rows * len(names)), strict=True))
    limits = {name: KNOWN_CATEGORIES for name in names if kinds[name] in ("text", "boolean", "category")}
    return Tally(layouts, limits, plan.cells_every)


def _check_named(plan: Plan, names: Sequence[str]) -> None:
    for option, given in (("edges", plan.edges), ("categorical", plan.categorical)):
        for name in given:
            if name not in names:
                raise DataError(f"`{option}` names the column {name!r}, which is not profiled; profiled are {', '.join(names)}.")


def number_layout(kind: str, ordered: np.ndarray, bins: int, given: Sequence[float] | None) -> NumberColumn:
    """Empty cells for a column with these values (float64, ascending, finite)."""
    values = _distinct(ordered, 2 * bins)
    fine = _around(ordered, values) if values is not None else _fine(ordered, bins * CELLS_PER_BIN)
    own = fine if values is not None else _quantiles(ordered, np.arange(1, bins) / bins)
    cuts = own if given is None else np.asarray(given, np.float64)
    edges = np.union1d(cuts, fine)
    places = np.searchsorted(edges, cuts)
    return NumberColumn.empty(kind, edges.tolist(), places.tolist())


def _distinct(ordered: np.ndarray, most: int) -> np.ndarray | None:
    """The different values, or None when there are more than `most`."""
    new = ordered[1:] != ordered[:-1]
    if np.count_nonzero(new) >= most:
        return None
    return ordered[np.concatenate(([True], new))] if len(ordered) else ordered


def _around(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Edges that give each of the values a bin of its own; of no values, those between the two infinities and all numbers."""
    return _edges(*enclosing(ordered, values)) if len(values) else np.array([-GREATEST, GREATEST])


def _edges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Both together; none is infinite (after the greatest float comes only infinity)."""
    return np.union1d(begins, ends[ends <= GREATEST])


def _quantiles(ordered: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The order statistics at `levels`; one that stands on several levels is enclosed, so that the repeated value has a
    bin of its own.
    """
    found = ordered[np.minimum((levels * len(ordered)).astype(np.int64), len(ordered) - 1)]
    edges, times = np.unique(found, return_counts=True)
    begins, ends = enclosing(ordered, edges)
    return _edges(begins, ends[times > 1])


def _fine(ordered: np.ndarray, cells: int) -> np.ndarray:
    """Edges of `cells` equal shares, the two outermost halved until one row remains, and one on either side of all values.

    The last two keep apart what lies beyond the values seen here.
    """
    halvings = max(0, int(math.log2(max(1, len(ordered) / cells))))
    tail = 0.5 ** np.arange(1, halvings + 1) / cells
    inner = _quantiles(ordered, np.concatenate((np.arange(1, cells) / cells, tail, 1 - tail)))
    begins, ends = enclosing(ordered, ordered[[0, -1]])
    return np.union1d(inner, _edges(begins[:1], ends[1:]))


def profile_slices(
    table: Any, by: str, layouts: Mapping[str, Column], threads: int | None
) -> dict[str, tuple[int, dict[str, Column]]]:
    """Rows and counted columns for each value of `by`, in the order of the values, all in the given cells."""
    tallies: dict[str, Tally] = {}
    with workers(threads) as pool:
        for batch in source_of(table).open():
            for value, part in _parted(batch, by):
                if value not in tallies and len(tallies) == MOST_SLICES:
                    raise DataError(
                        f"Column {by!r} has more than {MOST_SLICES} values; slices are for few. Slice by a coarser column."
                    )
                count_all([[part]], tallies.setdefault(value, Tally(layouts, {})), pool)
    return {value: (tallies[value].rows, tallies[value].columns()) for value in sorted(tallies)}


def _parted(batch: "pa.RecordBatch", by: str) -> Iterator[tuple[str, "pa.RecordBatch"]]:
    import pyarrow as pa

    names_of(batch.schema, [by])
    codes = batch.column(by).cast(pa.large_string()).fill_null("null").dictionary_encode()
    places = codes.indices.to_numpy()
    order = np.argsort(places, kind="stable")
    bounds = np.searchsorted(places[order], np.arange(len(codes.dictionary) + 1))
    for value, start, end in zip(codes.dictionary.to_pylist(), bounds, bounds[1:], strict=False):
        yield value, batch.take(order[start:end])
