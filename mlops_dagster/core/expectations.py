"""What a reference profile leads one to expect of new rows: ranges, known categories, the share of missing values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from mlops_dagster.core.profile import Profile
from mlops_dagster.core.profile_columns import CategoryColumn, Column, NumberColumn

EXAMPLES = 3


@dataclass(frozen=True)
class Expectation:
    """Of one column: numbers within `[least, greatest]`, text among `known` (None: no such expectation), `missing_share` of all rows."""

    column: str
    kind: str
    missing_share: float
    least: float | None = None
    greatest: float | None = None
    known: frozenset[str] | None = None

    @property
    def wording(self) -> str:
        """What is expected, in words."""
        if self.least is not None and self.greatest is not None:
            return f"[{self.least:.6g}, {self.greatest:.6g}]"
        return "any" if self.known is None else f"one of {len(self.known)} known"


@dataclass(frozen=True)
class Departure:
    """How one column's rows depart from what was expected: shares of all rows (0 to 1), examples, and why that is too much."""

    column: str
    outside_share: float
    missing_share: float
    examples: tuple[str, ...]
    reason: str


def learned(reference: Profile, range_slack: float = 0.1) -> dict[str, Expectation]:
    """An expectation for each column of a profile.

    A number may lie beyond the least and the greatest of the reference by `range_slack` of the distance between them (of the value
    itself where there is but one). Text and booleans may take the known categories, unless there were more than a profile keeps.
    Moments pass and durations vary, so that of them only the share of missing values is expected.
    """
    return {name: _of(name, column, reference.rows, range_slack) for name, column in reference.columns.items()}


def _of(name: str, column: Column, rows: int, slack: float) -> Expectation:
    missing = column.missing / rows if rows else 0.0
    if isinstance(column, CategoryColumn):
        limited = column.kind != "null" and not column.unlisted
        return Expectation(name, column.kind, missing, known=frozenset(column.categories) if limited else None)
    least, greatest = _range(column, slack)
    return Expectation(name, column.kind, missing, least, greatest)


def _range(column: NumberColumn, slack: float) -> tuple[float | None, float | None]:
    low, high = column.moments.least, column.moments.greatest
    if column.kind != "number" or low is None or high is None:
        return None, None
    room = slack * ((high - low) or abs(high))
    return (
        float("-inf") if column.negative_infinite else low - room,
        float("inf") if column.infinite else high + room,
    )


def departures(
    expected: Mapping[str, Expectation], rows: Any, max_outside_share: float = 0.01, missing_slack: float = 0.05
) -> list[Departure]:
    """The columns of `rows` (anything with the Arrow C stream) that are not as expected, the farthest off first.

    A column departs where more than `max_outside_share` of all rows lie outside, where its share of missing values is greater than the
    reference's by more than `missing_slack`, or where it is of another kind. Columns without an expectation are not looked at;
    a table without rows departs in nothing.
    """
    frame = pl.DataFrame(rows)
    names = [name for name in frame.columns if name in expected] if frame.height else []
    found = [_departure(expected[name], frame[name], max_outside_share, missing_slack) for name in names]
    return sorted((d for d in found if d is not None), key=lambda d: (-max(d.outside_share, d.missing_share), d.column))


def _departure(expected: Expectation, values: pl.Series, max_outside_share: float, missing_slack: float) -> Departure | None:
    kind = _kind(values.dtype)
    if kind != expected.kind and "null" not in (kind, expected.kind):
        return Departure(expected.column, 1.0, 0.0, (), f"{expected.column} is {kind}, in the reference it was {expected.kind}")
    missing = values.is_null() | (values.is_nan() if values.dtype.is_float() else False)
    outside = _outside(expected, values) & ~missing
    shares = float(outside.sum()) / len(values), float(missing.sum()) / len(values)
    examples = tuple(str(v) for v in values.filter(outside).unique(maintain_order=True).head(EXAMPLES).to_list())
    reasons = _reasons(expected, shares, examples, max_outside_share, missing_slack)
    return Departure(expected.column, *shares, examples, f"{expected.column}: {', '.join(reasons)}") if reasons else None


def _reasons(
    expected: Expectation, shares: tuple[float, float], examples: Sequence[str], max_outside_share: float, missing_slack: float
) -> list[str]:
    outside, missing = shares
    reasons = []
    if outside > max_outside_share:
        reasons.append(f"{outside:.1%} of the rows are not in {expected.wording} (such as {', '.join(examples)})")
    if missing > expected.missing_share + missing_slack:
        reasons.append(f"{missing:.1%} missing, {expected.missing_share:.1%} in the reference")
    return reasons


def _outside(expected: Expectation, values: pl.Series) -> pl.Series:
    if expected.known is not None:
        return ~values.cast(pl.String).is_in(list(expected.known)).fill_null(True)
    if expected.least is None or expected.greatest is None or not values.dtype.is_numeric():
        return pl.repeat(False, len(values), eager=True)
    return ~values.is_between(expected.least, expected.greatest).fill_null(True)


def _kind(dtype: pl.DataType) -> str:
    """As `profile_arrow.kind_of` names kinds."""
    if dtype == pl.Boolean:
        return "boolean"
    if dtype.is_numeric():
        return "number"
    if dtype == pl.Null:
        return "null"
    if dtype in (pl.Duration, pl.Time):
        return "duration"
    return "time" if dtype.is_temporal() else "text"
