"""Which values count as one, at the ends of what a float holds, and in profiles that were stored earlier."""

import datetime as dt
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from mlops_dagster.core.drift import CategoryColumn, DriftOutcome, Profile, drifted, jensen_shannon, kolmogorov_smirnov, psi

rng = np.random.default_rng(21)
TENTHS = rng.choice([0.1, 0.2, 0.3, 0.7], 5_000)
COLUMNS = {
    "few values": TENTHS,
    "one value": np.full(2_000, 0.1),
    "rounded": np.round(rng.normal(size=5_000), 2),
    "spike": np.where(rng.random(5_000) < 0.6, 0.3, rng.normal(size=5_000)),
    "small spike": np.where(rng.random(5_000) < 0.15, 0.7, rng.normal(size=5_000)),
    "continuous": rng.normal(size=5_000),
    "powers of two": rng.choice([0.25, 0.5, 0.0, -1.0], 2_000),
}


def profiled(values, like: Profile | None = None, **options) -> Profile:
    return Profile.of(pa.table({"x": values}), like=like, **options)


@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
def test_a_copy_in_float32_is_no_drift_and_neither_is_one_in_float64(values):
    for stored, given in ((values, values.astype(np.float32)), (values.astype(np.float32), values)):
        reference = profiled(stored)
        current = profiled(given, reference)
        # Without repeated values, the one that an edge is made of may still change sides.
        assert psi(reference, current)["x"] == pytest.approx(0.0, abs=1e-5)
        assert kolmogorov_smirnov(reference, current)["x"].statistic < 0.001


def test_products_that_are_equal_but_for_rounding_are_one_value():
    thirds = rng.choice([3, 6, 7], 5_000)
    reference = profiled(thirds / 10)
    assert psi(reference, profiled(thirds * 0.1, reference))["x"] == 0.0
    both = profiled(np.concatenate((thirds / 10, thirds * 0.1)))
    assert sorted(both.columns["x"].bins())[-3:] == sorted(2 * np.bincount(thirds)[[3, 6, 7]])


def test_values_that_differ_by_more_are_still_others():
    reference = profiled(TENTHS)
    for other in (0.1 * (1 + 1e-6), 0.15, 0.0):
        assert psi(reference, profiled(np.where(TENTHS == 0.1, other, TENTHS), reference))["x"] > 1, other


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (1_700_000_000_001, 1_700_000_000_002),
        (16_777_217, 16_777_216),
        (2**62, 2**62 + 1024),
        (1e-300, 2e-300),
        (1e300, 1.001e300),
    ],
)
def test_what_float32_does_not_hold_apart_is_one_float64(first, other):
    reference = profiled(np.full(1_000, first))
    assert psi(reference, profiled(np.full(500, other), reference))["x"] > 10


def test_a_column_with_finer_steps_than_float32_keeps_them():
    fine = 1e9 + rng.integers(0, 12, 4_000) / 8
    reference = profiled(fine)
    shifted = profiled(fine + 0.25, reference)
    assert psi(reference, shifted)["x"] > 0.3
    assert kolmogorov_smirnov(reference, shifted)["x"].statistic == pytest.approx(stats.ks_2samp(fine, fine + 0.25).statistic)


def test_the_distance_of_few_fractions_is_that_of_the_raw_rows():
    r, c = rng.integers(0, 12, 8_000) / 10, rng.integers(1, 14, 3_000) / 10
    reference = profiled(r)
    found = kolmogorov_smirnov(reference, profiled(c, reference))["x"]
    assert found.statistic == found.upper == pytest.approx(stats.ks_2samp(r, c).statistic, rel=1e-12)


def test_a_profile_stored_with_one_float_wide_bins_is_read_and_compared():
    values = np.array([0.1, 0.2, 0.3])
    edges = np.union1d(values, np.nextafter(values, 1.0)).tolist()
    empty = profiled([0.5]).columns["x"].empty("number", edges, range(len(edges)))
    stored = Profile.from_json(Profile(0, {"x": empty}).to_json())
    reference = profiled(rng.choice(values, 3_000), stored)
    current = profiled(rng.choice(values, 2_000), reference)
    assert psi(reference, current)["x"] < 0.01
    distance = kolmogorov_smirnov(reference, current)["x"]
    assert distance.statistic == distance.upper


def test_only_infinities_are_nothing_like_numbers():
    reference = profiled([math.inf] * 300 + [-math.inf] * 200)
    assert reference.columns["x"].bins().tolist() == [200, 0, 300, 0]
    assert drifted(reference, profiled(rng.normal(size=500), reference)).outcome is DriftOutcome.FAIL
    assert psi(reference, profiled([math.inf] * 30 + [-math.inf] * 20, reference)) == {"x": 0.0}
    assert Profile.from_json(reference.to_json()) == reference


@pytest.mark.parametrize("every", [1, 4])
def test_sums_beyond_the_greatest_float_leave_the_mean_known(every):
    values = np.array([1e308, -1e308, 1e308, 1e308] * 50)
    profile = profiled(values, cells_every=every)
    for one in (profile, profile + profile, profiled(np.full(9, -1.7e308), profile) + profiled(np.full(9, 1.7e308), profile)):
        assert Profile.from_json(one.to_json()) == one
    assert profile.columns["x"].moments.mean == pytest.approx(5e307)
    assert (profile + profile).columns["x"].moments.mean == pytest.approx(5e307)


def test_a_side_without_rows_has_no_distance_and_the_answer_is_json():
    reference = profiled(TENTHS)
    for found in (psi(reference, reference.emptied()), jensen_shannon(reference.emptied(), reference)):
        assert json.dumps(found, allow_nan=False) == '{"x": null}'


MOMENTS = [dt.datetime(2020, 1, 1, 5 * (k % 3), 10) + dt.timedelta(milliseconds=100 * (k % 2)) for k in range(600)]
TYPES = [pa.timestamp(unit, zone) for unit in ("ms", "us", "ns") for zone in (None, "UTC", "America/New_York")]


@pytest.mark.parametrize("stored", TYPES, ids=str)
def test_moments_declared_categorical_are_one_category_in_any_unit_and_zone(stored):
    reference = profiled(pa.array(MOMENTS, stored), categorical=["x"])
    written = reference.columns["x"].categories
    assert set(written) == {str(m).rstrip("0") if m.microsecond else str(m) for m in MOMENTS}
    # Profiles that were stored earlier have the text of their own unit and zone.
    texts = {text: str(pa.array([dt.datetime.fromisoformat(text)], stored).cast(pa.string())[0]) for text in written}
    before = replace(reference.columns["x"], categories=tuple(texts[text] for text in written))
    earlier = Profile.from_json(Profile(reference.rows, {"x": before}).to_json())
    for type_ in TYPES:
        for known in (reference, earlier):
            assert psi(known, profiled(pa.array(MOMENTS, type_), known)) == {"x": 0.0}, type_
            late = pa.array([m + dt.timedelta(microseconds=1000) for m in MOMENTS], type_)
            assert profiled(late, known).columns["x"].unlisted == len(MOMENTS), type_


def test_days_declared_categorical_are_their_midnights():
    days = [dt.date(2020, 1, 1 + k % 3) for k in range(90)]
    midnights = pa.array([dt.datetime.combine(day, dt.time()) for day in days], pa.timestamp("s"))
    earlier = Profile(90, {"x": CategoryColumn("category", ("2020-01-01", "2020-01-02", "2020-01-03"), 20, (30, 30, 30))})
    for type_ in (pa.date32(), pa.date64()):
        reference = profiled(pa.array(days, type_), categorical=["x"])
        for known in (reference, earlier):
            assert psi(known, profiled(midnights, known)) == psi(known, profiled(pa.array(days, type_), known)) == {"x": 0.0}
    coded = pa.array(days, pa.date32()).dictionary_encode()
    assert psi(earlier, profiled(coded, earlier)) == {"x": 0.0}
