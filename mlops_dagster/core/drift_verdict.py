"""Whether two profiles differ by more than a limit, and by more than chance.

Samples of n and m rows of one distribution over B bins have a PSI that is, times n m / (n + m), chi-square with B -
1 degrees of freedom. Its mean, (B - 1)(1/n + 1/m), is bias and is taken off: `effect`. The quantile that all
`comparisons` (default: the number of columns; give columns x slices where slices are judged together) exceed with
probability `false_alarms` at most is `noise` (Bonferroni). So neither more columns nor more rows mean drift by
themselves: noise falls with the rows, the limit on the effect does not. Source: Yurdakul, "Statistical Properties
of Population Stability Index" (Western Michigan University, 2018); Yurdakul & Naranjo, Journal of Risk Model
Validation 14(4) (2020).

An empty bin whose share is replaced by `epsilon` makes PSI many times as volatile as that law says. Compared with
the noise is therefore the PSI of the counts plus one half in each bin (Jeffreys' prior; Krichevsky & Trofimov
1981), which keeps to it from 100 rows on; and the effect is that of the smaller of the two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mlops_dagster.core.drift_distributions import chi_square_quantile
from mlops_dagster.core.drift_statistics import EPSILON, psi_of_counts
from mlops_dagster.core.errors import DataError
from mlops_dagster.core.profile import Profile, require_same_cells


class DriftOutcome(StrEnum):
    """PASS: no drift; FAIL: drift; INCONCLUSIVE: too few rows to say."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class ColumnVerdict:
    """One column's answer.

    `psi` as measured; `effect`: what remains without its sampling bias; `noise` is what chance alone reaches.
    """

    outcome: DriftOutcome
    psi: float
    effect: float
    noise: float
    reason: str


@dataclass(frozen=True)
class DriftVerdict:
    """The answer for all columns, with the reasons for anything but PASS, and each column's own."""

    outcome: DriftOutcome
    reasons: tuple[str, ...]
    columns: Mapping[str, ColumnVerdict]
    reference_rows: int
    current_rows: int

    @property
    def drifted_columns(self) -> tuple[str, ...]:
        """The columns that FAIL, the worst first."""
        failed = {name: c.effect for name, c in self.columns.items() if c.outcome is DriftOutcome.FAIL}
        return tuple(sorted(failed, key=lambda name: -failed[name]))


def drifted(
    reference: Profile,
    current: Profile,
    max_psi: float = 0.3,
    minimum_rows: int = 100,
    *,
    false_alarms: float = 0.01,
    comparisons: int | None = None,
    max_psi_by_column: Mapping[str, float] | None = None,
    epsilon: float | None = EPSILON,
) -> DriftVerdict:
    """Whether any column's PSI is beyond `max_psi` (its own limit, where `max_psi_by_column` has one), not by chance.

    `false_alarms` is the probability with which all `comparisons` together may exceed the noise (default: as many as columns;
    give columns x slices where slices are judged together). How noise and effect are computed: see this module.

    FAIL: effect > limit, and beyond noise. INCONCLUSIVE: fewer than `minimum_rows` on a side, or noise beyond the limit
    (the sample is too small to show that much), or an effect beyond the limit that chance explains. Else PASS. The
    whole is FAIL when any column is, else INCONCLUSIVE when any column is.

    Raises DataError when cells or columns differ, a limit is not positive, or a limit is for a column that is not
    there.
    """
    limits = _limits(reference, max_psi, max_psi_by_column or {})
    if not 0 < false_alarms < 1:
        raise DataError(f"false_alarms is {false_alarms}; it must lie between 0 and 1.")
    require_same_cells(reference, current, reference.columns, "compared")
    fewest = min(reference.rows, current.rows)
    if fewest < max(1, minimum_rows):
        side = "current data have" if current.rows == fewest else "reference has"
        reason = f"the {side} {fewest} rows; {max(1, minimum_rows)} are needed"
        return DriftVerdict(DriftOutcome.INCONCLUSIVE, (reason,), {}, reference.rows, current.rows)
    tail = false_alarms / max(1, len(limits) if comparisons is None else comparisons)
    columns = {
        name: _judged(column.bins(), current.columns[name].bins(), limits[name], tail, epsilon)
        for name, column in reference.columns.items()
    }
    outcome = _worst(columns)
    reasons = tuple(f"{name}: {c.reason}" for name, c in columns.items() if c.outcome is outcome is not DriftOutcome.PASS)
    return DriftVerdict(outcome, reasons, columns, reference.rows, current.rows)


def _worst(columns: Mapping[str, ColumnVerdict]) -> DriftOutcome:
    found = {column.outcome for column in columns.values()}
    order = (DriftOutcome.FAIL, DriftOutcome.INCONCLUSIVE, DriftOutcome.PASS)
    return next((outcome for outcome in order if outcome in found), DriftOutcome.INCONCLUSIVE)


def _limits(reference: Profile, max_psi: float, by_column: Mapping[str, float]) -> dict[str, float]:
    if unknown := [name for name in by_column if name not in reference.columns]:
        raise DataError(
            f"max_psi_by_column names {unknown[0]!r}, which is not in the profile; there are {', '.join(reference.columns)}."
        )
    limits = {name: by_column.get(name, max_psi) for name in reference.columns}
    for name, limit in limits.items():
        if not limit > 0:
            raise DataError(f"The PSI limit of column {name!r} is {limit}; it must be greater than 0.")
    return limits


def _judged(reference: np.ndarray, current: np.ndarray, limit: float, tail: float, epsilon: float | None) -> ColumnVerdict:
    used = (reference > 0) | (current > 0)
    degrees = int(used.sum()) - 1
    scale = float(1 / reference.sum() + 1 / current.sum())
    found = psi_of_counts(reference, current, epsilon)
    steady = psi_of_counts(reference[used] + 0.5, current[used] + 0.5)
    effect = max(0.0, min(found, steady) - degrees * scale)
    quantile = chi_square_quantile(tail, degrees)
    noise = quantile * scale
    values = f"PSI {found:.4g} ({effect:.4g} without its sampling bias), limit {limit:g}, by chance up to {noise:.4g}"
    if effect > limit and steady > noise:
        return ColumnVerdict(DriftOutcome.FAIL, found, effect, noise, f"{values}: drift")
    if effect > limit:
        return ColumnVerdict(
            DriftOutcome.INCONCLUSIVE, found, effect, noise, f"{values}: beyond the limit, but not beyond chance"
        )
    if noise > limit:
        needed = math.ceil(2 * quantile / limit)
        return ColumnVerdict(
            DriftOutcome.INCONCLUSIVE,
            found,
            effect,
            noise,
            f"{values}: too few rows to tell (about {needed} on each side suffice)",
        )
    return ColumnVerdict(DriftOutcome.PASS, found, effect, noise, f"{values}: no drift")
