"""A profile of a table: per column exact counts in fixed cells, moments and missing values; small, mergeable, serializable."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mlops_dagster.core.errors import DataError
from mlops_dagster.core.profile_arrow import first_names, source_of
from mlops_dagster.core.profile_columns import Column, column_from_dict

FORMAT = 1


@dataclass(frozen=True)
class Profile:
    """What is remembered of a table: for each column, how many rows fell in each cell.

    A reference profile (`Profile.of(table)`) fixes the cells; profiles made `like` it, and sums of such, are exact for PSI.

    >>> import polars as pl
    >>> reference = Profile.of(pl.DataFrame({"delay": [1.0, 2.0, 3.0, None]}))
    >>> monday = Profile.of(pl.DataFrame({"delay": [2.0]}), like=reference)
    >>> (monday + monday).rows
    2
    """

    rows: int
    columns: Mapping[str, Column]

    @classmethod
    def of(
        cls,
        table: Any,
        bins: int = 10,
        *,
        like: Self | None = None,
        columns: Collection[str] | None = None,
        edges: Mapping[str, Sequence[float]] | None = None,
        categorical: Collection[str] = (),
        top_categories: int = 20,
        cells_every: int = 1,
        threads: int | None = None,
    ) -> Self:
        """The profile of `table`, counted over all its rows.

        `table` is anything with the Arrow C stream (pyarrow, Polars, pandas >= 2.2, DuckDB), an iterable of record
        batches, or a function that opens such an iterable; streams are read in bounded memory. Numeric, temporal, text
        (plain, dictionary) and boolean columns.

        Cells: those of `like`, whose columns must all be there (others are left out), or else new ones. A numeric
        column then gets `bins` bins of equal share (fewer where values repeat: a value on several quantiles has a bin
        of its own, as has each value of a column with at most 2 x `bins` different ones), or the bins between the
        `edges` given for it; each bin is divided into ten cells and the outermost into finer ones.
        Values that are one float32 count as one, so that a copy in float32 or 3 x 0.1 for 0.3 is no drift; not so where the column has
        finer steps than that, and integers beyond 2^24 count apart. Quantiles are those
        of all rows up to 1,048,576, beyond that of every k-th row; counts are of all rows always. A stream that can be
        read only once takes the quantiles of its first rows (as many as make 16 million values, at most 1,048,576).
        Text has a bin for each of the `top_categories`, one for the other known ones (1,000 at most), one for the
        unlisted. Missing values (null, NaN) are a bin of their own. Columns named in `categorical` are counted by the
        text of their values, moments by that of the instant in UTC, whatever their unit and zone.

        With `cells_every` = k > 1 only every k-th row is counted in the cells inside the bins, which is two to three
        times as fast: PSI, Jensen-Shannon, chi-square, missing values and moments stay exact; Kolmogorov-Smirnov and
        Wasserstein are those of every k-th row.

        Raises DataError naming a column that is missing, repeated, of another kind than in `like`, or of an unknown type.
        """
        from mlops_dagster.core.profile_building import Plan, profile

        plan = Plan(bins, columns, edges or {}, frozenset(categorical), top_categories, cells_every)
        rows, counted = profile(table, plan, like.columns if like is not None else None, threads)
        return cls(rows, counted)

    def emptied(self) -> Self:
        """The same cells with nothing counted: what a day without rows adds."""
        return type(self)(0, {name: column.emptied() for name, column in self.columns.items()})

    def select(self, names: Collection[str]) -> Self:
        """The profile of some of the columns; DataError naming one that is not there."""
        for name in names:
            if name not in self.columns:
                raise DataError(f"Column {name!r} is not in the profile, which has {', '.join(self.columns)}.")
        return type(self)(self.rows, {name: self.columns[name] for name in names})

    def __add__(self, other: "Profile") -> Self:
        """The profile of both tables together: counts exact, moments and cell sums to rounding.

        DataError unless both have the same cells.
        """
        require_same_cells(self, other, self.columns, "added")
        if extra := [name for name in other.columns if name not in self.columns]:
            raise DataError(f"Of two profiles to be added, only one has column {extra[0]!r}. Leave it out with `select`.")
        return type(self)(self.rows + other.rows, {name: column + other.columns[name] for name, column in self.columns.items()})  # type: ignore[operator]

    @classmethod
    def merge(cls, profiles: Iterable["Profile"]) -> "Profile":
        """The sum of one or more profiles (a month of its days); DataError when there is none or their cells differ."""
        merged: Profile | None = None
        for profile in profiles:
            merged = profile if merged is None else merged + profile
        if merged is None:
            raise DataError(
                "There is no profile to merge. Give at least one; `reference.emptied()` stands for a day without rows."
            )
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text, safe for JSON; `from_dict` gives back an equal profile."""
        return {"format": FORMAT, "rows": self.rows, "columns": {name: column.to_dict() for name, column in self.columns.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The profile that `to_dict` described; DataError when it is not one, or of another format."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise DataError(
                f"This is not a profile of format {FORMAT} (found {found!r}). Compute the profile again with this version."
            )
        name = None
        try:
            columns = {}
            for name, column in data["columns"].items():
                columns[name] = column_from_dict(column)
            return cls(int(data["rows"]), columns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"column {name!r}" if name is not None else "its head"
            raise DataError(
                f"The profile cannot be read at {where}: {type(error).__name__}: {error}. Compute it again."
            ) from error

    def to_json(self) -> str:
        """The profile as one line of JSON (no NaN, no Infinity); floats in full, so that nothing is lost."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The profile that `to_json` wrote; DataError when the text is not one."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise DataError(f"The profile is not JSON: {error}. Compute it again.") from error
        return cls.from_dict(data)


def slices(
    table: Any,
    by: str,
    bins: int = 10,
    *,
    like: Profile | None = None,
    columns: Collection[str] | None = None,
    edges: Mapping[str, Sequence[float]] | None = None,
    categorical: Collection[str] = (),
    top_categories: int = 20,
    threads: int | None = None,
) -> dict[str, Profile]:
    """A profile for each value of the column `by` (as text; a null is "null"), all with the same cells, so that they add
    up to the whole.

    The rest is as in `Profile.of`. Without `like` the cells are those of the whole table, so it must be one that can be
    read more than once; `by` is then profiled only where `columns` names it. Raises DataError when `by` is not a
    column, has more than 1,000 values, or the table is gone after one reading.
    """
    from mlops_dagster.core.profile_building import profile_slices

    if like is None:
        source = source_of(table)
        if not source.again:
            raise DataError("Slices of a stream that can be read only once need a reference in `like`. Give one, or a table.")
        wanted = [n for n in first_names(source) if n != by] if columns is None else columns
        like = Profile.of(
            source, bins, columns=wanted, edges=edges, categorical=categorical, top_categories=top_categories, threads=threads
        )
        table = source
    like = like if columns is None else like.select(columns)
    counted = profile_slices(table, by, like.columns, threads)
    return {value: Profile(rows, found) for value, (rows, found) in counted.items()}


def require_same_cells(reference: Profile, current: Profile, names: Iterable[str], verb: str) -> None:
    """DataError naming the first column that one has not, or whose cells differ."""
    for name in names:
        if name not in current.columns:
            raise DataError(
                f"Of two profiles to be {verb}, only one has column {name!r}. Leave it out with `select`, or profile it in both."
            )
        ours, theirs = reference.columns[name], current.columns[name]
        if ours.layout != theirs.layout:
            what = f"kinds {ours.kind} and {theirs.kind}" if ours.kind != theirs.kind else "cells that differ"
            raise DataError(
                f"Column {name!r} has {what} in the two profiles to be {verb}. "
                f"Make both like one reference: Profile.of(table, like=reference)."
            )
