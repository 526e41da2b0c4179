"""The statistics of two profiles agree with scipy's and Evidently's on the raw rows."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import special, stats
from scipy.spatial import distance

from mlops_dagster.core import drift_distributions
from mlops_dagster.core.drift import NumberColumn, Profile, chi_square, jensen_shannon, kolmogorov_smirnov, psi, wasserstein

rng = np.random.default_rng(11)
PAIRS = {
    "same": (rng.normal(size=8_000), rng.normal(size=3_000)),
    "shifted": (rng.normal(size=8_000), rng.normal(0.7, 1, size=3_000)),
    "wider": (rng.normal(size=8_000), rng.normal(0, 2, size=3_000)),
    "skewed": (rng.lognormal(0, 2, size=8_000), rng.lognormal(0.2, 1.8, size=3_000)),
    "large offset": (rng.normal(1e9, 1, size=8_000), rng.normal(1e9 + 0.5, 1, size=3_000)),
    "apart": (rng.uniform(0, 1, size=500), rng.uniform(100, 101, size=500)),
    "discrete": (rng.integers(0, 12, size=8_000).astype(float), rng.integers(2, 15, size=3_000).astype(float)),
    "many repeats": (np.round(rng.normal(0, 3, size=8_000), 1), np.round(rng.normal(0.3, 3, size=3_000), 1)),
    "zero inflated": (rng.normal(size=8_000) * (rng.random(8_000) > 0.6), rng.normal(size=3_000) * (rng.random(3_000) > 0.5)),
    "few rows": (rng.normal(size=30), rng.normal(size=12)),
}


def profiles(r: np.ndarray, c: np.ndarray, **options) -> tuple[Profile, Profile]:
    reference = Profile.of(pa.table({"x": r}), **options)
    return reference, Profile.of(pa.table({"x": c}), like=reference)


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def shares(column: NumberColumn, values: np.ndarray) -> np.ndarray:
    inner = [column.edges[c] for c in column.cuts]
    return np.histogram(values, [-np.inf, *inner, np.inf])[0] / len(values)


def test_psi_is_its_formula_on_the_raw_rows(pair):
    reference, current = profiles(*pair)
    r, c = (np.maximum(shares(reference.columns["x"], side), 1e-4 * (shares(reference.columns["x"], side) == 0)) for side in pair)
    both = (r > 1e-4) | (c > 1e-4)
    assert psi(reference, current)["x"] == pytest.approx(((c - r) * np.log(c / r))[both].sum(), rel=1e-12)
    swapped = Profile.of(pa.table({"x": pair[1]}), like=reference)
    assert psi(swapped, reference)["x"] == pytest.approx(psi(reference, swapped)["x"], rel=1e-12)
    assert psi(reference, reference)["x"] == 0.0


def test_psi_agrees_with_evidently_on_the_same_bins(pair):
    from evidently.legacy.calculations.stattests.psi import _psi
    from evidently.legacy.core import ColumnType

    r, c = pair
    if len(np.unique(r)) <= 20:
        options = {"categorical": ["x"]}
        c = c[np.isin(c, r)]  # Evidently gives each value that only the current data have a bin; a profile has one for them all.
    else:
        options = {"edges": {"x": np.histogram_bin_edges(np.concatenate((r, c)), bins="sturges")[1:-1]}}
    theirs, _ = _psi(pd.Series(r), pd.Series(c), ColumnType.Numerical, 0.1)
    ours = psi(*profiles(r, c, **options), epsilon=None)["x"]
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_psi_of_categories_agrees_with_evidently():
    from evidently.legacy.calculations.stattests.psi import _psi
    from evidently.legacy.core import ColumnType

    r, c = rng.choice(list("abcdefg"), 5_000, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.0499, 0.0001]), rng.choice(list("bcde"), 900)
    theirs, _ = _psi(pd.Series(r), pd.Series(c), ColumnType.Categorical, 0.1)
    assert psi(*profiles(r, c), epsilon=None)["x"] == pytest.approx(theirs, rel=1e-12)


def test_jensen_shannon_agrees_with_scipy(pair):
    reference, current = profiles(*pair)
    ours = [shares(reference.columns["x"], side) for side in pair]
    assert jensen_shannon(reference, current)["x"] == pytest.approx(distance.jensenshannon(*ours), abs=1e-8, rel=1e-10)
    assert jensen_shannon(reference, current, base=2)["x"] == pytest.approx(
        distance.jensenshannon(*ours, base=2), abs=1e-8, rel=1e-10
    )


def test_chi_square_agrees_with_scipy(pair):
    reference, current = profiles(*pair)
    table = np.stack([reference.columns["x"].bins(), current.columns["x"].bins()])
    theirs = stats.chi2_contingency(table[:, table.sum(axis=0) > 0], correction=False)
    ours = chi_square(reference, current)["x"]
    assert (ours.statistic, ours.degrees_of_freedom) == (pytest.approx(theirs.statistic, rel=1e-10), theirs.dof)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-300)


def test_kolmogorov_smirnov_encloses_that_of_the_raw_rows(pair):
    theirs = stats.ks_2samp(*pair, method="asymp").statistic
    ours = kolmogorov_smirnov(*profiles(*pair))["x"]
    assert ours.statistic - 1e-12 <= theirs <= ours.upper + 1e-12
    assert theirs - ours.statistic <= 0.011 or len(pair[0]) < 100
    n, m = map(len, pair)
    assert ours.p_value == pytest.approx(special.kolmogorov(math.sqrt(n * m / (n + m)) * ours.statistic), rel=1e-8, abs=1e-12)


def test_kolmogorov_smirnov_is_exact_for_few_values():
    r, c = rng.integers(0, 12, 8_000), rng.integers(1, 9, 3_000)
    ours = kolmogorov_smirnov(*profiles(r, c))["x"]
    assert ours.statistic == ours.upper == pytest.approx(stats.ks_2samp(r, c).statistic, rel=1e-12)


def test_wasserstein_encloses_that_of_the_raw_rows(pair):
    theirs = stats.wasserstein_distance(*pair)
    ours = wasserstein(*profiles(*pair))["x"]
    slack = 1e-9 * max(1.0, abs(pair[0]).max())
    assert ours.lower - slack <= theirs <= ours.upper + slack
    assert ours.lower - slack <= ours.value <= ours.upper + slack
    assert abs(ours.value - theirs) <= max(0.02 * theirs, 0.01 * pair[0].std())


def test_every_kth_row_gives_nearly_the_same_distances():
    r, c = rng.normal(size=200_000), rng.normal(0.2, 1.1, size=100_000)
    reference, current = profiles(r, c)
    part = Profile.of(pa.table({"x": c}), like=reference, cells_every=8)
    ours, whole = kolmogorov_smirnov(reference, part)["x"], kolmogorov_smirnov(reference, current)["x"]
    assert abs(ours.statistic - whole.statistic) <= 1.63 * math.sqrt(8 / 100_000)
    assert wasserstein(reference, part)["x"].value == pytest.approx(wasserstein(reference, current)["x"].value, rel=0.1)
    assert psi(reference, part) == psi(reference, current)


@pytest.mark.parametrize("name", ["shifted", "apart"])
def test_wasserstein_is_exact_where_the_functions_do_not_cross(name):
    ours = wasserstein(*profiles(*PAIRS[name]))["x"]
    assert ours.value == pytest.approx(stats.wasserstein_distance(*PAIRS[name]), rel=1e-3 if name == "shifted" else 1e-12)
    assert ours.upper - ours.lower < 0.01
    if name == "apart":
        assert ours.lower == ours.upper == ours.value


def test_normed_wasserstein_agrees_with_evidently():
    from evidently.legacy.calculations.stattests.wasserstein_distance_norm import _wasserstein_distance_norm
    from evidently.legacy.core import ColumnType

    r, c = PAIRS["shifted"]
    theirs, _ = _wasserstein_distance_norm(pd.Series(r), pd.Series(c), ColumnType.Numerical, 0.1)
    assert wasserstein(*profiles(r, c), normed=True)["x"].value == pytest.approx(theirs, rel=1e-3)


def test_statistics_of_merged_days_are_those_of_the_month():
    r, c = PAIRS["shifted"]
    reference, month = profiles(r, c)
    days = Profile.merge(Profile.of(pa.table({"x": part}), like=reference) for part in np.array_split(c, 30))
    for statistic in (psi, jensen_shannon, chi_square, kolmogorov_smirnov):
        assert statistic(reference, days) == statistic(reference, month)
    assert wasserstein(reference, days)["x"].value == pytest.approx(wasserstein(reference, month)["x"].value, rel=1e-12)


def test_distances_leave_out_text_missing_and_empty_sides():
    reference = Profile.of(pa.table({"x": [1.0, 2.0, None, math.inf], "s": list("abab"), "n": pa.nulls(4, pa.float64())}))
    current = Profile.of(pa.table({"x": [1.0, 3.0], "s": list("aa"), "n": [1.0, 2.0]}), like=reference)
    assert list(kolmogorov_smirnov(reference, current)) == ["x"]
    assert wasserstein(reference, current)["x"].value == pytest.approx(0.5)
    assert kolmogorov_smirnov(reference, current)["x"].statistic == pytest.approx(1 / 3)


@pytest.mark.parametrize("degrees", [1, 2, 9, 10, 30, 200])
def test_chi_square_distribution(degrees):
    for x in (1e-3, 0.5, degrees * 0.9, degrees * 1.1, degrees * 3.0, 700.0):
        assert drift_distributions.chi_square_tail(x, degrees) == pytest.approx(stats.chi2.sf(x, degrees), rel=1e-9, abs=1e-300)
    for tail in (0.5, 0.05, 1e-3, 1e-6):
        assert drift_distributions.chi_square_quantile(tail, degrees) == pytest.approx(stats.chi2.isf(tail, degrees), rel=1e-9)
    assert drift_distributions.chi_square_tail(5.0, 0) == 1.0


def test_kolmogorov_distribution():
    for x in (0.0, 0.1, 0.3, 0.5, 0.99, 1.0, 1.5, 3.0):
        assert drift_distributions.kolmogorov_tail(x) == pytest.approx(special.kolmogorov(x), rel=1e-10, abs=1e-13)
