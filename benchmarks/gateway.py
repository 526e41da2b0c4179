"""One-row predictions through the gateway with a 90/10 split, beside the same predictor asked directly.

The load generator (wrk: one thread, 16 connections; for latency one connection), Envoy and the predictors share the machine.
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
            yield from _compare(two, concurrency)


def _compare(two: Two, concurrency: int) -> Iterator[Measurement]:
    busy, calm = _in_turn(two, connections=16), _in_turn(two, connections=1)
    rate, direct = (statistics.median(pair[i].rate for pair in busy) for i in (0, 1))
    share = statistics.median(through.rate / alone.rate for through, alone in busy)
    threads = f"{concurrency} Envoy thread{'s' if concurrency > 1 else ''}"
    goal = f">= {LEAST_SHARE:.0%} of direct" if concurrency == 1 else "stated"
    met = share >= LEAST_SHARE or concurrency != 1
    yield Measurement(f"gateway rate ({threads})", "1/s", rate, direct, "predictor, direct", share, goal, met, COMMAND)
    for name, pairs in (("busy", busy), ("calm", calm)):
        added = statistics.median(through.p99_ms - alone.p99_ms for through, alone in pairs)
        label = f"gateway added P99, {name} ({threads})"
        yield Measurement(label, "ms", added, None, None, None, "stated", True, COMMAND)


def _in_turn(two: Two, connections: int) -> list[tuple[Load, Load]]:
    """Through the gateway and direct, in turn."""
    pairs = []
    for _ in range(RUNS):
        through = measure(two.url, V1_BODY, SECONDS, connections)
        pairs.append((through, measure(two.direct_url, V1_BODY, SECONDS, connections)))
    return pairs
