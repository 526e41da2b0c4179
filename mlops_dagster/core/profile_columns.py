"""One column of a profile: exact counts in fixed cells, mergeable, without a single raw row."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np

from mlops_dagster.core.errors import DataError

NUMBER_KINDS = ("number", "time", "duration")
CATEGORY_KINDS = ("text", "boolean", "category", "null")


@dataclass(frozen=True)
class Moments:
    """Count, mean and M2 (sum of squared distances from the mean) of the finite values, with their least and greatest."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    least: float | None = None
    greatest: float | None = None

    def __add__(self, other: "Moments") -> "Moments":
        """Both together, by the pairwise update of Chan, Golub & LeVeque, "Updating formulae ..." (1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        step = other.mean - self.mean
        if math.isfinite(step):
            mean = self.mean + step * (other.count / count)
        else:
            mean = self.mean * (self.count / count) + other.mean * (other.count / count)
        m2 = self.m2 + other.m2 + step * step * (self.count * other.count / count)
        return Moments(count, mean, m2, _least(self.least, other.least), _greatest(self.greatest, other.greatest))

    @property
    def deviation(self) -> float:
        """The population standard deviation (divisor: count); 0.0 of no values."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


def _least(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)


def _greatest(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)


@dataclass(frozen=True)
class NumberColumn:
    """Counts of a numeric or temporal column, in bins and in the finer cells that those consist of, half-open `[edge, next
    edge)`.

    `edges` are the K cell edges; `cuts` the positions in `edges` of the B edges that divide the bins of PSI. `binned`
    (B + 1 entries) counts all rows that have a value, infinite ones in the outermost bins. `counts` and `sums` (K + 1
    entries) are how many finite values lie in each cell, and their sum: of all rows, or, with `every` > 1, of every
    `every`-th row, counted as that many. Times are microseconds since 1970 in UTC, durations microseconds. `missing`
    are nulls and NaN; `moments` are those of all finite values.
    """

    kind: str
    edges: tuple[float, ...]
    cuts: tuple[int, ...]
    binned: tuple[int, ...]
    counts: tuple[int, ...]
    sums: tuple[float, ...]
    every: int = 1
    missing: int = 0
    negative_infinite: int = 0
    infinite: int = 0
    moments: Moments = Moments()

    def __post_init__(self) -> None:
        sizes = (len(self.binned) - len(self.cuts), len(self.counts) - len(self.edges), len(self.sums) - len(self.edges))
        if sizes != (1, 1, 1):
            raise DataError(
                f"A numeric column of a profile has {len(self.cuts)} cuts and {len(self.edges)} edges, but {len(self.binned)} bins, "
                f"{len(self.counts)} counts and {len(self.sums)} sums: each must be one more. Compute the profile again."
            )

    @classmethod
    def empty(cls, kind: str, edges: Sequence[float], cuts: Sequence[int]) -> Self:
        """A column with these cells and nothing counted in them."""
        cells = len(edges) + 1
        return cls(kind, tuple(edges), tuple(cuts), (0,) * (len(cuts) + 1), (0,) * cells, (0.0,) * cells)

    @property
    def rows(self) -> int:
        return sum(self.binned) + self.missing

    @property
    def layout(self) -> tuple[object, ...]:
        """What two columns must share for their counts to be added or compared."""
        return (self.kind, self.edges, self.cuts)

    def bins(self) -> np.ndarray:
        """Counts per PSI bin, int64; the last is the bin of the missing values."""
        return np.array([*self.binned, self.missing], np.int64)

    def labels(self) -> tuple[str, ...]:
        """A name for each entry of `bins()`."""
        cuts = [f"{self.edges[c]:.6g}" for c in self.cuts]
        lower, upper = ["-inf", *cuts], [*cuts, "inf"]
        return (*(f"[{a}, {b})" for a, b in zip(lower, upper, strict=True)), "missing")

    def quantile(self, level: float) -> float | None:
        """The value below which a share `level` of the finite values lies, off by at most one cell; None of no values."""
        if self.moments.least is None or self.moments.greatest is None:
            return None
        inner = np.clip(self.edges, self.moments.least, self.moments.greatest)
        bounds = np.concatenate(([self.moments.least], inner, [self.moments.greatest]))
        below = np.concatenate(([0], np.cumsum(self.counts)))
        return float(np.interp(level * below[-1], below, bounds))

    def emptied(self) -> Self:
        """The same cells with nothing counted in them."""
        return self.empty(self.kind, self.edges, self.cuts)

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            binned=tuple(a + b for a, b in zip(self.binned, other.binned, strict=True)),
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            every=max(self.every, other.every),
            sums=tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            missing=self.missing + other.missing,
            negative_infinite=self.negative_infinite + other.negative_infinite,
            infinite=self.infinite + other.infinite,
            moments=self.moments + other.moments,
        )

    def to_dict(self) -> dict[str, Any]:
        moments = {name: _plain(value) for name, value in asdict(self.moments).items()}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moments"}
        return {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in own.items()},
            "sums": _plains(self.sums),
            "moments": moments,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(
            kind=data["kind"],
            edges=tuple(float(e) for e in data["edges"]),
            cuts=tuple(data["cuts"]),
            binned=tuple(data["binned"]),
            counts=tuple(data["counts"]),
            every=data["every"],
            sums=tuple(float(s) for s in data["sums"]),
            missing=data["missing"],
            negative_infinite=data["negative_infinite"],
            infinite=data["infinite"],
            moments=_moments(data["moments"]),
        )


@dataclass(frozen=True)
class CategoryColumn:
    """Counts of a text, boolean or all-null column by category.

    `categories` are the known ones, the most frequent first, with their `counts`; the first `top` have a PSI bin each,
    the rest of the known share one, values that are not among the known share another (`unlisted`: unseen when the
    profile's own cells were fixed, or beyond the limit of known categories), and `missing` is the last.
    """

    kind: str
    categories: tuple[str, ...]
    top: int
    counts: tuple[int, ...]
    unlisted: int = 0
    missing: int = 0

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.categories):
            raise DataError(
                f"A column of a profile has {len(self.categories)} categories but {len(self.counts)} counts. "
                f"Compute the profile again."
            )

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.unlisted + self.missing

    @property
    def layout(self) -> tuple[object, ...]:
        """What two columns must share for their counts to be added or compared."""
        return (self.kind, self.categories, self.top)

    def bins(self) -> np.ndarray:
        """Counts per PSI bin, int64: the top categories, the other known ones, the unlisted, the missing."""
        own = self.counts[: self.top]
        return np.array([*own, sum(self.counts[self.top :]), self.unlisted, self.missing], np.int64)

    def labels(self) -> tuple[str, ...]:
        """A name for each entry of `bins()`."""
        return (*self.categories[: self.top], "other known", "unlisted", "missing")

    def emptied(self) -> Self:
        """The same categories with nothing counted in them."""
        return replace(self, counts=(0,) * len(self.counts), unlisted=0, missing=0)

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            unlisted=self.unlisted + other.unlisted,
            missing=self.missing + other.missing,
        )

    def to_dict(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        categories, counts = tuple(data["categories"]), tuple(data["counts"])
        return cls(data["kind"], categories, data["top"], counts, data["unlisted"], data["missing"])


Column = NumberColumn | CategoryColumn


def column_from_dict(data: dict[str, Any]) -> Column:
    """The column that `to_dict` described; KeyError, TypeError or DataError where the description is not whole."""
    kind = data["kind"]
    if kind in NUMBER_KINDS:
        return NumberColumn.from_dict(data)
    if kind in CATEGORY_KINDS:
        return CategoryColumn.from_dict(data)
    raise DataError(f"A profile's column has the kind {kind!r}; known are {', '.join((*NUMBER_KINDS, *CATEGORY_KINDS))}.")


def _moments(data: dict[str, Any]) -> Moments:
    least, greatest = (None if data[bound] is None else float(data[bound]) for bound in ("least", "greatest"))
    return Moments(data["count"], float(data["mean"]), float(data["m2"]), least, greatest)


def _plain(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN: such a number travels as its name."""
    return value if value is None or math.isfinite(value) else repr(value)


def _plains(values: Sequence[float]) -> list[float | str | None]:
    return [_plain(v) for v in values]
