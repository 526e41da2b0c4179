"""Expectations learned from a reference profile: what is outside is named with its share and examples, what is usual passes."""

import datetime as dt
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_dagster.core.drift import Profile
from mlops_dagster.core.expectations import departures, learned

REFERENCE = pl.DataFrame(
    {
        "delay": [0.0, 10.0, 20.0, None] * 25,
        "carrier": ["AA", "UA", "DL", None] * 25,
        "cancelled": [False] * 100,
        "seen": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)] * 100,
        "constant": [5] * 100,
    }
)
EXPECTED = learned(Profile.of(REFERENCE))


def day(**columns):
    return REFERENCE.with_columns(**{name: pl.Series(values, dtype=REFERENCE[name].dtype) for name, values in columns.items()})


def test_the_reference_itself_is_as_expected():
    assert departures(EXPECTED, REFERENCE) == []


def test_numbers_beyond_range_and_slack_are_named_with_share_and_examples():
    values = [0.0, 10.0, 20.0, None] * 25
    assert departures(EXPECTED, day(delay=[22.0, -2.0, *values[2:]])) == []  # the slack is a tenth of 20
    assert departures(EXPECTED, day(delay=[22.1, *values[1:]])) == []  # one of a hundred is still within 1 %
    (found,) = departures(EXPECTED, day(delay=[99.0, -50.0, *values[2:]]))
    assert (found.column, found.outside_share, found.examples) == ("delay", 0.02, ("99.0", "-50.0"))
    assert found.reason == "delay: 2.0% of the rows are not in [-2, 22] (such as 99.0, -50.0)"


def test_unknown_categories_are_named_and_true_is_one_where_only_false_was_seen():
    found = departures(EXPECTED, day(carrier=["ZZ"] * 50 + ["AA"] * 50, cancelled=[True] * 3 + [False] * 97))
    assert [(d.column, d.outside_share, d.examples) for d in found] == [("carrier", 0.5, ("ZZ",)), ("cancelled", 0.03, ("True",))]


def test_more_missing_than_the_reference_had_is_a_departure_and_less_is_none():
    assert departures(EXPECTED, day(delay=[None] * 30 + [1.0] * 70)) == []
    (found,) = departures(EXPECTED, day(delay=[None] * 31 + [float("nan")] * 5 + [1.0] * 64))
    assert found.reason == "delay: 36.0% missing, 25.0% in the reference"
    assert departures(EXPECTED, day(delay=[1.0] * 100)) == []


def test_moments_pass_and_a_constant_may_vary_by_the_slack_of_itself():
    later = [dt.datetime(2030, 1, 1, tzinfo=dt.UTC)] * 100
    assert departures(EXPECTED, day(seen=later, constant=[5] * 100)) == []
    assert [d.column for d in departures(EXPECTED, day(constant=[6] * 100))] == ["constant"]


def test_another_kind_and_unprofiled_columns_and_no_rows():
    (found,) = departures(EXPECTED, REFERENCE.with_columns(delay=pl.lit("late"), new=pl.lit(1)))
    assert found.reason == "delay is text, in the reference it was number"
    assert departures(EXPECTED, REFERENCE.head(0)) == []
    assert departures(EXPECTED, REFERENCE.with_columns(carrier=pl.lit(None)).select("carrier"), missing_slack=1) == []


def test_infinite_where_the_reference_had_it_and_too_many_categories_to_know():
    reference = pl.DataFrame({"x": [1.0, float("inf")], "y": [1.0, 2.0]})
    expected = learned(Profile.of(reference))
    infinite = pl.DataFrame({"x": [float("inf"), float("-inf")], "y": [float("inf"), 1.0]})
    assert [(d.column, d.examples) for d in departures(expected, infinite)] == [("x", ("-inf",)), ("y", ("inf",))]
    names = pl.DataFrame({"name": [f"n{i}" for i in range(1_500)]})
    assert departures(learned(Profile.of(names)), pl.DataFrame({"name": ["unseen"]})) == []


def test_what_is_learned_is_the_same_from_the_stored_profile():
    stored = Profile.from_dict(json.loads(Profile.of(REFERENCE).to_json()))
    assert learned(stored) == EXPECTED


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=40).filter(lambda v: any(x is not None for x in v))
)
def test_no_sample_of_the_reference_is_outside_its_range(values):
    reference = pl.DataFrame({"x": pl.Series(values, dtype=pl.Float64)})
    expected = learned(Profile.of(reference), range_slack=0.0)
    for part in (reference.head(1), reference.tail(3), reference):
        assert departures(expected, part, max_outside_share=0.0, missing_slack=1.0) == []


@pytest.mark.parametrize("slack", [0.0, 0.5, 2.0])
def test_the_slack_is_a_share_of_the_width(slack):
    expectation = learned(Profile.of(REFERENCE), slack)["delay"]
    assert (expectation.least, expectation.greatest) == (-20 * slack, 20 + 20 * slack)
