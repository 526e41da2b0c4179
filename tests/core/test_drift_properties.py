"""What holds of any table: a whole is the sum of its parts, nothing is lost, JSON keeps everything."""

import math

import numpy as np
import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_dagster.core.drift import NumberColumn, Profile, jensen_shannon, kolmogorov_smirnov, psi, wasserstein

floats = st.one_of(st.none(), st.floats(width=64), st.integers(-3, 3).map(float))
texts = st.one_of(st.none(), st.text(max_size=3))
rows = st.lists(st.tuples(floats, texts, st.one_of(st.none(), st.booleans())), max_size=60)


def table(rows: list[tuple]) -> pa.Table:
    n, s, b = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table({"n": pa.array(n, pa.float64()), "s": pa.array(s, pa.string()), "b": pa.array(b, pa.bool_())})


# The shares of eleven rows, summed, end a rounding above 1.
ELEVEN = [(x, None, None) for x in (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 0.5)]


@settings(deadline=None, max_examples=200)
@example(ELEVEN, [(None, None, None), (0.0, None, None)], 0, 1)
@given(rows, rows, st.integers(0, 60), st.integers(1, 20))
def test_any_table(reference_rows, current_rows, cut, batch_rows):
    reference = Profile.of(table(reference_rows), 4)
    current = table(current_rows)
    whole = Profile.of(current, like=reference)
    parts = Profile.of(current.slice(0, cut), like=reference) + Profile.of(
        iter(current.slice(cut).to_batches(batch_rows)), like=reference
    )
    assert {n: c.bins().tolist() for n, c in parts.columns.items()} == {n: c.bins().tolist() for n, c in whole.columns.items()}
    for profile, source in ((reference, reference_rows), (whole, current_rows)):
        assert all(column.rows == len(source) for column in profile.columns.values())
        _check_numbers(profile.columns["n"], [row[0] for row in source])
        again = Profile.from_json(profile.to_json())
        assert again.to_json() == profile.to_json()
        assert psi(reference, again) == psi(reference, profile) or not source or not reference_rows
    _check_distances(reference, whole)
    thinned = Profile.of(current, like=reference, cells_every=3)
    assert {n: c.bins().tolist() for n, c in thinned.columns.items()} == {n: c.bins().tolist() for n, c in whole.columns.items()}
    ours, theirs = thinned.columns["n"].moments, whole.columns["n"].moments
    assert (ours.count, ours.least, ours.greatest) == (theirs.count, theirs.least, theirs.greatest)
    _check_distances(reference, thinned)


def _check_numbers(column: NumberColumn, values: list[float | None]) -> None:
    present = np.array([v for v in values if v is not None and not math.isnan(v)])
    assert column.missing == len(values) - len(present)
    finite = present[np.isfinite(present)]
    for edges, counts, counted in (
        (column.edges, column.counts, finite),
        ([column.edges[c] for c in column.cuts], column.binned, present),
    ):
        below = [int((counted < edge).sum()) for edge in edges]
        assert np.cumsum(counts).tolist() == [*below, len(counted)]
    assert column.moments.count == len(finite)
    if len(finite):
        assert (column.moments.least, column.moments.greatest) == (finite.min(), finite.max())


def _check_distances(reference: Profile, current: Profile) -> None:
    if not reference.rows or not current.rows:
        return
    for name, value in psi(reference, current).items():
        assert value >= 0, name
    for name, value in jensen_shannon(reference, current).items():
        assert 0 <= value <= math.sqrt(math.log(2)) + 1e-12, name
    for value in kolmogorov_smirnov(reference, current).values():
        assert 0 <= value.statistic <= value.upper <= 1
    moderate = max((abs(x) for p in (reference, current) for x in _extremes(p)), default=0.0) < 1e100
    for value in wasserstein(reference, current).values() if moderate else ():
        assert value.lower <= value.value <= value.upper


def _extremes(profile: Profile) -> list[float]:
    moments = profile.columns["n"].moments
    return [x for x in (moments.least, moments.greatest) if x is not None]
