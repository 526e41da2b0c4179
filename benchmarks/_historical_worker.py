"""One retrieval, again and again, in a process of its own: `python -m benchmarks._historical_worker KIND CASE FOLDER`.

Each line on standard input runs it once and answers with a line of JSON: seconds, rows, and the peak of memory so far beyond what the
process held before its first run (its imports, the feature repository and the entity rows), and in all, in bytes.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks._historical_data import Case, entity_frame, write_views

ASOF = "mlops_dagster.resources.feature_store.asof.AsofOfflineStore"
TTL = timedelta(days=7)


def retrieval(kind: str, case: Case, folder: Path) -> Callable[[], Any]:
    """What is measured: Feast with the given offline store, to pandas; or the bare ASOF joins of DuckDB and Polars, to Arrow."""
    paths, entities = write_views(case, folder), entity_frame(case)
    if kind == "plain-duckdb":
        return lambda: plain_duckdb(paths, entities)
    if kind == "plain-polars":
        return lambda: plain_polars(paths, entities)
    store, features = feast_store(kind, case, paths)
    answer = "to_arrow" if kind == "asof-arrow" else "to_df"
    return lambda: getattr(store.get_historical_features(entity_df=entities, features=features), answer)()


def feast_store(kind: str, case: Case, paths: list[Path]) -> tuple[Any, list[str]]:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64

    state = Path(tempfile.mkdtemp())
    config = RepoConfig(
        project="benchmark",
        provider="local",
        registry=str(state / "registry.db"),
        online_store={"type": "sqlite", "path": str(state / "online.db")},
        offline_store={"type": ASOF if kind.startswith("asof") else kind},
        entity_key_serialization_version=3,
    )
    driver = Entity(name="driver", join_keys=["driver"], value_type=ValueType.INT64)
    views = [
        FeatureView(
            name=f"view{v}",
            entities=[driver],
            ttl=TTL,
            schema=[Field(name=f"f{v}_{i}", dtype=Float64) for i in range(case.features)],
            source=FileSource(path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created"),
        )
        for v, path in enumerate(paths)
    ]
    store = FeatureStore(config=config)
    store.apply([driver, *views])
    return store, [f"view{v}:f{v}_{i}" for v in range(case.views) for i in range(case.features)]


def plain_duckdb(paths: list[Path], entities: Any) -> Any:
    import duckdb

    joins, columns = "", "entities.*"
    for v, path in enumerate(paths):
        columns += f", v{v}.* EXCLUDE (driver, event_timestamp, created)"
        joins += (
            f" ASOF LEFT JOIN '{path}' v{v} ON entities.driver = v{v}.driver AND entities.event_timestamp >= v{v}.event_timestamp"
        )
    with duckdb.connect() as connection:
        connection.register("entities", entities)
        return connection.sql(f"SELECT {columns} FROM entities{joins}").to_arrow_table()


def plain_polars(paths: list[Path], entities: Any) -> Any:
    import polars as pl

    left = pl.from_pandas(entities).with_row_index("row").sort("event_timestamp")
    for path in paths:
        right = pl.read_parquet(path).drop("created").sort("event_timestamp")
        left = left.join_asof(right, on="event_timestamp", by="driver", check_sortedness=False)
    return left.sort("row").to_arrow()


def peak_bytes() -> int:
    # Not ru_maxrss, which a new process inherits from its parent.
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def main(kind: str, case: Case, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    run = retrieval(kind, case, folder)
    before = peak_bytes()
    for _ in sys.stdin:
        begin = time.perf_counter()
        answer = run()
        seconds = time.perf_counter() - begin
        row = {"seconds": seconds, "rows": len(answer), "extra_bytes": peak_bytes() - before, "bytes": peak_bytes()}
        del answer
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Case(*map(int, sys.argv[2].split("x"))), Path(sys.argv[3]))
