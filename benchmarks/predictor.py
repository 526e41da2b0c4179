"""One-row predictions over HTTP: the predictor, as users run it, beside KServe's, MLServer's and MLflow's Python servers.

The same ONNX model (LightGBM, 100 trees, 12 features) in all, with one thread of ONNX Runtime.
Load generator: wrk, one thread, 16 connections, on the same machine. Validation, metrics and the inference log are on.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import _predictor_servers as servers
from benchmarks._predictor_load import Load, measure, wrk_or_exit
from benchmarks.measure import Measurement

RUNS = 5
COMMAND = "make benchmark ONLY=predictor"
LEAST_RATIO, LEAST_RATE, LEAST_P99_RATIO = 8.0, 12_000.0, 4.0


def run() -> Iterator[Measurement]:
    """Rates and 99th percentiles, medians of five runs in turn; peers whose environment is missing are left out with a word on stderr."""
    wrk_or_exit()
    with tempfile.TemporaryDirectory() as folder:
        model = servers.train(Path(folder))
        peers = [p for p in (servers.KSERVE, servers.MLSERVER, servers.MLFLOW) if p.available()]
        with servers.running(servers.OURS, model) as ours:
            for peer in peers:
                with servers.running(peer, model) as other:
                    yield from _compare(ours, other, peer)


def _compare(ours: servers.Running, other: servers.Running, peer: servers.Kind) -> Iterator[Measurement]:
    pairs: list[tuple[Load, Load]] = []
    for _ in range(RUNS):
        pairs.append((measure(ours.url, ours.body), measure(other.url, other.body)))
    rate, peer_rate = (statistics.median(loads[i].rate for loads in pairs) for i in (0, 1))
    p99, peer_p99 = (statistics.median(loads[i].p99_ms for loads in pairs) for i in (0, 1))
    wanted = f">= {LEAST_RATIO:g} x, >= {LEAST_RATE:g}/s" if peer is servers.KSERVE else f">= {LEAST_RATIO:g} x"
    met = rate / peer_rate >= LEAST_RATIO and (peer is not servers.KSERVE or rate >= LEAST_RATE)
    yield Measurement(f"predictor rate ({peer.name})", "1/s", rate, peer_rate, peer.title, rate / peer_rate, wanted, met, COMMAND)
    ratio = peer_p99 / p99
    yield Measurement(
        f"predictor P99 ({peer.name})",
        "ms",
        p99,
        peer_p99,
        peer.title,
        ratio,
        f">= {LEAST_P99_RATIO:g} x",
        ratio >= LEAST_P99_RATIO,
        COMMAND,
    )
