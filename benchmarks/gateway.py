"""One-row predictions through the gateway with a 90/10 split, beside the same predictor asked directly.

The load generator (wrk: one thread; 16 connections, 64 connections, and one connection for latency), Envoy and the predictors share the
machine.
Health checks, retries, outlier ejection, the access log, metrics and the inference log are on, as users run it.
"""

import statistics
from collections.abc import Iterator

from benchmarks._gateway_hosts import Two, two_versions
from benchmarks._predictor_load import Load, measure, wrk_or_exit
from benchmarks._predictor_servers import V1_BODY
from benchmarks.measure import Measurement
from mlops_dagster.core.routes import Routes

RUNS = 5
SECONDS = 4
LEAST_SHARE = 0.5
COMMAND = "make benchmark ONLY=gateway"


def run() -> Iterator[Measurement]:
    """Rate through the gateway as a share of the direct rate, with one and two Envoy threads, and the latency that it adds."""
    wrk_or_exit()
    for concurrency in (1, 2):
        with two_versions(Routes.split({"1": 90, "2": 10}), concurrency=concurrency) as two:
            threads = f"{concurrency} Envoy thread{'s' if concurrency > 1 else ''}"
            for connections in (16, 64):
                yield from _rate(two, connections, f"{connections} connections, {threads}", concurrency == 1)
            yield _added(_in_turn(two, 1), f"1 connection, {threads}")


def _rate(two: Two, connections: int, label: str, has_goal: bool) -> Iterator[Measurement]:
    pairs = _in_turn(two, connections)
    rate, direct = (statistics.median(pair[i].rate for pair in pairs) for i in (0, 1))
    share = statistics.median(through.rate / alone.rate for through, alone in pairs)
    goal = f">= {LEAST_SHARE:.0%} of direct" if has_goal else "stated"
    met = share >= LEAST_SHARE or not has_goal
    yield Measurement(f"gateway rate ({label})", "1/s", rate, direct, "predictor, direct", share, goal, met, COMMAND)
    yield _added(pairs, label)


def _added(pairs: list[tuple[Load, Load]], label: str) -> Measurement:
    added = statistics.median(through.p99_ms - alone.p99_ms for through, alone in pairs)
    return Measurement(f"gateway added P99 ({label})", "ms", added, None, None, None, "stated", True, COMMAND)


def _in_turn(two: Two, connections: int) -> list[tuple[Load, Load]]:
    """Through the gateway and direct, in turn."""
    pairs = []
    for _ in range(RUNS):
        through = measure(two.url, V1_BODY, SECONDS, connections)
        pairs.append((through, measure(two.direct_url, V1_BODY, SECONDS, connections)))
    return pairs
