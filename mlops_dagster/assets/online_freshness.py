"""The check of how old the newest value in the online store is."""

import datetime as dt
from collections.abc import Mapping
from typing import Any

import dagster as dg
import pyarrow as pa

from mlops_dagster.assets.lake_paths import day_key, stored_days
from mlops_dagster.assets.stage import check_result
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake import Lake

NAME = "online_freshness"
ASKED_ENTITIES = 50
DAYS_BACK = 31
DEFAULT_LIMIT = 1.25  # days: what a day's end brings is old when the next day's has not come a quarter of a day after it was due


def check(
    spec: ModelSpec, lake: Lake, store: Any, new: Mapping[dt.date, Mapping[str, pa.Table]], now: dt.datetime
) -> dg.AssetCheckResult:
    """Ask the online store for the newest event time of every view and compare its age with features.max_online_age_hours.

    The age counts up to now where the run's last day is the newest that has ended, else up to the end of that day: a recorded day
    that is replayed or filled in later is as fresh as it was then. A value newer than that moment (pushed, or of a later day) has age 0.
    """
    last = max(new)
    begin, end = spec.source.partitions.bounds(last)
    is_newest = spec.source.partitions.bounds(last + dt.timedelta(days=1))[1] > now
    moment = now if is_newest else end
    hours = spec.features.max_online_age_hours
    limit = dt.timedelta(hours=hours) if hours is not None else (end - begin) * DEFAULT_LIMIT
    newest = {view: newest_online(spec, lake, store, view, rows, last) for view, rows in new[last].items()}
    ages = {view: None if at is None else max(moment - at, dt.timedelta()) for view, at in newest.items()}
    old = {view: age for view, age in ages.items() if age is None or age > limit}
    told = [f"{view}: nothing is online" if age is None else f"{view}: {_hours(age)} old" for view, age in old.items()]
    oldest = max((age for age in ages.values() if age is not None), default=dt.timedelta())
    at = f"at {moment.isoformat(timespec='seconds')} ({'now' if is_newest else f'the end of {last}'})"
    because = f"{'; '.join(told) or f'{len(ages)} views at most {_hours(oldest)} old'}, limit {_hours(limit)}, {at}"
    metadata = {
        "newest_online_value": {view: str(at) for view, at in newest.items()},
        "age_hours": {view: None if age is None else age / dt.timedelta(hours=1) for view, age in ages.items()},
        "limit_hours": limit / dt.timedelta(hours=1),
        "counted_until": moment.isoformat(),
    }
    return check_result(NAME, not old, because, metadata, warn=True)


def _hours(age: dt.timedelta) -> str:
    return f"{age / dt.timedelta(hours=1):.1f} h"


def newest_online(spec: ModelSpec, lake: Lake, store: Any, view: str, rows: pa.Table, day: dt.date) -> dt.datetime | None:
    """The newest event time that the store has of the entities that were updated last; a view without rows on the day is asked for
    those of its newest day before."""
    asked = _updated_last(store, spec.name, view, rows)
    before = stored_days(lake, spec, "features", view) if not asked else []
    for earlier in [d for d in reversed(before) if dt.timedelta() < day - d <= dt.timedelta(days=DAYS_BACK)]:
        if asked := _updated_last(store, spec.name, view, lake.read(day_key(spec, "features", earlier, view))):
            break
    return max((at for at in store.stored_at(spec.name, view, asked) if at is not None), default=None)


def _updated_last(store: Any, model: str, view: str, rows: pa.Table) -> list[dict[str, Any]]:
    """Join keys of up to ASKED_ENTITIES rows of a view, those with the newest event times."""
    keys = [name for name in store.signature(model).entities if name in rows.column_names]
    newest = rows.sort_by([("event_timestamp", "descending")]).slice(0, ASKED_ENTITIES).select(keys)
    if not keys:
        return [{}] * min(rows.num_rows, 1)
    return [row for row in newest.to_pylist() if None not in row.values()]
