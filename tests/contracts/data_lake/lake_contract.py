"""What every lake backend must do. A backend's test module subclasses this and gives the fixture `lake`."""

import datetime as dt
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from mlops_dagster.core.errors import DataError, NotFoundError
from mlops_dagster.resources.data_lake import Lake

KEY = "flight_delay/raw_data/flights/2013-01-01.parquet"
MOMENTS = [dt.datetime(2013, 1, 1, hour, tzinfo=dt.UTC) for hour in range(3)]


def flights(first: int = 0) -> pa.Table:
    return pa.table(
        {
            "id": ["a", "b", None],
            "event_timestamp": pa.array(MOMENTS, pa.timestamp("us", tz="UTC")),
            "delay": pa.array([first, None, 7], pa.int64()),
            "share": [0.5, float("inf"), None],
        }
    )


class LakeContract:
    def test_a_table_comes_back_as_it_was_written(self, lake: Lake) -> None:
        stored = lake.write(KEY, flights())
        assert lake.read(KEY).equals(flights())
        assert (stored.key, stored.rows) == (KEY, 3)
        assert stored.bytes > 0

    def test_equal_content_has_equal_bytes_whatever_library_it_came_from(self, lake: Lake) -> None:
        chunked = pa.concat_tables([flights().slice(0, 1), flights().slice(1)])
        stored = {
            lake.write(f"m/{name}.parquet", table).sha256
            for name, table in {
                "arrow": flights(),
                "chunked": chunked,
                "polars": pl.DataFrame(flights()),
                "metadata": flights().replace_schema_metadata({"by": "me"}),
            }.items()
        }
        assert len(stored) == 1

    def test_a_pandas_table_with_categories_loses_nothing(self, lake: Lake) -> None:
        lake.write(KEY, pd.DataFrame({"carrier": pd.Categorical(["UA", "DL", None, "UA"]), "n": [1, 2, 3, 4]}))
        assert lake.read(KEY).to_pydict() == {"carrier": ["UA", "DL", None, "UA"], "n": [1, 2, 3, 4]}

    def test_an_empty_table_keeps_its_columns(self, lake: Lake) -> None:
        lake.write(KEY, flights().slice(0, 0))
        assert lake.read(KEY).schema.equals(flights().schema)

    def test_several_keys_are_read_in_the_order_given(self, lake: Lake) -> None:
        for day in (1, 2):
            lake.write(f"m/t/{day}.parquet", flights(first=day))
        assert lake.read(["m/t/2.parquet", "m/t/1.parquet"])["delay"].to_pylist() == [2, None, 7, 1, None, 7]

    def test_a_column_that_is_null_in_one_file_takes_the_other_files_type(self, lake: Lake) -> None:
        lake.write("m/t/1.parquet", pa.table({"a": pa.nulls(1)}))
        lake.write("m/t/2.parquet", pa.table({"a": ["x"]}))
        assert lake.read(["m/t/1.parquet", "m/t/2.parquet"])["a"].to_pylist() == [None, "x"]

    def test_only_the_wanted_columns_are_read(self, lake: Lake) -> None:
        lake.write(KEY, flights())
        assert lake.read(KEY, columns=["delay", "id"]).column_names == ["delay", "id"]

    def test_a_missing_column_is_named_with_those_that_exist(self, lake: Lake) -> None:
        lake.write(KEY, flights())
        with pytest.raises(DataError, match=r"no column dleay.*delay"):
            lake.read(KEY, columns=["dleay"])

    def test_a_missing_key_names_its_nearest_neighbour(self, lake: Lake) -> None:
        lake.write(KEY, flights())
        with pytest.raises(NotFoundError, match=r"2013-01-02.*2013-01-01"):
            lake.read(KEY.replace("01-01", "01-02"))
        with pytest.raises(NotFoundError, match="does not exist"):
            lake.read_bytes("nowhere/at/all.json")

    def test_a_truncated_file_names_its_key(self, lake: Lake) -> None:
        lake.write(KEY, flights())
        lake.write_bytes(KEY, lake.read_bytes(KEY)[:-20])
        with pytest.raises(DataError, match=r"2013-01-01\.parquet.*not a whole Parquet file"):
            lake.read(KEY)

    @pytest.mark.parametrize(
        "key", ["", "/etc/passwd", "../x.parquet", "a/../../x", "a//b", "a/./b", "a\\b", ".hidden/x", "a/b.dvc"]
    )
    def test_a_key_that_is_no_plain_path_is_refused(self, lake: Lake, key: str) -> None:
        with pytest.raises(DataError, match="lake key"):
            lake.write(key, flights())
        with pytest.raises(DataError, match="lake key"):
            lake.locate(key)

    @pytest.mark.parametrize("table", [None, [1, 2], {"a": [1]}, "a"])
    def test_what_is_no_table_is_refused(self, lake: Lake, table: object) -> None:
        with pytest.raises(DataError, match="Arrow C stream"):
            lake.write(KEY, table)

    def test_reports_are_stored_as_they_are(self, lake: Lake) -> None:
        assert lake.write_bytes("m/drift_report/2013-01-01.html", b"<p>\xff").rows == 0
        assert lake.read_bytes("m/drift_report/2013-01-01.html") == b"<p>\xff"

    def test_keys_are_listed_by_any_prefix(self, lake: Lake) -> None:
        for name in (
            "m/a/2013-01-02.parquet",
            "m/a/2013-01-01.parquet",
            "m/a/2013-02-01.parquet",
            "m/ab/2013-01-01.parquet",
            "n/a.parquet",
        ):
            lake.write(name, flights())
        assert lake.list("m/a/2013-01") == ["m/a/2013-01-01.parquet", "m/a/2013-01-02.parquet"]
        assert len(lake.list("m/a")) == 4
        assert len(lake.list()) == 5
        assert lake.list("nothing/here") == []

    def test_a_deleted_key_is_gone_and_may_be_deleted_again(self, lake: Lake) -> None:
        lake.write(KEY, flights())
        lake.delete(KEY)
        lake.delete(KEY)
        assert lake.list() == []

    def test_of_many_writers_of_one_key_one_wins_whole(self, lake: Lake) -> None:
        with ThreadPoolExecutor(4) as pool:
            stored = list(pool.map(lambda n: lake.write(KEY, pa.table({"n": [n] * 20_000})), range(16)))
        found = lake.read(KEY)["n"].unique().to_pylist()
        assert len(found) == 1
        assert lake.write(KEY, pa.table({"n": found * 20_000})).sha256 in {one.sha256 for one in stored}
