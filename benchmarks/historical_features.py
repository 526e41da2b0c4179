"""Point-in-time joins through Feast: our offline store beside Feast's own, and beside the bare ASOF joins of DuckDB and Polars.

Both sides run in processes of their own, in turn, each once to warm up; times are from `get_historical_features` to the pandas frame.
Memory is the peak beyond what the process held before its first run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._historical_data import Case, write_views
from benchmarks.measure import Measurement, faster

COMMAND = "make benchmark ONLY=historical_features"
SMALL, LARGE = Case(300_000, 300_000, 2, 10), Case(1_000_000, 1_000_000, 2, 10)
WIDE, HUGE = Case(17_000, 17_000, 10, 100), Case(10_000_000, 10_000_000, 1, 10)
GIB = 2**30


@dataclass
class Worker:
    """A process that repeats one retrieval on demand."""

    kind: str
    case: Case
    folder: Path
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "Worker":
        command = [sys.executable, "-m", "benchmarks._historical_worker", self.kind, self.case.name, str(self.folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )
        return self

    def run(self) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the benchmark's worker for {self.kind} on {self.case.name} ended with code {self._process.wait()}"
            )
        self.runs.append(json.loads(line))
        return self.runs[-1]

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    @property
    def seconds(self) -> float:
        return statistics.median(r["seconds"] for r in self.runs)

    def peak(self, kind: str = "extra_bytes") -> float:
        return max(r[kind] for r in self.runs)


def in_turn(case: Case, kinds: list[str], folder: Path, runs: int) -> list[Worker]:
    """The workers after `runs` runs of each, in turn; the first run of each, which warms it up, counts for memory only."""
    write_views(case, folder)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(kind, case, folder)) for kind in kinds]
        first = [worker.run() for worker in workers]
        for worker in workers:
            worker.runs.clear()
        for _ in range(runs):
            for worker in workers:
                worker.run()
    for worker, warm in zip(workers, first, strict=True):
        worker.runs = [{**r, "extra_bytes": max(r["extra_bytes"], warm["extra_bytes"])} for r in worker.runs]
    return workers


def against(case: Case, label: str, peer: str, at_least: float, folder: Path, runs: int = 5) -> Iterator[Measurement]:
    ours, theirs = in_turn(case, ["asof", peer], folder, runs)
    yield faster(f"history {label} {peer}", ours.seconds, theirs.seconds, f"Feast {peer}", at_least)
    kept = int(ours.runs[-1]["rows"])
    lost = f"Feast {peer} ({theirs.runs[-1]['rows']} rows)"
    yield Measurement(
        f"history {label} rows",
        "rows",
        kept,
        theirs.runs[-1]["rows"],
        lost,
        None,
        f"{case.entities}",
        kept == case.entities,
        COMMAND,
    )
    mine, peak = ours.peak() / 2**20, theirs.peak() / 2**20
    yield Measurement(
        f"history {label} memory {peer}", "MiB", mine, peak, f"Feast {peer}", peak / mine, ">= 10 x", peak / mine >= 10, COMMAND
    )


def bare(case: Case, label: str, folder: Path) -> Iterator[Measurement]:
    """Through Feast, TTL and ties included, at most twice the time of the better bare join."""
    ours, duckdb, polars = in_turn(case, ["asof-arrow", "plain-duckdb", "plain-polars"], folder, 5)
    better = min(duckdb, polars, key=lambda w: w.seconds)
    yield faster(f"history {label} bare join", ours.seconds, better.seconds, f"{better.kind} ASOF join", 0.5)


def alone(
    case: Case, label: str, seconds: float | None, gib: float, folder: Path, kind: str = "asof", runs: int = 3
) -> Iterator[Measurement]:
    (ours,) = in_turn(case, [kind], folder, runs)
    goal = f"<= {seconds:g} s" if seconds else "finishes"
    yield Measurement(
        f"history {label}", "s", ours.seconds, None, None, None, goal, seconds is None or ours.seconds <= seconds, COMMAND
    )
    peak = ours.peak("bytes") / GIB
    yield Measurement(f"history {label} memory", "GiB", peak, None, None, None, f"<= {gib:g} GiB", peak <= gib, COMMAND)


def run() -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from bare(SMALL, "300k", folder)
        yield from bare(LARGE, "1M", folder)
        yield from against(SMALL, "300k", "duckdb", 18, folder)
        yield from against(SMALL, "300k", "dask", 80, folder)
        yield from alone(WIDE, "17k x 1,000 features", 10, 2, folder)
        yield from alone(HUGE, "10M x 10M", None, 8, folder, runs=1)
        yield from against(LARGE, "1M", "duckdb", 80, folder, runs=3)
