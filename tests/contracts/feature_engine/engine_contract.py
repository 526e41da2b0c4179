"""What every feature engine must do. A backend's test module subclasses this and gives `engine`; `reference` is DuckDB's answer."""

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_dagster.core.errors import DataError, DeclarationError
from mlops_dagster.resources.feature_engine import FeatureEngine

DAY = dt.datetime(2013, 1, 5, tzinfo=dt.timezone(dt.timedelta(hours=-5)))
PARAMETERS = {
    "day_start": DAY,
    "day_end": DAY + dt.timedelta(days=1),
    "least": 2,
    "airport": "JFK",
    "share": 0.5,
    "nothing": None,
    "yes": True,
}

ROLLING = """
    SELECT carrier, event_timestamp,
           avg(delay) OVER week AS mean_delay,
           count(*) OVER week AS flights,
           max(delay) OVER (PARTITION BY carrier ORDER BY event_timestamp ROWS BETWEEN 2 PRECEDING AND CURRENT ROW) AS highest
    FROM flights
    WHERE carrier IS NOT NULL
    WINDOW week AS (PARTITION BY carrier ORDER BY event_timestamp RANGE BETWEEN INTERVAL 2 DAYS PRECEDING AND CURRENT ROW)
"""
DAILY = """
    SELECT f.carrier, $day_end AS event_timestamp, avg(f.delay) AS mean_delay, sum(f.seats) AS seats, count(f.delay) AS known,
           count(DISTINCT f.dest) AS destinations, stddev_samp(f.delay) AS spread,
           sum(CASE WHEN f.delay > 15 THEN 1 ELSE 0 END) / count(*) AS late_share, bool_or(f.delay > 100) AS any_very_late
    FROM flights f
    WHERE f.event_timestamp >= $day_start - INTERVAL 3 DAYS AND f.event_timestamp < $day_end AND f.carrier IS NOT NULL
    GROUP BY f.carrier
    HAVING count(*) >= $least
"""
AS_OF = """
    WITH joined AS (
        SELECT f.id, f.event_timestamp, w.wind, row_number() OVER (PARTITION BY f.id ORDER BY w.observed_at DESC) AS latest
        FROM flights f JOIN weather w ON w.origin = f.origin AND w.observed_at <= f.event_timestamp
                       AND w.observed_at > f.event_timestamp - INTERVAL 6 HOURS
    )
    SELECT id, event_timestamp, wind FROM joined WHERE latest = 1 AND event_timestamp >= $day_start
"""
HOURLY = """
    SELECT origin, date_trunc('hour', observed_at) + INTERVAL 1 HOUR AS event_timestamp, avg(wind) AS wind,
           extract(hour FROM max(observed_at)) AS hour_of_day, coalesce(max(wind), $share) AS strongest, $airport = origin AS here
    FROM weather GROUP BY origin, date_trunc('hour', observed_at)
"""
TYPES = """
    SELECT id, CAST(seats AS DOUBLE) / 3 AS third, upper(dest) || '-' || origin AS route, $nothing AS nothing, $yes AS yes,
           CASE WHEN delay IS NULL THEN 'unknown' WHEN delay > 0 THEN 'late' ELSE 'early' END AS kind, abs(delay) AS size
    FROM flights
"""
STATEMENTS = {"rolling": ROLLING, "daily": DAILY, "as_of": AS_OF, "hourly": HOURLY, "types": TYPES}


def flights(count: int = 400) -> pa.Table:
    random = np.random.default_rng(3)
    moments = [
        dt.datetime(2013, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=int(m)) for m in random.choice(8640, count, replace=False)
    ]
    return pa.table(
        {
            "id": [f"f{n}" for n in range(count)],
            "event_timestamp": pa.array(moments, pa.timestamp("us", tz="UTC")),
            "carrier": [None if n % 50 == 0 else f"C{n % 5}" for n in range(count)],
            "origin": [("JFK", "LGA", "EWR")[n % 3] for n in range(count)],
            "dest": [f"d{n % 7}" for n in range(count)],
            "delay": [None if n % 17 == 0 else float(value) for n, value in enumerate(random.normal(5, 40, count))],
            "seats": pa.array(random.integers(50, 300, count), pa.int32()),
        }
    )


def weather() -> pa.Table:
    moments = [dt.datetime(2013, 1, 1, tzinfo=dt.UTC) + dt.timedelta(minutes=20 * n) for n in range(500)]
    random = np.random.default_rng(4)
    return pa.table(
        {
            "origin": ["JFK", "LGA"] * 250,
            "observed_at": pa.array(moments, pa.timestamp("us", tz="UTC")),
            "wind": random.normal(10, 3, 500),
        }
    )


def tables() -> dict[str, Any]:
    return {"flights": flights(), "weather": weather()}


def assert_same(left: pa.Table, right: pa.Table) -> None:
    assert left.schema.equals(right.schema), f"{left.schema}\n\n{right.schema}"
    assert left.num_rows == right.num_rows
    pd.testing.assert_frame_equal(left.to_pandas(), right.to_pandas(), check_exact=False, rtol=1e-12, atol=1e-12)


class EngineContract:
    def test_every_statement_gives_duckdbs_answer(self, engine: FeatureEngine, reference: dict[str, pa.Table]) -> None:
        answers = engine.run_all(STATEMENTS, tables(), PARAMETERS)
        assert [*answers] == [*STATEMENTS]
        for name, answer in answers.items():
            assert answer.num_rows > 3
            assert_same(answer, reference[name])

    def test_tables_may_be_parquet_files(self, engine: FeatureEngine, reference: dict[str, pa.Table], tmp_path: Path) -> None:
        whole, paths = flights(), []
        for number in range(4):
            paths.append(str(tmp_path / f"day={number}.parquet"))
            pq.write_table(whole.slice(number * 100, 100), paths[-1])
        assert_same(engine.run(DAILY, {"flights": paths}, PARAMETERS), reference["daily"])

    def test_several_cases_give_what_each_gives_alone(self, engine: FeatureEngine, tmp_path: Path) -> None:
        """Every case sees its own files only; a column that some of the files lack is null there."""
        whole, files = flights(), []
        for number in range(4):
            part = whole.slice(number * 100, 100)
            files.append(str(tmp_path / f"{number}.parquet"))
            pq.write_table(part.drop_columns(["seats"]) if number == 3 else part, files[-1])
        days = [DAY + dt.timedelta(days=n - 1) for n in range(3)]
        every = [{**PARAMETERS, "day_start": day, "day_end": day + dt.timedelta(days=1)} for day in days]
        for given in ([files[:2], files[1:3], files[2:]], [whole.slice(n * 100, 200) for n in range(3)]):
            cases = [({"flights": table, "weather": weather()}, one) for table, one in zip(given, every, strict=True)]
            answers = engine.run_each(STATEMENTS, cases)
            counted = [answer["daily"].num_rows for answer in answers]
            assert min(counted) > 0
            for answer, (sources, values) in zip(answers, cases, strict=True):
                assert [*answer] == [*STATEMENTS]
                for name, alone in engine.run_all(STATEMENTS, sources, values).items():
                    assert_same(answer[name], alone)

    def test_the_same_rows_give_the_same_bits_however_often_they_are_asked(self, engine: FeatureEngine, tmp_path: Path) -> None:
        """Sums of floats depend on their order: the answer must not depend on which thread was done first."""
        random, files = np.random.default_rng(5), []
        for number in range(8):
            files.append(str(tmp_path / f"{number}.parquet"))
            rows = {"key": random.integers(0, 500, 20_000), "amount": random.lognormal(3, 1, 20_000)}
            pq.write_table(pa.table(rows), files[-1])
        sql = "SELECT key, avg(amount) AS mean, sum(amount) AS total, stddev(amount) AS spread FROM t GROUP BY key"
        first, *others = [engine.run(sql, {"t": files}) for _ in range(5)]
        every = engine.run_each({"a": sql, "b": sql}, [({"t": files}, {})] * 4)
        assert first.num_rows == 500
        for answer in (*others, *(one for answers in every for one in answers.values())):
            assert answer.equals(first)

    def test_no_case_and_one_case(self, engine: FeatureEngine, reference: dict[str, pa.Table]) -> None:
        assert engine.run_each(STATEMENTS, []) == []
        (answer,) = engine.run_each({"daily": DAILY}, [(tables(), PARAMETERS)])
        assert_same(answer["daily"], reference["daily"])

    def test_tables_may_come_from_polars_and_pandas(self, engine: FeatureEngine, reference: dict[str, pa.Table]) -> None:
        frames = {"flights": pl.DataFrame(flights()), "weather": weather().to_pandas()}
        assert_same(engine.run(AS_OF, frames, PARAMETERS), reference["as_of"])

    def test_moments_are_the_same_instant_in_any_zone(self, engine: FeatureEngine) -> None:
        answer = engine.run(
            "SELECT max(event_timestamp) AS event_timestamp, $day_start AS day_start FROM flights", tables(), PARAMETERS
        )
        assert answer.schema.field("day_start").type == pa.timestamp("us", tz="UTC")
        assert answer.to_pylist()[0]["day_start"] == DAY
        assert answer.to_pylist()[0]["event_timestamp"] == max(flights()["event_timestamp"].to_pylist())

    def test_no_rows_keep_their_columns(self, engine: FeatureEngine) -> None:
        answer = engine.run("SELECT id, delay, event_timestamp FROM flights WHERE delay > 1e9", tables())
        assert answer.num_rows == 0
        assert answer.schema.types == [pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")]

    def test_wrong_sql_names_what_is_wrong(self, engine: FeatureEngine) -> None:
        with pytest.raises(DeclarationError, match=r"dleay"):
            engine.run("SELECT dleay FROM flights", tables())
        with pytest.raises(DeclarationError, match=r"flihgts"):
            engine.run("SELECT delay FROM flihgts", tables())
        with pytest.raises(DeclarationError, match=r"features\.compute"):
            engine.run("SELEC delay FROM flights", tables())
        with pytest.raises(DeclarationError, match="one SELECT statement"):
            engine.run("SELECT 1; SELECT 2", tables())
        with pytest.raises(DeclarationError, match="one SELECT statement"):
            engine.run("DROP TABLE flights", tables())

    def test_unknown_and_unusable_parameters_are_named(self, engine: FeatureEngine) -> None:
        with pytest.raises(DeclarationError, match=r"no parameter \$day_sart\. There are: .*\$day_start"):
            engine.run("SELECT * FROM flights WHERE event_timestamp > $day_sart", tables(), PARAMETERS)
        with pytest.raises(DeclarationError, match="has no time zone"):
            engine.run("SELECT $a AS a", {}, {"a": dt.datetime(2013, 1, 1)})
        with pytest.raises(DeclarationError, match="is no number"):
            engine.run("SELECT $a AS a", {}, {"a": [1]})

    def test_unusable_tables_are_named(self, engine: FeatureEngine, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="'flights'"):
            engine.run("SELECT 1 AS a", {"flights": 5})
        with pytest.raises(DataError, match="'flights'"):
            engine.run("SELECT * FROM flights", {"flights": [str(tmp_path / "missing.parquet")]})
