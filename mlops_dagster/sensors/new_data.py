"""New data: every day that has ended and is not in the lake yet is ingested; the newest ones are read again for late rows."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from mlops_dagster.assets import jobs, raw_data
from mlops_dagster.assets.lake_paths import day_key, stored_days, tables
from mlops_dagster.assets.references import load_callable
from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.spec import ModelSpec, Partitions
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_lake.parquet import as_table, from_parquet, stored, to_parquet

if TYPE_CHECKING:
    import pyarrow as pa

DAYS_A_TICK = 5


def build(spec: ModelSpec) -> dg.SensorDefinition:
    """The sensor `<model>_new_data`. It runs by default only where the source has no last day: a closed history is ingested on purpose."""
    live = spec.source.partitions.end is None

    @dg.sensor(
        name=f"{spec.name}_new_data",
        job_name=jobs.name(spec.name, "ingest"),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING if live else dg.DefaultSensorStatus.STOPPED,
        description="Ingests each ended day that the lake does not have, in order, with its features, and each day whose source changed.",
        required_resource_keys={"data_lake"},
        tags={"mlops/model": spec.name},
    )
    def new_data(context: dg.SensorEvaluationContext):
        lake, now = context.resources.data_lake, dt.datetime.now(dt.UTC)
        try:
            days = stored_days(lake, spec, "raw_data", tables(lake, spec)[0])
        except NotFoundError:
            days = []
        missing = ended_days(spec.source.partitions, days[-1] if days else None, now)
        if missing:
            return dg.SensorResult([request(spec, day) for day in missing], cursor=context.cursor)
        day, cursor = next_recheck(spec, days, now, context.cursor)
        if day is None:
            why = f"every ended day is in the lake; the newest is {days[-1] if days else 'none'}"
            return dg.SensorResult(skip_reason=why, cursor=cursor)
        if found := changed_content(spec, lake, day):
            today = spec.source.partitions.day_of(now)
            return dg.SensorResult([correction(spec, day, found, today)], cursor=cursor)
        return dg.SensorResult(skip_reason=f"{day} was read again; its rows are the stored ones", cursor=cursor)

    return new_data


def ended_days(declared: Partitions, newest: dt.date | None, now: dt.datetime) -> list[dt.date]:
    """The next days after the newest stored one, up to DAYS_A_TICK, that are over and that the source has."""
    day = newest + dt.timedelta(days=1) if newest else declared.start
    found = []
    while len(found) < DAYS_A_TICK and declared.bounds(day)[1] <= now and (declared.end is None or day <= declared.end):
        found.append(day)
        day += dt.timedelta(days=1)
    return found


def next_recheck(
    spec: ModelSpec, stored: Sequence[dt.date], now: dt.datetime, cursor: str | None
) -> tuple[dt.date | None, str | None]:
    """The stored day to read again now, if any, and the cursor to keep: one day a look, each of the source.recheck_days newest
    stored ones once a calendar day, the newest first."""
    today = spec.source.partitions.day_of(now).isoformat()
    seen = _seen(cursor)
    done = seen["days"] if seen.get("on") == today else []
    newest = list(reversed(stored))[: spec.source.recheck_days]
    waiting = [day for day in newest if day.isoformat() not in done]
    if not waiting:
        return None, cursor
    return waiting[0], json.dumps({"on": today, "days": [*done, waiting[0].isoformat()]})


def _seen(cursor: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("days"), list) else {}


def changed_content(spec: ModelSpec, lake: Lake, day: dt.date) -> str | None:
    """Read a day of the source again; SHA-256 over its tables and the lake's where one has other rows than the lake holds, else None."""
    hashes, same = [], True
    for name, rows in raw_data.read_day(spec, load_callable(spec, "source.read"), day).items():
        key = day_key(spec, "raw_data", day, name)
        fresh, held = to_parquet(as_table(name, rows)), lake.read_bytes(key) if lake.list(key) else b""
        hashes += [stored(key, content).sha256 for content in (fresh, held)]
        same = same and (hashes[-1] == hashes[-2] or (bool(held) and _same_rows(key, fresh, held)))
    return None if same else raw_data.digest_of(hashes)


def _same_rows(key: str, fresh: "pa.Buffer", held: bytes) -> bool:
    """Whether two files hold the same rows. Another version of the library that wrote the stored one may have packed them otherwise, so
    both are packed by this one; Arrow's own equality would call every missing number (NaN) a change."""
    import pyarrow as pa

    one, other = (to_parquet(as_table(key, from_parquet(key, pa.BufferReader(f), None))) for f in (fresh, held))
    return one.equals(other)


def request(spec: ModelSpec, day: dt.date) -> dg.RunRequest:
    """The run that ingests a day."""
    return dg.RunRequest(
        run_key=f"{spec.name}:ingest:{day}", partition_key=day.isoformat(), tags={"mlops/reason": f"new data: {day} has ended"}
    )


def correction(spec: ModelSpec, day: dt.date, content: str, today: dt.date) -> dg.RunRequest:
    """The run that ingests a day again, once a calendar day for one change of content: if it fails, the next day's look asks again."""
    return dg.RunRequest(
        run_key=f"{spec.name}:ingest:{day}:{content[:16]}:{today}",
        partition_key=day.isoformat(),
        tags={"mlops/reason": f"late data: the source has other rows of {day} than the lake"},
    )
