"""What a benchmark returns, and how one is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """One row of `benchmarks/results.json`.

    `ratio` says how many times better ours is than the peer (time: peer / ours; throughput: ours / peer); `goal` is the least ratio wanted
    (or, where `peer` is None, a limit on `ours` that `met` was judged by).
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    ratio: float | None
    goal: str
    met: bool
    command: str

    def as_row(self) -> dict[str, object]:
        return asdict(self)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call of `work` takes, in seconds."""
    begin = clock()
    work()
    return clock() - begin


def paired(ours: Callable[[], object], peer: Callable[[], object], runs: int = 5, warm_up: bool = True) -> tuple[float, float]:
    """Median seconds of both, run in turn (ours, peer, ours, peer …) so that drifting machine speed touches both alike."""
    if warm_up:
        ours()
        peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(runs)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def faster(name: str, ours: float, peer: float, peer_name: str, at_least: float, unit: str = "s") -> Measurement:
    """A row for two durations (smaller is better) and the least ratio peer / ours that is wanted."""
    ratio = peer / ours
    return Measurement(
        name, unit, ours, peer, peer_name, ratio, f">= {at_least:g} x", ratio >= at_least, f"make benchmark ONLY={name}"
    )
