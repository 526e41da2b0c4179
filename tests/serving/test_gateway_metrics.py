"""Counters that only grow, whatever restarts between two looks."""

import datetime as dt
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_dagster.core.measurements import DEFAULT_BOUNDS_MS, Counters, Measurements
from mlops_dagster.resources.live_metrics.gateway import GatewayMetrics
from mlops_dagster.resources.live_metrics.samples import FINE_SECONDS, Raw, Samples
from mlops_dagster.resources.live_metrics.scrape import counters
from mlops_dagster.resources.serving.envoy_admin import Host

T0 = 1_700_000_000.0


def raw(requests: int, errors: int = 0, arm: str = "1", series: str = "requests m/1") -> Raw:
    return Raw(series, "m", arm, Counters(requests=requests, errors=errors))


def totals(samples: Samples) -> dict[str, int]:
    return {arm: counts.requests for arm, (_, counts) in samples.latest("m").items()}


def test_a_restart_adds_what_was_counted_since(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    for number, seen in enumerate((10, 25, 4, 9)):  # the third look is after a restart
        samples.add(T0 + number, [raw(seen)])
    assert totals(samples) == {"1": 25 + 9}


def test_a_series_that_vanished_and_came_back_counts_from_zero(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    samples.add(T0, [raw(10), raw(5, arm="2", series="requests m/2")])
    samples.add(T0 + 1, [raw(12)])
    samples.add(T0 + 2, [raw(12), raw(7, arm="2", series="requests m/2")])
    assert totals(samples) == {"1": 12, "2": 12}


def test_another_process_goes_on_where_the_last_one_was_killed(tmp_path: Path) -> None:
    Samples(tmp_path / "samples.db").add(T0, [raw(10)])
    Samples(tmp_path / "samples.db").add(T0 + 1, [raw(13)])
    assert totals(Samples(tmp_path / "samples.db")) == {"1": 13}


def test_measure_leaves_out_what_was_before(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    for number in range(10):
        samples.add(T0 + number, [raw(100 * (number + 1), number)])
    reading = GatewayMetrics(root=str(tmp_path)).measure("m", dt.datetime.fromtimestamp(T0 + 3.5, dt.UTC))
    assert reading.since == dt.datetime.fromtimestamp(T0 + 4, dt.UTC)
    assert (reading.arms["1"].requests, reading.arms["1"].errors) == (500, 5)


def test_an_idle_arm_takes_no_room_but_stays_fresh(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    for number in range(50):
        samples.add(T0 + number, [raw(10)])
    at, counts = samples.latest("m")["1"]
    assert (at.timestamp(), counts.requests) == (T0 + 49, 10)
    assert rows(samples) == 2


def test_old_samples_are_thinned_to_one_a_minute(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    for number in range(180):
        samples.add(T0 + number, [raw(number)])
    samples.add(T0 + 180 + 2 * FINE_SECONDS, [raw(1000)])
    assert rows(samples) == 5  # three whole minutes lie over four clock minutes, and the last one
    assert totals(samples) == {"1": 1000}


def rows(samples: Samples) -> int:
    with samples._open() as db:
        return db.execute("SELECT COUNT(*) FROM total").fetchone()[0]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=30))
def test_totals_equal_what_happened(tmp_path_factory, happened: list[tuple[bool, int]]) -> None:
    """Requests come, and now and then the server restarts with fewer than it had: nothing is counted twice or lost."""
    samples = Samples(tmp_path_factory.mktemp("samples") / "samples.db")
    counter = truth = 0
    for number, (restarts, more) in enumerate(happened):
        if restarts and more < counter:
            counter = 0
        counter, truth = counter + more, truth + more
        samples.add(T0 + number, [raw(counter)])
    assert totals(samples) == ({"1": truth} if happened else {})


class FakeEnvoy:
    """What Envoy's admin interface says, as values."""

    def hosts(self) -> dict[str, Host]:
        return {"m/1": Host("m/1", "127.0.0.1:1", True, False, 90, 10, 3)}

    def answers(self) -> dict[str, tuple[int, int]]:
        return {"m/1": (4, 1), "m/1|2": (30, 5), "http": (9, 9)}

    def latencies(self) -> dict[str, tuple[tuple[float, int], ...]]:
        bounds = [*DEFAULT_BOUNDS_MS, 1e7]
        return {
            "m/1": tuple((bound, 2) for bound in bounds),
            "m/1|2": tuple((bound, min(number, 5)) for number, bound in enumerate(bounds)),
            "m/2|1": tuple((bound, 0 if bound < 1e7 else 4) for bound in bounds),
        }


def test_series_of_clusters_become_counters_that_the_analysis_takes(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.db")
    samples.add(T0, counters(FakeEnvoy()))  # type: ignore[arg-type]
    seen = {arm: counts for arm, (_, counts) in samples.latest("m").items()}
    assert (seen["1"].requests, seen["1"].errors) == (100, 10)
    assert (seen["1"].answers, seen["1"].refused) == (34, 6)
    assert sum(seen["1"].latency) == 2 + 5
    assert seen["1"].latency[0] == 2
    assert seen["2"].latency[-1] == 4
    moment = dt.datetime.fromtimestamp(T0, dt.UTC)
    measured = Measurements().observe(moment, {}).observe(moment + dt.timedelta(seconds=5), seen)
    assert measured.ticks[0].arms == seen
