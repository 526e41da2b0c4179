"""How far apart two profiles are: PSI, Jensen-Shannon, chi-square, Kolmogorov-Smirnov and Wasserstein, from counts alone.

PSI, Jensen-Shannon and chi-square are exact for the bins of the profiles. Kolmogorov-Smirnov and Wasserstein come with
bounds that hold whatever lies inside the cells.
"""

import math
from dataclasses import dataclass

import numpy as np

from mlops_dagster.core.drift_distributions import chi_square_tail, kolmogorov_tail
from mlops_dagster.core.profile import Profile, require_same_cells
from mlops_dagster.core.profile_columns import NumberColumn
from mlops_dagster.core.profile_values import single

EPSILON = 1e-4
"""The share that stands for an empty bin, so that its logarithm is finite."""


@dataclass(frozen=True)
class Bounded:
    """A statistic of the raw rows: `value` is the best estimate, the truth lies within [lower, upper]; all three are equal
    where it is exact.
    """

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """`statistic` is the greatest distance of the two distribution functions at the cell edges; that of the raw rows is
    within [statistic, upper].

    `p_value` is that of `statistic`, by Kolmogorov's limit distribution (so it errs towards "no drift").
    """

    statistic: float
    upper: float
    p_value: float


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's test that two tables of counts have one distribution."""

    statistic: float
    degrees_of_freedom: int
    p_value: float


def psi(reference: Profile, current: Profile, epsilon: float | None = EPSILON) -> dict[str, float | None]:
    """The population stability index of each column of `reference`: sum over the bins of (c - r) x ln(c / r), r and c the
    bin's shares of all rows.

    Exact for the profile's bins, the missing values being one of them. An empty bin has the share `epsilon` (the others
    are not scaled down for it); `epsilon=None` smooths as Evidently does: 0.0001, or a millionth of the least share of
    that side where that share is at most 0.0001. Symmetric; 0 for equal shares. Source: Siddiqi, "Credit Risk
    Scorecards" (2006), as the J-divergence of Jeffreys (1946). None when a side has no rows, so that the answer is JSON.

    Raises DataError naming the column that `current` has not, or has with other cells.
    """
    return {name: _known(psi_of_counts(r, c, epsilon)) for name, (r, c) in _bins(reference, current).items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def psi_of_counts(reference: np.ndarray, current: np.ndarray, epsilon: float | None = EPSILON) -> float:
    """PSI of two arrays of counts over the same bins, as in `psi`; NaN when a side has none."""
    if not reference.sum() or not current.sum():
        return math.nan
    # Bins that are empty on both sides add nothing, and must not meet two different floors.
    used = (reference > 0) | (current > 0)
    r, c = (_floored(side[used] / side.sum(), epsilon) for side in (reference, current))
    return float(((c - r) * np.log(c / r)).sum())


def _floored(shares: np.ndarray, epsilon: float | None) -> np.ndarray:
    least = shares[shares > 0].min()
    as_evidently = least / 10**6 if least <= EPSILON else EPSILON
    return np.where(shares == 0, as_evidently if epsilon is None else epsilon, shares)


def jensen_shannon(reference: Profile, current: Profile, base: float = math.e) -> dict[str, float | None]:
    """The Jensen-Shannon distance: the square root of (D(r | m) + D(c | m)) / 2 with m = (r + c) / 2 and D the
    Kullback-Leibler divergence to `base`.

    Exact for the profile's bins (missing values are one), no smoothing. 0 for equal shares, at most sqrt(log_base 2).
    Source: Lin, "Divergence measures based on the Shannon entropy" (1991); Endres & Schindelin (2003) for the root
    being a metric. None when a side has no rows.
    """
    unit = math.sqrt(math.log(base))
    return {name: _known(_jensen_shannon(r, c) / unit) for name, (r, c) in _bins(reference, current).items()}


def _jensen_shannon(reference: np.ndarray, current: np.ndarray) -> float:
    if not reference.sum() or not current.sum():
        return math.nan
    r, c = reference / reference.sum(), current / current.sum()
    return math.sqrt(max(0.0, (_divergence(r, (r + c) / 2) + _divergence(c, (r + c) / 2)) / 2))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


def chi_square(reference: Profile, current: Profile) -> dict[str, ChiSquare]:
    """Pearson's chi-square test of homogeneity: the sum over bins and sides of (observed - expected)^2 / expected.

    Exact for the profile's bins (missing values are one); bins empty on both sides are left out; no continuity
    correction; degrees of freedom: bins used less one. Source: Pearson (1900); the p-value by the limit distribution,
    good where expected counts are 5 or more (Cochran 1954).
    """
    return {name: chi_square_of_counts(r, c) for name, (r, c) in _bins(reference, current).items()}


def chi_square_of_counts(reference: np.ndarray, current: np.ndarray) -> ChiSquare:
    """The test of two arrays of counts over the same bins, as in `chi_square`."""
    used = (reference > 0) | (current > 0)
    observed = np.stack((reference[used], current[used])).astype(np.float64)
    if not observed.sum(axis=1).all():
        return ChiSquare(0.0, 0, 1.0)
    expected = observed.sum(axis=1, keepdims=True) * observed.sum(axis=0) / observed.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = int(used.sum()) - 1
    return ChiSquare(statistic, degrees, chi_square_tail(statistic, degrees))


def kolmogorov_smirnov(reference: Profile, current: Profile) -> dict[str, KolmogorovSmirnov]:
    """The two-sample Kolmogorov-Smirnov distance, sup |F_r - F_c| over the values that are there, for the numeric and
    temporal columns.

    Exact at the cell edges, so a lower bound of that of the raw rows; between two edges the distance can exceed it by
    no more than the cell's share, which `upper` counts in (with ten cells per bin: about 0.01 by default). Exact for
    columns with at most 2 x bins different values (values that are one float32 count as one). Where the cells hold
    every k-th row, all this is of those rows, whose distance from that of all rows exceeds 1.63 x sqrt(k / rows) in 1 %
    of cases (Kolmogorov). p-value: Kolmogorov's limit for sqrt(n m / (n + m)) x D. Source: Smirnov (1939). Columns
    without values on a side are left out.
    """
    pairs = _numbers(reference, current)
    return {name: _kolmogorov_smirnov(r, c) for name, (r, c) in pairs.items() if sum(r.binned) and sum(c.binned)}


def _kolmogorov_smirnov(reference: NumberColumn, current: NumberColumn) -> KolmogorovSmirnov:
    r, c = _shares(reference), _shares(current)
    apart = np.concatenate(([0.0], np.cumsum(r - c)))
    statistic = min(1.0, float(np.abs(apart).max()))  # sums of shares may end a rounding above 1
    before, after = apart[:-1], apart[1:]
    above, below = np.minimum(before + r, after + c), np.maximum(before - c, after - r)
    inside = np.maximum(above, -below)[1:-1][~_single(reference.edges)]
    upper = max(statistic, float(inside.max(initial=0.0)))
    n, m = sum(reference.binned), sum(current.binned)
    return KolmogorovSmirnov(statistic, min(1.0, upper), kolmogorov_tail(math.sqrt(n * m / (n + m)) * statistic))


def _shares(column: NumberColumn) -> np.ndarray:
    """The cells' shares of all values, between those of the two infinities, which are cells of their own."""
    counted = sum(column.counts)
    finite = np.asarray(column.counts) * (column.moments.count / counted) if counted else np.zeros(len(column.counts))
    return np.concatenate(([column.negative_infinite], finite, [column.infinite])) / sum(column.binned)


def _single(edges: tuple[float, ...]) -> np.ndarray:
    """Which cells hold one value only."""
    return np.concatenate(([False], single(np.asarray(edges)), [False])) if edges else np.array([False])


def wasserstein(reference: Profile, current: Profile, normed: bool = False) -> dict[str, Bounded]:
    """The first Wasserstein distance, the integral of |F_r - F_c|, in the column's unit, over finite values of the numeric
    and temporal columns.

    The profile keeps the sum of the values in each cell, which gives the integral of F_r - F_c over a cell exactly; so
    the result is exact but for the cells in which the two functions cross, where it is interpolated and bounded (for
    every k-th row, where the cells hold those). `normed` divides by the reference's standard deviation (at least 0.001,
    as Evidently does). Source: Vallender (1974). Columns without finite values on a side are left out.
    """
    found = {}
    for name, (r, c) in _numbers(reference, current).items():
        if sum(r.counts) and sum(c.counts):
            unit = max(r.moments.deviation, 0.001) if normed else 1.0
            found[name] = Bounded(*(x / unit for x in _wasserstein(r, c)))
    return found


def _wasserstein(reference: NumberColumn, current: NumberColumn) -> tuple[float, float, float]:
    least = min(x.moments.least for x in (reference, current) if x.moments.least is not None)
    greatest = max(x.moments.greatest for x in (reference, current) if x.moments.greatest is not None)
    bounds = np.concatenate(([least], np.clip(reference.edges, least, greatest), [greatest]))
    start, width = bounds[:-1], np.diff(bounds)
    (r, r_inside), (c, c_inside) = (_inside(side, start, width) for side in (reference, current))
    apart = np.concatenate(([0.0], np.cumsum(r - c)))
    before, after = apart[:-1], apart[1:]
    exact = np.abs(before * width + r_inside - c_inside)
    highest, lowest = np.minimum(before + r, after + c), np.maximum(before - c, after - r)
    crossing = (highest > 0) & (lowest < 0) & ~_single(reference.edges)
    from_start = np.abs(before) * width + r_inside + c_inside
    from_end = np.abs(after) * width + (r + c) * width - r_inside - c_inside
    upper = np.minimum(np.minimum(from_start, from_end), np.maximum(highest, -lowest) * width)
    upper = np.where(crossing, np.maximum(upper, exact), exact)
    # Where they are known to cross, the two triangles of a straight line between the ends.
    across = crossing & (before * after < 0)
    triangles = (before**2 + after**2) / np.where(across, 2 * (np.abs(before) + np.abs(after)), 1.0) * width
    value = np.where(across, np.clip(triangles, exact, upper), exact)
    return float(value.sum()), float(exact.sum()), float(upper.sum())


def _inside(column: NumberColumn, start: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's share, and the integral over the cell of the part of F that grows inside it: the sum of (end - value),
    as a share.
    """
    counts = np.asarray(column.counts)
    total = counts.sum()
    inside = (counts * (start + width) - np.asarray(column.sums)) / total
    return counts / total, np.clip(inside, 0.0, counts / total * width)


def _bins(reference: Profile, current: Profile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    require_same_cells(reference, current, reference.columns, "compared")
    return {name: (column.bins(), current.columns[name].bins()) for name, column in reference.columns.items()}


def _numbers(reference: Profile, current: Profile) -> dict[str, tuple[NumberColumn, NumberColumn]]:
    require_same_cells(reference, current, reference.columns, "compared")
    pairs = {name: (column, current.columns[name]) for name, column in reference.columns.items()}
    return {name: (r, c) for name, (r, c) in pairs.items() if isinstance(r, NumberColumn) and isinstance(c, NumberColumn)}
