"""The leakage check on a small lake: what looks into the future is named, what does not passes."""

import datetime as dt
import sys
import types

import pyarrow as pa
import pytest

from mlops_dagster.assets import leakage
from mlops_dagster.core.spec import ModelSpec
from mlops_dagster.resources.data_lake.folder import FolderLake
from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine

DAYS = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(6)]


@pytest.fixture
def lake(tmp_path):
    """Six days of two parcels each: the first is delivered at noon of its day, the second at noon of the day after."""
    lake = FolderLake(root=str(tmp_path))
    lake.write_bytes("m/raw_data/tables.json", b'["rows"]')
    for day in DAYS:
        sent = dt.datetime.combine(day, dt.time(6), dt.UTC)
        rows = {
            "id": [f"{day}-{i}" for i in range(2)],
            "event_timestamp": [sent, sent + dt.timedelta(hours=1)],
            "delivered_at": [sent + dt.timedelta(hours=6), sent + dt.timedelta(hours=30)],
            "depot": ["a", "a"],
            "late": [0.0, 1.0],
        }
        lake.write(f"m/validated_data/rows/{day}.parquet", pa.table(rows))
    return lake


def checked(lake, sql, known_after=None):
    module = types.ModuleType("leakage_model")
    module.compute = lambda: {"depot_record": sql}
    sys.modules["made_for_tests.leakage_model"] = module
    sys.modules["made_for_tests"] = types.ModuleType("made_for_tests")
    spec = ModelSpec.model_validate(
        {
            "name": "m",
            "package": "made_for_tests",
            "source": {"read": ".x.x", "schema": ".x.x", "partitions": {"start": "2024-01-01"}, "known_after": known_after or {}},
            "features": {"define": ".x.x", "compute": ".leakage_model.compute", "lookback_days": 3},
            "label": {"column": "late"},
            "training": {"train": ".x.x"},
        }
    )
    return leakage.check(spec, lake, DuckDBEngine(), DAYS)


KNOWN = {"late": "delivered_at", "delivered_at": "delivered_at"}


def test_a_feature_of_what_is_known_passes(lake):
    sql = "SELECT depot, $day_end AS event_timestamp, avg(late) AS share FROM rows WHERE delivered_at <= $day_end GROUP BY depot"
    result = checked(lake, sql, KNOWN)
    assert result.passed, result.description


def test_a_label_that_has_not_landed_is_found(lake):
    sql = "SELECT depot, $day_end AS event_timestamp, avg(late) AS share FROM rows GROUP BY depot"
    result = checked(lake, sql, KNOWN)
    assert not result.passed
    assert "view 'depot_record': share at" in result.description
    assert "source.known_after" in result.description


def test_rows_of_the_rest_of_the_day_are_found(lake):
    sql = """SELECT depot, $day_start + INTERVAL 6 HOUR AS event_timestamp, count(*) AS parcels
             FROM rows WHERE event_timestamp >= $day_start + INTERVAL 7 HOUR GROUP BY depot
             UNION ALL SELECT depot, $day_start + INTERVAL 7 HOUR, count(*) FROM rows WHERE delivered_at > $day_end GROUP BY depot"""
    result = checked(lake, sql, KNOWN)
    assert not result.passed


def test_without_known_after_the_label_counts_as_known_when_it_has_landed(lake):
    sql = "SELECT depot, $day_end AS event_timestamp, avg(late) AS share FROM rows WHERE delivered_at <= $day_end GROUP BY depot"
    assert not checked(lake, sql).passed
