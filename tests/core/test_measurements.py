"""Counters become ticks: restarts, arms that could not be read, and what is refused."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from mlops_dagster.core.errors import DataError
from mlops_dagster.core.measurements import DEFAULT_BOUNDS_MS, Counters, Measurements, histogram, tick_seconds

T0 = datetime(2013, 3, 1, tzinfo=UTC)
TICK = timedelta(seconds=5)
BOUNDS = (10.0, 20.0, 50.0, 100.0)


def test_counters_of_a_server_that_began_anew() -> None:
    measurements = Measurements(BOUNDS).observe(T0, {"1": Counters(requests=100, errors=5)})
    measurements = measurements.observe(T0 + TICK, {"1": Counters(requests=150, errors=5)})
    measurements = measurements.observe(T0 + 2 * TICK, {"1": Counters(requests=30, errors=1)})
    assert [tick.arms["1"].requests for tick in measurements.ticks] == [50, 30]
    assert measurements.ticks[1].arms["1"].errors == 1
    assert Counters(requests=200, units=3).since(Counters(requests=100, units=10)) == Counters(requests=100, units=3)
    assert Counters(latency=(9, 1)).since(Counters(latency=(5, 2))) == Counters(latency=(9, 1))


def test_an_arm_that_could_not_be_read_is_caught_up_with() -> None:
    measurements = Measurements(BOUNDS).observe(T0, {"1": Counters(requests=100)})
    measurements = measurements.observe(T0 + TICK, {}).observe(
        T0 + 2 * TICK, {"1": Counters(requests=160), "2": Counters(requests=7)}
    )
    assert [dict(tick.arms) for tick in measurements.ticks] == [{}, {"1": Counters(requests=60), "2": Counters(requests=7)}]


def test_ticks_are_not_rewritten() -> None:
    first = Measurements(BOUNDS).observe(T0, {}).observe(T0 + TICK, {"1": Counters(requests=10)})
    assert first.observe(T0 + TICK, {"1": Counters(requests=12)}) == first
    later = first.observe(T0 + 2 * TICK, {"1": Counters(requests=12)})
    assert later.ticks[0] == first.ticks[0]
    assert Measurements.from_json(json.loads(json.dumps(later.to_json()))) == later


def test_measurements_kept_before_answers_were_counted_are_read() -> None:
    measured = Measurements(BOUNDS).observe(T0, {"1": Counters(requests=5)}).observe(T0 + TICK, {"1": Counters(requests=9)})
    raw = json.loads(json.dumps(measured.to_json()))
    assert "answers" not in raw["last"]["1"]
    later = Measurements.from_json(raw).observe(T0 + 2 * TICK, {"1": Counters(requests=12, answers=12, refused=1)})
    assert later.ticks[-1].arms["1"] == Counters(requests=3, answers=12, refused=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Counters(requests=-1), "counters.requests is -1"),
        (lambda: Counters(requests=1, errors=2), "counters.errors is 2, more than requests 1"),
        (lambda: Counters(answers=1, refused=2), "counters.refused is 2, more than answers 1"),
        (lambda: Counters(latency=(1, -1)), "counters.latency"),
        (lambda: Measurements(BOUNDS).observe(T0, {"1": Counters(latency=(1, 2))}), "latency has 2 buckets, not the 5"),
    ],
)
def test_wrong_counters_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_long_steps_have_longer_ticks() -> None:
    assert tick_seconds(None) == tick_seconds(3600.0) == 5.0
    assert 14 * 86_400 / tick_seconds(14 * 86_400.0) == pytest.approx(5000)


def test_histogram_puts_a_bound_into_its_own_bucket() -> None:
    assert histogram([0.4, 0.5, 0.6, 99_999], DEFAULT_BOUNDS_MS)[:2] == (2, 1)
    assert histogram([10, 10.1, 100, 100.1], BOUNDS) == (1, 1, 0, 1, 1)
