"""How old the newest online value may be, on a real online store."""

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pytest

from mlops_dagster.assets.online_freshness import check
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.feature_store.feast_store import FeastStore
from tests.contracts.feature_store.store_contract import (
    DAYS,
    MODEL,
    START,
    day,
    feature_views,
    plane_rows,
    route_rows,
    write_days,
)

LAST = day(DAYS - 1).date()


def declared(**features: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": MODEL,
            "package": "a",
            "source": {"read": "a.b", "schema": "a.b", "partitions": {"start": str(START.date())}},
            "features": {"define": "a.b", "compute": "a.b", **features},
            "label": {"column": "late"},
            "training": {"train": "a.b"},
        }
    )


@pytest.fixture
def lake(tmp_path: Path) -> FolderLake:
    made = FolderLake(root=str(tmp_path / "lake"))
    write_days(made)
    return made


@pytest.fixture
def store(tmp_path: Path, lake: FolderLake) -> FeastStore:
    made = FeastStore(
        root=str(tmp_path / "feature_store"),
        lake_root=str(tmp_path / "lake"),
        online_store={"type": "sqlite", "path": "online.db"},
    )
    made.apply(MODEL, feature_views)
    return made


def checked(store: FeastStore, lake: FolderLake, now: dt.datetime, **features: object) -> tuple[bool, str]:
    rows: dict[str, pa.Table] = {
        "plane_day": plane_rows(DAYS - 1).to_arrow(),
        "route_day": route_rows(DAYS - 1).to_arrow(),
    }
    found = check(declared(**features), lake, store, {LAST: rows}, now)
    return found.passed, str(found.description)


def test_values_of_the_newest_day_are_fresh_at_its_end_and_age_until_now(store: FeastStore, lake: FolderLake) -> None:
    store.materialize(MODEL, day(0), day(DAYS))
    assert checked(store, lake, day(DAYS + 400)) == (
        True,
        "2 views at most 0.0 h old, limit 30.0 h, at 2013-01-06T00:00:00+00:00 (the end of 2013-01-05)",
    )
    assert checked(store, lake, day(DAYS) + dt.timedelta(hours=20))[0]
    passed, because = checked(store, lake, day(DAYS) + dt.timedelta(hours=20), max_online_age_hours=12)
    assert not passed
    assert because.startswith("plane_day: 20.0 h old; route_day: 20.0 h old, limit 12.0 h, at 2013-01-06T20:00:00+00:00 (now)")


def test_a_view_that_got_no_new_values_is_named(store: FeastStore, lake: FolderLake) -> None:
    store.materialize(MODEL, day(0), day(2))
    passed, because = checked(store, lake, day(DAYS + 400))
    assert not passed
    assert because.startswith("plane_day: 96.0 h old; route_day: 72.0 h old, limit 30.0 h")


def test_an_empty_online_store_is_not_fresh(store: FeastStore, lake: FolderLake) -> None:
    passed, because = checked(store, lake, day(DAYS + 400))
    assert not passed
    assert because.startswith("plane_day: nothing is online; route_day: nothing is online, limit 30.0 h")
