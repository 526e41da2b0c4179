"""What a user can get wrong: each a clear error that names the field, the value and the remedy, or the right result."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, FeatureView, Field, SnowflakeSource
from feast.data_format import DeltaFormat
from feast.types import Int64, String

from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.resources.feature_store.asof_plan import view_plan
from tests.contracts.feature_store.asof_repo import applied, entity, file_source, open_store, stamps, write

HOUR = 3_600_000_000
GOOD: dict[str, Any] = {
    "driver": pa.array([1, 2]),
    "event_timestamp": stamps([HOUR, HOUR]),
    "created": stamps([HOUR, HOUR]),
    "trips": pa.array([10, 20]),
}


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    write(tmp_path / "rows.parquet", **GOOD)
    driver = entity("driver")
    schema = [Field(name="trips", dtype=Int64)]
    view = FeatureView(name="trips", entities=[driver], ttl=timedelta(hours=2), schema=schema, source=file_source("rows.parquet"))
    late = FeatureView(
        name="late", entities=[driver], ttl=timedelta(seconds=1), schema=schema, source=file_source("rows.parquet")
    )
    return applied(open_store(tmp_path, engine=request.param), [driver], [view, late])


def frame(times: Any = None, **columns: Any) -> pd.DataFrame:
    given = pd.to_datetime(["1970-01-01 02:00", "1970-01-01 00:30", "1970-01-01 03:00"], utc=True) if times is None else times
    return pd.DataFrame({"driver": [2, 1, 1], "event_timestamp": given, **columns})


def trips(store: FeatureStore, rows: Any, **options: Any) -> list[Any]:
    return store.get_historical_features(entity_df=rows, features=["trips:trips"], **options).to_arrow()["trips"].to_pylist()


def fails(store: FeatureStore, rows: Any, *words: str, features: str = "trips:trips") -> None:
    with pytest.raises(DataError) as failure:
        store.get_historical_features(entity_df=rows, features=[features]).to_arrow()
    assert [word for word in words if not re.search(word, str(failure.value))] == [], str(failure.value)


def test_unsorted_rows_keep_their_order(store: FeatureStore) -> None:
    assert trips(store, frame()) == [20, None, 10]


@pytest.mark.parametrize(
    "times",
    [
        ["1970-01-01 02:00:00", "1970-01-01T00:30:00Z", "1970-01-01 04:00:00+01:00"],
        pd.to_datetime(["1970-01-01 02:00", "1970-01-01 00:30", "1970-01-01 03:00"]),
        pd.to_datetime(["1970-01-01 02:00", "1970-01-01 00:30", "1970-01-01 03:00"], utc=True).tz_convert("Asia/Kolkata"),
        [t.to_pydatetime() for t in pd.to_datetime(["1970-01-01 02:00", "1970-01-01 00:30", "1970-01-01 03:00"], utc=True)],
    ],
    ids=["text", "without a zone", "another zone", "datetime objects"],
)
def test_any_way_to_write_the_time_means_the_same(store: FeatureStore, times: Any) -> None:
    assert trips(store, frame(times)) == [20, None, 10]


def test_entity_rows_without_a_timestamp_column(store: FeatureStore) -> None:
    fails(store, frame().drop(columns="event_timestamp"), "no column 'event_timestamp'", r"\['driver'\]", "Name the time")


def test_two_timestamp_columns_are_not_guessed_between(store: FeatureStore) -> None:
    rows = frame().rename(columns={"event_timestamp": "a"}).assign(b=lambda f: f["a"])
    fails(store, rows, "2 timestamp columns", r"\['a', 'b'\]")


def test_the_only_timestamp_column_is_taken(store: FeatureStore) -> None:
    assert trips(store, frame().rename(columns={"event_timestamp": "seen_at"})) == [20, None, 10]


def test_null_timestamps_are_counted_and_placed(store: FeatureStore) -> None:
    rows = frame(pd.to_datetime(["1970-01-01 02:00", None, None], utc=True))
    fails(store, rows, "'event_timestamp' is null in 2 of 3", "first is row 1", "drop those rows")


def test_text_that_is_no_time(store: FeatureStore) -> None:
    fails(store, frame(["yesterday", "today", "now"]), "'event_timestamp'", "ISO 8601")


def test_a_number_is_no_time(store: FeatureStore) -> None:
    fails(store, frame([1, 2, 3]), "'event_timestamp'", "int64", "to_datetime")


def test_missing_join_key(store: FeatureStore) -> None:
    fails(store, frame().drop(columns="driver"), r"lack \['driver'\]", "'trips'", "Add them")


def test_join_key_of_another_type(store: FeatureStore) -> None:
    fails(store, frame().astype({"driver": "str"}), "'driver'", "string", "int64", "same type")


@pytest.mark.parametrize("kind", ["int8", "float64", "Int64", "category"])
def test_join_key_of_a_kindred_type_joins(store: FeatureStore, kind: str) -> None:
    assert trips(store, frame().astype({"driver": kind})) == [20, None, 10]


def test_an_entity_column_named_like_a_feature_is_not_silently_replaced(store: FeatureStore) -> None:
    fails(store, frame(trips=[0, 0, 0]), r"\['trips'\]", "full_feature_names")


def test_entity_rows_with_a_column_twice(store: FeatureStore) -> None:
    table: Any = pa.table([pa.array([1]), pa.array([1]), stamps([HOUR])], names=["driver", "driver", "event_timestamp"])
    fails(store, table, r"more than one column named \['driver'\]")


def test_no_entity_rows_give_no_rows_but_all_columns(store: FeatureStore) -> None:
    answer = store.get_historical_features(entity_df=frame()[:0], features=["trips:trips"]).to_df()
    assert (list(answer.columns), len(answer)) == (["driver", "event_timestamp", "trips"], 0)


def test_ttl_that_excludes_everything_leaves_every_row_with_nulls(store: FeatureStore) -> None:
    answer = store.get_historical_features(entity_df=frame(), features=["late:trips"]).to_arrow()
    assert answer["trips"].to_pylist() == [None, None, None]


def test_a_bad_entity_query_names_the_tables(store: FeatureStore) -> None:
    fails(store, "SELECT * FROM nowhere", "nowhere", r"\['trips'\]")


def source_path(store: FeatureStore) -> Path:
    return Path(str(store.config.repo_path)) / "rows.parquet"


def test_missing_file(store: FeatureStore) -> None:
    source_path(store).unlink()
    fails(store, frame(), "rows.parquet' does not exist", "correct the source's path")


def test_empty_file(store: FeatureStore) -> None:
    source_path(store).write_bytes(b"")
    fails(store, frame(), "rows.parquet", "empty or truncated", "write it again")


def test_truncated_file(store: FeatureStore) -> None:
    content = source_path(store).read_bytes()
    source_path(store).write_bytes(content[: len(content) // 2])
    fails(store, frame(), "rows.parquet", "empty or truncated")


def test_file_with_a_damaged_page(store: FeatureStore) -> None:
    content = bytearray(source_path(store).read_bytes())
    content[4:60] = b"\xff" * 56
    source_path(store).write_bytes(content)
    fails(store, frame(), "rows.parquet", "not a whole Parquet file")


def test_folder_without_files(store: FeatureStore) -> None:
    source_path(store).unlink()
    source_path(store).mkdir()
    (source_path(store) / "_SUCCESS").touch()
    fails(store, frame(), "holds no Parquet file")


@pytest.mark.parametrize("column", ["driver", "event_timestamp", "created", "trips"])
def test_file_that_lacks_a_column(store: FeatureStore, column: str) -> None:
    write(source_path(store), **{name: values for name, values in GOOD.items() if name != column})
    fails(store, frame(), f"has no column '{column}'", "'trips'", "Add the column")


def test_timestamp_field_that_is_no_time(store: FeatureStore) -> None:
    write(source_path(store), **{**GOOD, "event_timestamp": pa.array([1, 2])})
    fails(store, frame(), "'event_timestamp'", "int64, not a timestamp")


def test_file_without_rows_gives_nulls(store: FeatureStore) -> None:
    pq.write_table(pa.table(GOOD)[:0], source_path(store))
    assert trips(store, frame()) == [None, None, None]


def test_files_of_one_folder_that_disagree(store: FeatureStore) -> None:
    source_path(store).unlink()
    write(source_path(store) / "a.parquet", **GOOD)
    write(source_path(store) / "b.parquet", **{**GOOD, "trips": pa.array(["x", "y"])})
    fails(store, frame(), "disagree on a column's type", "trips")


def test_files_of_one_folder_may_differ_in_width_unit_and_columns(store: FeatureStore) -> None:
    source_path(store).unlink()
    write(source_path(store) / "a.parquet", **{**GOOD, "driver": pa.array([1, 7], pa.int32())})
    second = {**GOOD, "driver": pa.array([2, 8]), "event_timestamp": stamps([3_600_000, 3_600_000], "ms"), "trips": pa.nulls(2)}
    write(source_path(store) / "day=2" / "b.parquet", **second)
    assert trips(store, frame()) == [None, None, 10]


def test_other_sources_and_formats_are_refused_by_name(tmp_path: Path) -> None:
    driver = entity("driver")
    schema = [Field(name="trips", dtype=Int64), Field(name="driver", dtype=Int64)]
    for source, words in (
        (SnowflakeSource(table="t", timestamp_field="event_timestamp"), "SnowflakeSource.*FileSource"),
        (file_source(write(tmp_path / "r.parquet", **GOOD), file_format=DeltaFormat()), "DeltaFormat.*ParquetFormat"),
    ):
        view = FeatureView(name="other", entities=[driver], schema=schema, source=source)
        with pytest.raises(DataError, match=words):
            view_plan(view, ["trips"], False, tmp_path)


def test_sentinel_times_at_the_end_of_time_do_not_overflow(store: FeatureStore) -> None:
    end_of_time = 253_402_300_799_000_000
    rows = {
        **GOOD,
        "driver": pa.array([1, 1]),
        "created": stamps([end_of_time, HOUR]),
        "event_timestamp": stamps([HOUR, end_of_time]),
    }
    write(source_path(store), **rows)
    assert trips(store, frame()) == [None, None, 10]
    assert trips(store, frame(), filter_by_created_timestamp=True) == [None, None, None]


def test_text_keys_and_features_come_through(tmp_path: Path) -> None:
    from feast import ValueType

    tail = entity("tail", ValueType.STRING)
    rows = {**GOOD, "tail": pa.array(["N1", "N2"]), "maker": pa.array(["b", None])}
    source = file_source(write(tmp_path / "p.parquet", **rows))
    view = FeatureView(
        name="planes", entities=[tail], ttl=timedelta(0), schema=[Field(name="maker", dtype=String)], source=source
    )
    store = applied(open_store(tmp_path), [tail], [view])
    answer = store.get_historical_features(
        entity_df=pd.DataFrame({"tail": ["N2", "N1", "N9", None], "event_timestamp": [pd.Timestamp("2026-01-01", tz="UTC")] * 4}),
        features=["planes:maker"],
    )
    assert answer.to_arrow()["maker"].to_pylist() == [None, "b", None, None]


@pytest.mark.parametrize("limit", ["much", "-1GB", "0", "4 parsecs"])
def test_memory_limit_must_be_a_size(limit: str) -> None:
    from mlops_dagster.resources.feature_store.asof_settings import parse_bytes

    with pytest.raises(DeclarationError, match=r"memory_limit.*4GB"):
        parse_bytes(limit)
