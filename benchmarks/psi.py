"""PSI of large tables: beside Evidently, beside a mere read of Parquet, and how it grows with rows and columns.

Ours is what users run: `Profile.of` of pandas frames (missing values, moments and cell sums included), then `psi` of all columns.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks._psi_data import frame, parquet
from benchmarks._psi_evidently import drift_report
from benchmarks.measure import Measurement, faster, paired, seconds
from mlops_dagster.core.drift import Profile, psi
from mlops_dagster.resources.drift_reports.profiles import profile_parquet

ROWS, COLUMNS = 1_000_000, 20
COMMAND = "make benchmark ONLY=psi"


def run() -> Iterator[Measurement]:
    yield from growth()
    yield from from_parquet()
    yield from beside_evidently()


def beside_evidently() -> Iterator[Measurement]:
    """Both of ours in turn with the peer, five times; the peer's time is that of its runs together."""
    reference, current = frame(ROWS, COLUMNS, seed=1), frame(ROWS, COLUMNS, seed=2, shift=0.1)
    stored = Profile.of(reference)
    work: dict[str, Callable[[], object]] = {
        "stored": lambda: psi(stored, Profile.of(current, like=stored)),
        "whole": lambda: psi(fresh := Profile.of(reference), Profile.of(current, like=fresh)),
        "peer": lambda: drift_report(reference, current),
    }
    for warm_up in ("stored", "whole"):
        work[warm_up]()
    drift_report(reference.head(1_000), current.head(1_000))
    times = [{name: seconds(task) for name, task in work.items()} for _ in range(5)]
    stored_time, whole, peer = (statistics.median(t[name] for t in times) for name in ("stored", "whole", "peer"))
    label = "Evidently DataDriftPreset(psi)"
    yield _row(faster("PSI 1M x 20, stored reference", stored_time, peer, label, 300))
    yield _row(faster("PSI 1M x 20, both sides", whole, peer, label, 90))


def from_parquet() -> Iterator[Measurement]:
    """10 million rows x 50 columns against nothing but reading them, in batches and in bounded memory as ours does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        parquet(path, 10_000_000, 50)
        reference = profile_parquet(str(path))
        cases = (
            ("like a reference", lambda: profile_parquet(str(path), like=reference)),
            ("cells too", lambda: profile_parquet(str(path))),
        )
        for name, ours in cases:
            mine, peer = paired(ours, lambda: _read(path), warm_up=False)
            yield _row(faster(f"Parquet 10M x 50, {name}", mine, peer, "pyarrow iter_batches, read only", 0.5))


def _read(path: Path) -> int:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        return sum(batch.num_rows for batch in file.iter_batches(131_072))


def growth() -> Iterator[Measurement]:
    """300,000 rows x 1,000 columns within a minute, and seconds per million values on the way there."""
    whole = frame(300_000, 1_000, seed=4)
    print("rows x columns     seconds   seconds per million values", file=sys.stderr)
    rates = []
    for rows, columns in (
        (300_000, 125),
        (300_000, 250),
        (300_000, 500),
        (37_500, 1_000),
        (75_000, 1_000),
        (150_000, 1_000),
        (300_000, 1_000),
    ):
        part = whole.iloc[:rows, :columns]
        took = statistics.median(seconds(lambda part=part: _both(part)) for _ in range(5))
        rates.append(took / rows / columns * 1e6)
        print(f"{rows:7} x {columns:5} {took:11.3f} {rates[-1]:12.4f}", file=sys.stderr, flush=True)
    yield Measurement("PSI 300,000 x 1,000, both sides", "s", took, None, None, None, "<= 60 s", took <= 60, COMMAND)
    steepest = rates[-1] / min(rates)
    yield Measurement("its growth, per value", "x least", steepest, None, None, None, "<= 1.5 x", steepest <= 1.5, COMMAND)


def _both(table: object) -> dict[str, float | None]:
    reference = Profile.of(table)
    return psi(reference, Profile.of(table, like=reference))


def _row(measured: Measurement) -> Measurement:
    return Measurement(**{**measured.as_row(), "command": COMMAND})
