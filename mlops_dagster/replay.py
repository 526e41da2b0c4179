"""Replaying recorded days as real traffic: what becomes known is pushed as it becomes known, requests are sent in their order."""

import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from mlops_dagster.assets.lake_paths import day_key, stored_days
from mlops_dagster.assets.references import load_callable
from mlops_dagster.core.errors import ServingError
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.requests import client_of

CONNECTIONS = 3
LOG_SECONDS = 20.0


@dataclass(frozen=True)
class Slice:
    """A stretch of a day: the values that are known from its beginning on, and the requests in it."""

    pushed: dict[str, pa.Table]
    requests: list[dict[str, Any]]


class Replay:
    """Sends a model's recorded rows to its deployment, a day at a time; sending a day again is harmless."""

    def __init__(self, spec: ModelSpec, resources: dict[str, Any]) -> None:
        self.spec, self.resources = spec, resources
        self.signature = resources["feature_store"].signature(spec.name)
        self._read = load_callable(spec, "source.read")
        self._local = threading.local()

    def day(self, day: dt.date, between: Callable[[], None]) -> int:
        """Push and send one day; `between` is called after each stretch. Returns how many requests were answered."""
        sent = 0
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for stretch in self._slices(day):
                for view, rows in stretch.pushed.items():
                    self.resources["feature_store"].push(self.spec.name, view, rows)
                sent += sum(pool.map(self._send, stretch.requests))
                between()
        self._await_log(day, sent)
        return sent

    def _send(self, row: dict[str, Any]) -> int:
        if not hasattr(self._local, "client"):
            self._local.client = client_of(self.resources["serving"], self.spec.name)
        self._local.client.predict(self.spec.name, [row], {"x-request-id": str(row["id"])})
        return 1

    def _slices(self, day: dt.date) -> Iterator[Slice]:
        """The day cut at the moments at which something becomes known."""
        requests = self._requests(day)
        pushed = self._streamed(day)
        begin, end = self.spec.source.partitions.bounds(day)
        cuts = sorted({begin, *(m for t in pushed.values() for m in t["event_timestamp"].to_list())})
        for first, last in zip(cuts, [*cuts[1:], end], strict=True):
            known = {view: t.filter(pl.col("event_timestamp") == first).to_arrow() for view, t in pushed.items()}
            yield Slice(
                {v: t for v, t in known.items() if t.num_rows}, [r for r in requests if first <= r["event_timestamp"] < last]
            )

    def _requests(self, day: dt.date) -> list[dict[str, Any]]:
        """The rows whose moment of prediction falls on the day (those that were filed a day before or after among them), in order."""
        begin, end = self.spec.source.partitions.bounds(day)
        names = [*self.signature.entities, *(name for name, _ in self.signature.request)]
        wanted = list(dict.fromkeys(["id", "event_timestamp", *names]))
        around = [self._tables(day + dt.timedelta(days=offset)) for offset in (-1, 0, 1)]
        rows = pl.concat([next(iter(t.values())).select(wanted) for t in around if t])
        on_day = rows.filter((pl.col("event_timestamp") >= begin) & (pl.col("event_timestamp") < end)).sort(
            "event_timestamp", "id"
        )
        return on_day.to_dicts()

    def _tables(self, day: dt.date) -> dict[str, pl.DataFrame]:
        """What the source has of a day, main table first; nothing outside its days."""
        partitions = self.spec.source.partitions
        if day < partitions.start or (partitions.end is not None and day > partitions.end):
            return {}
        tables = self._read(day)
        return {n: pl.DataFrame(t) for n, t in (tables if isinstance(tables, dict) else {"rows": tables}).items()}

    def _streamed(self, day: dt.date) -> dict[str, pl.DataFrame]:
        """The day's rows of the views whose values become known in the course of a day (not only at its end)."""
        lake, spec = self.resources["data_lake"], self.spec
        queries = load_callable(spec, "features.compute")()
        streamed = {v: sql for v, sql in queries.items() if self._in_the_course_of_a_day(lake, v)}
        # The hours before midnight belong to the day before: a value of the early morning may look back at them.
        days = [self._tables(d) for d in (day - dt.timedelta(days=1), day)]
        named = {n: pl.concat([t[n] for t in days if t]).to_arrow() for n in days[-1]}
        begin, end = spec.source.partitions.bounds(day)
        engine = self.resources["feature_engine_duckdb"]
        found = {v: pl.DataFrame(engine.run(sql, named, {"day_start": begin, "day_end": end})) for v, sql in streamed.items()}
        moment = pl.col("event_timestamp").cast(pl.Datetime("us", "UTC"))
        within = (moment >= begin) & (moment < end)
        return {v: t.with_columns(moment).filter(within).with_columns(created_timestamp=moment) for v, t in found.items()}

    def _in_the_course_of_a_day(self, lake: Any, view: str) -> bool:
        stored = stored_days(lake, self.spec, "features", view)
        if not stored:
            return False
        return (
            lake.read(day_key(self.spec, "features", stored[-1], view), ["event_timestamp"])["event_timestamp"].unique().__len__()
            > 1
        )

    def _await_log(self, day: dt.date, sent: int) -> None:
        """Wait until every answered row is in the log's segments (they are written twice a second)."""
        deadline = time.monotonic() + LOG_SECONDS
        while (found := self.resources["inference_segments"].read(self.spec.name, day).num_rows) < sent:
            if time.monotonic() > deadline:
                raise ServingError(
                    f"only {found} of {sent} answered rows of {day} reached the inference log within {LOG_SECONDS:g} s"
                )
            time.sleep(0.1)
