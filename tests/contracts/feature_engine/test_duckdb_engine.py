import datetime as dt

import polars as pl
import pyarrow as pa
import pytest

from mlops_dagster.core.errors import DeclarationError
from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine
from tests.contracts.feature_engine.engine_contract import DAY, EngineContract, flights, tables, weather


class TestDuckDB(EngineContract):
    @pytest.fixture
    def engine(self) -> DuckDBEngine:
        return DuckDBEngine()


def test_a_daily_aggregate_is_what_polars_computes(reference: dict[str, pa.Table]) -> None:
    begin = DAY - dt.timedelta(days=3)
    frame = pl.DataFrame(flights()).filter(
        pl.col("carrier").is_not_null(),
        pl.col("event_timestamp") >= begin,
        pl.col("event_timestamp") < DAY + dt.timedelta(days=1),
    )
    expected = frame.group_by("carrier").agg(
        mean_delay=pl.col("delay").mean(),
        seats=pl.col("seats").sum().cast(pl.Int64),
        known=pl.col("delay").count().cast(pl.Int64),
        late_share=(pl.col("delay") > 15).sum() / pl.len(),
    )
    found = pl.DataFrame(reference["daily"]).select(expected.columns)
    assert (
        found.equals(expected.sort("carrier"))
        or ((found["mean_delay"] - expected.sort("carrier")["mean_delay"]).abs().max() or 0) < 1e-12
    )
    assert found["late_share"].to_list() == pytest.approx(expected.sort("carrier")["late_share"].to_list())
    assert found["seats"].to_list() == expected.sort("carrier")["seats"].to_list()


def test_an_as_of_join_is_what_polars_computes(reference: dict[str, pa.Table]) -> None:
    left = pl.DataFrame(flights()).filter(pl.col("event_timestamp") >= DAY).sort("event_timestamp")
    right = pl.DataFrame(weather()).sort("observed_at").with_columns(observed=pl.col("observed_at"))
    joined = left.join_asof(right, left_on="event_timestamp", right_on="observed_at", by="origin", check_sortedness=False)
    expected = joined.filter(pl.col("event_timestamp") - pl.col("observed") < pl.duration(hours=6)).select(
        "id", "event_timestamp", "wind"
    )
    assert pl.DataFrame(reference["as_of"]).equals(expected.sort("id"))


def test_more_than_memory_goes_to_disk_or_says_so() -> None:
    with pytest.raises(DeclarationError, match=r"[Mm]emory"):
        DuckDBEngine(memory_limit="5MB").run("SELECT list(id || dest) AS a FROM flights, range(100000)", tables())
