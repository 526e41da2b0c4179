"""Counting a numeric column into fixed cells.

A block is sorted in pieces that fit the processor's second-level cache; each edge is then one binary search. Whatever
the number of cells that costs little more than the sort, which numpy does with vector instructions and without the
interpreter's lock. Where only every k-th row is wanted in the cells, the bins are counted by comparing all rows with
each cut, which is three times as fast again while there are few of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlops_dagster.core.profile_arrow import Numbers, numbers
from mlops_dagster.core.profile_columns import Moments, NumberColumn
from mlops_dagster.core.profile_values import GREATEST

if TYPE_CHECKING:
    import pyarrow as pa

PIECE = 65_536
"""Values counted at once: 512 KiB, so that they and the work space stay in a second-level cache of a megabyte."""

MOST_COMPARED = 24
"""With more cuts than these a sort is faster than comparing all values with each."""

DOT_LENGTH = 8_192
"""From 10,000 values on, the dot product of OpenBLAS starts threads of its own."""

LEAST_SHARE = 1e-4
"""Of the sum of squares: when M2 is a smaller part, subtraction has eaten more than four of its sixteen digits."""


@dataclass
class NumberCounts:
    """What was counted of a numeric column so far. The cells hold every `every`-th row, counted as that many."""

    layout: NumberColumn
    every: int = 1

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.layout.counts), np.int64)
        self.sums = np.zeros(len(self.layout.counts))
        self.binned = np.zeros(len(self.layout.cuts) + 1, np.int64)
        self.edges = np.asarray(self.layout.edges)
        self.missing = self.negative_infinite = self.infinite = 0
        self.moments = Moments()
        if len(self.layout.cuts) > MOST_COMPARED:
            self.every = 1

    def task(self, arrays: list["pa.Array"]) -> "NumberCounts":
        """Counts a block; called in a thread, so it leaves `self` as it is."""
        found = NumberCounts(self.layout, self.every)
        views = [numbers(array) for array in arrays]
        if self.every == 1:
            found.sort(views)
        else:
            found.compare(views)
        return found

    def sort(self, views: list[Numbers]) -> None:
        """Counts all rows in the cells, and adds those up to the bins."""
        room, spare = np.empty(PIECE), np.empty(PIECE)
        for view in views:
            for start in range(0, len(view.values), PIECE):
                piece = room[: min(PIECE, len(view.values) - start)]
                view.into(piece, start)
                piece.sort()
                self._ordered(piece, spare)
        starts = np.concatenate(([0], np.asarray(self.layout.cuts, np.int64) + 1))
        self.binned += np.add.reduceat(self.counts, starts)
        self.binned[0] += self.negative_infinite
        self.binned[-1] += self.infinite

    def _ordered(self, piece: np.ndarray, spare: np.ndarray) -> None:
        """Counts values in ascending order, of which NaN are the last."""
        low, high, present = np.searchsorted(piece, (-GREATEST, np.inf, np.nan))
        self.missing += len(piece) - int(present)
        self.negative_infinite += int(low)
        self.infinite += int(present - high)
        if high > low:
            finite = piece[low:high]
            total = self._into_cells(finite)
            self.moments += _moments(finite, total, float(finite[0]), float(finite[-1]), spare)

    def _into_cells(self, finite: np.ndarray) -> float:
        """Counts finite values in ascending order in the cells; returns their sum."""
        bounds = np.concatenate(([0], np.searchsorted(finite, self.edges), [len(finite)]))
        counts = np.diff(bounds)
        filled = counts > 0
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.add.reduceat(finite, bounds[:-1][filled])
            self.sums[filled] += sums * self.every
            self.counts += counts * self.every
            return float(sums.sum())

    def compare(self, views: list[Numbers]) -> None:
        """Counts all rows in the bins and every `every`-th row in the cells."""
        room, spare, below = np.empty(PIECE), np.empty(PIECE), np.empty(PIECE, bool)
        kept = np.empty(sum(-(-len(view.values) // self.every) + len(view.values) // PIECE for view in views))
        filled = 0
        for view in views:
            for start in range(0, len(view.values), PIECE):
                piece = view.part(room, start)
                taken = piece[:: self.every]
                kept[filled : filled + len(taken)] = taken
                filled += len(taken)
                self._compared(piece, spare, below)
        kept = kept[:filled]
        kept.sort()
        low, high = np.searchsorted(kept, (-GREATEST, np.inf))
        if high > low:
            self._into_cells(kept[low:high])

    def _compared(self, piece: np.ndarray, spare: np.ndarray, below: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(piece.sum())
        if not np.isfinite(total):
            piece = self._finite(piece)
            with np.errstate(over="ignore", invalid="ignore"):
                total = float(piece.sum())
        if not len(piece):
            return
        mask = below[: len(piece)]
        ends = [int(np.count_nonzero(np.less(piece, self.edges[cut], out=mask))) for cut in self.layout.cuts]
        self.binned += np.diff((0, *ends, len(piece)))
        self.moments += _moments(piece, total, float(piece.min()), float(piece.max()), spare)

    def _finite(self, piece: np.ndarray) -> np.ndarray:
        """The finite values of a piece, after counting the others."""
        missing = int(np.count_nonzero(np.isnan(piece)))
        infinite, negative = (int(np.count_nonzero(piece == bound)) for bound in (np.inf, -np.inf))
        self.missing += missing
        self.infinite += infinite
        self.negative_infinite += negative
        self.binned[0] += negative
        self.binned[-1] += infinite
        return piece[np.isfinite(piece)]

    def add(self, found: "NumberCounts") -> None:
        self.counts += found.counts
        self.sums += found.sums
        self.binned += found.binned
        self.missing += found.missing
        self.negative_infinite += found.negative_infinite
        self.infinite += found.infinite
        self.moments += found.moments

    def column(self) -> NumberColumn:
        return NumberColumn(
            kind=self.layout.kind,
            edges=self.layout.edges,
            cuts=self.layout.cuts,
            binned=tuple(self.binned.tolist()),
            counts=tuple(self.counts.tolist()),
            sums=tuple(self.sums.tolist()),
            every=self.every,
            missing=self.missing,
            negative_infinite=self.negative_infinite,
            infinite=self.infinite,
            moments=self.moments,
        )


def _moments(finite: np.ndarray, total: float, least: float, greatest: float, spare: np.ndarray) -> Moments:
    """M2 from the sum of squares where that leaves ten digits or more, else in two passes, so that a large mean costs none."""
    size = len(finite)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = total / size if np.isfinite(total) else float((finite / size).sum())
        squares = _sum_of_squares(finite)
        m2 = squares - total * mean
        if not m2 > squares * LEAST_SHARE:
            apart = np.subtract(finite, mean, out=spare[:size])
            m2 = float(np.square(apart, out=apart).sum())
    return Moments(size, mean, m2, least, greatest)


def _sum_of_squares(values: np.ndarray) -> float:
    whole = len(values) - len(values) % DOT_LENGTH
    rows, rest = values[:whole].reshape(-1, DOT_LENGTH), values[whole:]
    return float(np.vecdot(rows, rows).sum() + np.dot(rest, rest))


def sample_of(arrays: list["pa.Array"], step: int) -> np.ndarray:
    """Every `step`-th row of a numeric column as float64, in ascending order, without the missing and the infinite ones."""
    sizes = [len(a) for a in arrays]
    room = np.empty(-(-sum(sizes) // step))
    filled = seen = 0
    for array, size in zip(arrays, sizes, strict=True):
        first = -seen % step
        seen += size
        if first >= size:
            continue
        part = room[filled : filled + -(-(size - first) // step)]
        numbers(array).into(part, first, step)
        filled += len(part)
    taken = room[:filled]
    taken.sort()
    low, high = np.searchsorted(taken, [-GREATEST, np.inf])
    return taken[low:high]
