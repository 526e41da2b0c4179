"""`mlops trace` among 10 million logged predictions of 100 days, the whole process, beside DuckDB scanning the same Parquet files."""

import datetime as dt
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measure import Measurement, seconds
from mlops_dagster.core.ledger import APPROVAL, NewEntry
from mlops_dagster.core.routes import Routes
from mlops_dagster.lineage.request_search import store_index
from mlops_dagster.lineage.training_record import FeatureView, TrainingRecord, store
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.ledger.sql import SqlLedger

MODEL, DAYS, A_DAY, RUNS, FEATURES = "busy", 100, 100_000, 5, 10
FIRST = dt.date(2024, 1, 1)
SCAN = """
import sys, duckdb
sql = "SELECT * FROM read_parquet($files, hive_partitioning = false) WHERE request_id = $id"
print(duckdb.execute(sql, {"files": sys.argv[1], "id": sys.argv[2]}).fetchall())
"""


def run() -> Iterator[Measurement]:
    """Three rows: a trace beside the scan, a trace of an id that was never logged, and making the 100 indexes."""
    with tempfile.TemporaryDirectory() as folder:
        root, lake = Path(folder), FolderLake(root=f"{folder}/lake")
        random = np.random.default_rng(5)
        making, asked = 0.0, []
        for number in range(DAYS):
            day = FIRST + dt.timedelta(days=number)
            rows = logged(random, day)
            lake.write(f"{MODEL}/inference_log/{day}.parquet", rows)
            making += seconds(_indexing(lake, day, rows))
            asked.append(rows["request_id"][int(random.integers(A_DAY))].as_py())
        decided(root, lake)
        ids = [asked[i * DAYS // (RUNS + 1)] for i in range(RUNS + 1)]
        files = f"{lake.root}/{MODEL}/inference_log/*.parquet"
        pairs = [(_trace(root, one), _command(["-c", SCAN, files, one], root)) for one in ids][1:]
        ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        absent = statistics.median(_trace(root, str(uuid.uuid4()), code=1) for _ in range(RUNS))
    command = "make benchmark ONLY=trace"
    name, scan = "trace, 10,000,000 predictions", "DuckDB scan"
    yield Measurement(name, "s", ours, peer, scan, peer / ours, "< 1 s", ours < 1, command)
    yield Measurement(f"{name}, unknown id", "s", absent, None, None, None, "< 1 s", absent < 1, command)
    yield Measurement("trace, making the indexes", "s", making, None, None, None, "<= 10 s", making <= 10, command)


def logged(random: np.random.Generator, day: dt.date) -> pa.Table:
    """A day of the inference log with random request ids."""
    raw = random.bytes(16 * A_DAY)
    ids = [str(uuid.UUID(bytes=raw[at : at + 16])) for at in range(0, len(raw), 16)]
    begin = np.datetime64(day.isoformat(), "us")
    moments = pa.array(np.sort(begin + random.integers(0, 86_400_000_000, A_DAY).astype("timedelta64[us]"))).cast(
        pa.timestamp("us", "UTC")
    )
    features = {f"feature_{i}": random.normal(size=A_DAY) for i in range(FEATURES)}
    return pa.table(
        {
            "request_id": ids,
            "row_id": [f"{day}-{i}" for i in range(A_DAY)],
            "logged_at": moments,
            "event_timestamp": moments,
            **{
                name: pa.repeat(value, A_DAY)
                for name, value in (("model", MODEL), ("version", "1"), ("arm", "1"), ("shadow", False))
            },
            "features": pa.StructArray.from_arrays([pa.array(v) for v in features.values()], names=list(features)),
            "prediction": random.integers(0, 2, A_DAY).astype(float),
            "prediction_label": pa.nulls(A_DAY, pa.string()),
            "score": random.uniform(size=A_DAY),
            "latency_ms": random.gamma(2, 1, A_DAY),
        }
    )


def decided(root: Path, lake: FolderLake) -> None:
    """The ledger of a version that was approved and deployed before the first day, and the record of its training set."""
    before, at = [str(FIRST - dt.timedelta(days=n)) for n in range(60, 0, -1)], dt.datetime(2023, 12, 31, tzinfo=dt.UTC)
    raw = {f"{MODEL}/raw_data/rows/{day}.parquet": f"{n:032x}" for n, day in enumerate(before)}
    record = TrainingRecord("0" * 64, "", before, 14, ["rows"], raw, {"view": FeatureView("0" * 64, "0" * 64, 60)})
    evidence: dict[str, Any] = {"metrics": {"accuracy": 0.9}, "artifact": "0" * 64, "training_set": "0" * 64}
    evidence |= {"inputs": store(lake, MODEL, record), "first_day": before[0], "last_day": before[-1]}
    ledger = SqlLedger(f"sqlite:///{root / 'ledger.db'}")
    ledger.append(NewEntry(APPROVAL, MODEL, "1", "somebody", at, "seen", evidence, "approval"))
    routes = {"routes": Routes.all_to("1").to_json()}
    ledger.append(NewEntry("promotion", MODEL, "1", "rollout", at, "start: passed", routes, "promotion"))
    ledger.close()


def _indexing(lake: FolderLake, day: dt.date, rows: pa.Table) -> Callable[[], None]:
    return lambda: store_index(lake, MODEL, day.isoformat(), rows, dt.datetime.now(dt.UTC))


def _trace(root: Path, request_id: str, code: int = 0) -> float:
    return _command(["-m", "mlops_dagster.cli", "trace", request_id, "--json"], root, code)


def _command(arguments: list[str], root: Path, code: int = 0) -> float:
    """Seconds of a whole Python process. Raises RuntimeError where it ends otherwise than it should."""
    environment = {**os.environ, "MLOPS_HOME": str(root)}
    ended: list[Any] = []
    taken = seconds(
        lambda: ended.append(subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True))
    )
    if ended[0].returncode != code:
        raise RuntimeError(f"{arguments} ended with {ended[0].returncode}: {ended[0].stderr[-2000:]}")
    return taken
