"""One entity's features for a request: the transformer beside Feast's own `get_online_features`, on SQLite and Redis."""

import datetime as dt
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.measure import Measurement
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.feature_store.feast_store import FeastStore
from mlops_dagster.serving.transformer import OnlineFeatures

SAMPLES, STOCK_SAMPLES, ROUNDS = 10_000, 400, 5
PLANES, ROUTES, FEATURES = 4000, 300, 10
NOW = dt.datetime(2013, 2, 1, tzinfo=dt.UTC)
LIMIT_SECONDS = 0.002


def feature_views(source: Any) -> list[Any]:
    """Two views of ten features and an on-demand view."""
    from feast import Entity, FeatureView, Field, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int64, String

    plane = Entity(name="plane", join_keys=["plane_id"], value_type=ValueType.STRING)
    route = Entity(name="route", join_keys=["route_id"], value_type=ValueType.INT64)
    views = [
        FeatureView(
            name=name,
            entities=[entity],
            ttl=dt.timedelta(days=60),
            source=source(name),
            schema=[*(Field(name=f"{name}_{n}", dtype=Float64) for n in range(FEATURES)), Field(name=f"{name}_id", dtype=kind)],
        )
        for name, entity, kind in (("plane", plane, String), ("route", route, Int64))
    ]
    request = RequestSource(name="request", schema=[Field(name="dep_delay", dtype=Float64)])

    @on_demand_feature_view(sources=[request, views[1]], schema=[Field(name="excess", dtype=Float64)], mode="python")
    def at_request(inputs: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(inputs["dep_delay"], inputs["route_0"], strict=True)
        return {"excess": [None if known is None else delay - known for delay, known in pairs]}

    return [plane, route, *views, at_request]


def run() -> Iterator[Measurement]:
    yield from _measured("SQLite", {"type": "sqlite", "path": "online.db"})
    if shutil.which("redis-server"):
        with _redis() as connection:
            yield from _measured("Redis", {"type": "redis", "connection_string": connection})


def _measured(name: str, online: dict[str, Any]) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        store = FeastStore(root=f"{folder}/feature_store", lake_root=f"{folder}/lake", online_store=online)
        _fill(store)
        ours, stock = _ours(store), _stock(store)
        for warm_up in (ours, stock):
            warm_up(0)
        rounds = [(_percentiles(ours, SAMPLES), _percentiles(stock, STOCK_SAMPLES)) for _ in range(ROUNDS)]
        for position, label in enumerate(("P50", "P99")):
            fast = statistics.median(mine[position] for mine, _ in rounds)
            slow = statistics.median(other[position] for _, other in rounds)
            yield Measurement(
                f"online features {name} {label}", "s", fast, slow, "Feast get_online_features", slow / fast,
                f"< {LIMIT_SECONDS:g} s", fast < LIMIT_SECONDS, "make benchmark ONLY=online_features",
            )  # fmt: skip


def _fill(store: FeastStore) -> None:
    random = np.random.default_rng(0)
    lake = FolderLake(root=store.lake_root)
    for name, ids in (("plane", [f"N{n}" for n in range(PLANES)]), ("route", list(range(ROUTES)))):
        moments = pl.Series([NOW] * len(ids)).cast(pl.Datetime("us", "UTC"))
        columns = {f"{name}_{n}": random.normal(size=len(ids)) for n in range(FEATURES)}
        rows = pl.DataFrame({f"{name}_id": ids, "event_timestamp": moments, "created_timestamp": moments, **columns})
        lake.write(f"delay/features/{name}/2013-01-31.parquet", rows)
    store.apply("delay", feature_views)
    store.materialize("delay", NOW - dt.timedelta(days=1), NOW)


def _row(number: int) -> dict[str, Any]:
    return {"plane_id": f"N{number * 7919 % PLANES}", "route_id": number * 104729 % ROUTES, "dep_delay": number % 60 - 10.0}


def _ours(store: FeastStore) -> Callable[[int], object]:
    features = OnlineFeatures(Path(store.root, "delay"), "delay", clock=NOW.timestamp)
    return lambda number: features.complete([_row(number)])


def _stock(store: FeastStore) -> Callable[[int], object]:
    from feast import FeatureStore

    feast = FeatureStore(repo_path=f"{store.root}/delay")
    service = feast.get_feature_service("delay")
    return lambda number: feast.get_online_features(features=service, entity_rows=[_row(number)]).to_dict()


def _percentiles(answer: Callable[[int], object], count: int) -> tuple[float, float]:
    times = []
    for number in range(count):
        begin = time.perf_counter()
        answer(number)
        times.append(time.perf_counter() - begin)
    times.sort()
    return times[count // 2], times[int(count * 0.99)]


@contextmanager
def _redis() -> Iterator[str]:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline, "redis-server did not start in 20 s"
                    time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(10)
