"""The numbers of docs/flight_delay.md, from the data anew: `python -m mlops_dagster.defs.flight_delay.study [months|drift] [FOLDER]`.

It computes the features of every day of 2013, joins them as of each push-back, trains as the model does and prints the tables. FOLDER
keeps the joined rows for the next time. It needs neither Dagster nor a feature store: what it joins with is DuckDB's ASOF JOIN.
"""

import argparse
import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import numpy as np
import pandas as pd
import polars as pl

from mlops_dagster.core.drift import Profile, psi
from mlops_dagster.defs.arrival_delay import training as arrival
from mlops_dagster.defs.flight_delay import features, source, training

FIRST, LAST = dt.date(2013, 1, 1), dt.date(2013, 12, 31)
TRAINED_THROUGH = dt.date(2013, 2, 28)
WINDOW_DAYS, TEST_DAYS = 60, 14


def days(first: dt.date, last: dt.date) -> list[dt.date]:
    """Every day from `first` to `last`, both included."""
    return [first + dt.timedelta(days=n) for n in range((last - first).days + 1)]


def bounds(day: dt.date) -> tuple[dt.datetime, dt.datetime]:
    """The moments at which a New York day begins and ends, in UTC."""
    midnights = (dt.datetime.combine(day + dt.timedelta(days=n), dt.time(), ZoneInfo(source.NEW_YORK)) for n in (0, 1))
    begin, end = (midnight.astimezone(dt.UTC) for midnight in midnights)
    return begin, end


def tables(first: dt.date, last: dt.date) -> dict[str, pl.DataFrame]:
    """The source's tables over a range of days."""
    read = [source.read_day(day) for day in days(first, last)]
    return {name: pl.concat([one[name] for one in read]) for name in read[0]}


def views_of_day(rows: dict[str, pl.DataFrame], day: dt.date, queries: dict[str, str]) -> dict[str, pl.DataFrame]:
    """The rows that each view gains on a day, computed from these tables."""
    parameters = dict(zip(("day_start", "day_end"), bounds(day), strict=True))
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, table in rows.items():
            connection.register(name, table)
        made = {}
        for view, sql in queries.items():
            asked = {name: value for name, value in parameters.items() if f"${name}" in sql}
            found = pl.DataFrame(connection.sql(sql, params=asked).to_arrow_table())
            moment = pl.col("event_timestamp")
            made[view] = found.filter((moment > parameters["day_start"]) & (moment <= parameters["day_end"]))
        return made


def views_of(first: dt.date, last: dt.date) -> dict[str, pl.DataFrame]:
    """All views over a range of days, each day computed from the tables of the RECENT_DAYS days before it."""
    queries = features.compute()
    back = dt.timedelta(days=features.RECENT_DAYS)
    made = [views_of_day(tables(day - back, day), day, queries) for day in days(first, last)]
    return {view: pl.concat([one[view] for one in made]) for view in queries}


def joined(first: dt.date, last: dt.date) -> pl.DataFrame:
    """Every labelled flight with its features as of its push-back, as Feast joins them (time to live included)."""
    flights = tables(first, last)["flights"].filter(pl.col("arr_delay").is_not_null())
    columns, joins = ["flights.*"], []
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("flights", flights)
        for view, table in views_of(first, last).items():
            key, ttl, names, _ = features.VIEWS[view]
            connection.register(view, table)
            fresh = f"{view}.event_timestamp >= flights.event_timestamp - INTERVAL {int(ttl.total_seconds())} SECOND"
            columns += [f"CASE WHEN {fresh} THEN {view}.{name} END AS {name}" for name in names]
            joins.append(
                f"ASOF LEFT JOIN {view} ON {view}.{key} = flights.{key} AND {view}.event_timestamp <= flights.event_timestamp"
            )
        sql = f"SELECT {', '.join(columns)} FROM flights {' '.join(joins)} ORDER BY flights.event_timestamp, flights.id"
        rows = pl.DataFrame(connection.sql(sql).to_arrow_table())
    on_demand = features.push_back({name: rows[name].to_list() for name in rows.columns})
    return rows.with_columns(pl.Series(name, values, dtype=pl.Float64) for name, values in on_demand.items())


def feature_names() -> list[str]:
    """The features in the order of the model's signature."""
    return [name for _, _, names, _ in features.VIEWS.values() for name in names] + features.AT_PUSH_BACK


def between(rows: pl.DataFrame, first: dt.date, last: dt.date) -> pl.DataFrame:
    """The flights whose scheduled departure was on these days."""
    return rows.filter(pl.col("flight_date").is_between(first, last))


def model_input(rows: pl.DataFrame) -> pd.DataFrame:
    """The model's columns, as `train` gets them."""
    return rows.select(feature_names()).to_pandas()


def accuracy(rows: pl.DataFrame, answers: np.ndarray) -> float:
    """Share of right answers to arrived_late."""
    return float((answers == rows["arrived_late"].to_numpy()).mean())


def absolute_error(rows: pl.DataFrame, answers: np.ndarray) -> float:
    """Mean absolute error of arr_delay, minutes."""
    return float(np.abs(answers - rows["arr_delay"].to_numpy()).mean())


def by_month(
    rows: pl.DataFrame,
    train: Callable[..., Any],
    naive: Callable[[pd.DataFrame], np.ndarray],
    label: str,
    score: Callable[[pl.DataFrame, np.ndarray], float],
) -> Iterator[dict[str, Any]]:
    """For each month from March: the naive rule, the model of January and February, and one trained on the WINDOW_DAYS before."""

    def trained(first: dt.date, last: dt.date) -> Any:
        window = between(rows, first, last)
        return train(model_input(window), window[label].to_pandas())

    first_version = trained(FIRST, TRAINED_THROUGH)
    for month in range(3, 13):
        start = dt.date(2013, month, 1)
        asked = between(rows, start, (start + dt.timedelta(days=31)).replace(day=1) - dt.timedelta(days=1))
        retrained = trained(start - dt.timedelta(days=WINDOW_DAYS), start - dt.timedelta(days=1))
        given = model_input(asked)
        yield {
            "month": f"{start:%Y-%m}",
            "flights": asked.height,
            "naive": score(asked, naive(given)),
            "january_february": score(asked, first_version.predict(given)),
            "previous_60_days": score(asked, retrained.predict(given)),
        }


def held_out(rows: pl.DataFrame, last: dt.date) -> dict[str, float]:
    """What the gate sees of a version trained through `last`: scores on the last TEST_DAYS days of its window."""
    first_test = last - dt.timedelta(days=TEST_DAYS - 1)
    old = between(rows, last - dt.timedelta(days=WINDOW_DAYS - 1), first_test - dt.timedelta(days=1))
    new = between(rows, first_test, last)
    given = model_input(new)
    late = np.asarray(training.train(model_input(old), old["arrived_late"].to_pandas()).predict(given))
    minutes = np.asarray(arrival.train(model_input(old), old["arr_delay"].to_pandas()).predict(given))
    return {
        "accuracy": accuracy(new, late),
        "naive_accuracy": accuracy(new, training.naive(given)),
        "mean_absolute_error": absolute_error(new, minutes),
        "naive_mean_absolute_error": absolute_error(new, arrival.naive(given)),
    }


def drift(rows: pl.DataFrame, window_days: int) -> pl.DataFrame:
    """PSI of each feature and of the score over the window that ends with each day from March on, against the training rows."""
    known = between(rows, FIRST, TRAINED_THROUGH - dt.timedelta(days=TEST_DAYS))
    model = training.train(model_input(known), known["arrived_late"].to_pandas())
    scored = rows.with_columns(score=pl.Series(np.asarray(model.predict_proba(model_input(rows)))[:, 1]))
    columns = [*feature_names(), "score"]
    reference = Profile.of(between(scored, FIRST, TRAINED_THROUGH - dt.timedelta(days=TEST_DAYS)).select(columns))
    wanted = days(TRAINED_THROUGH + dt.timedelta(days=2 - window_days), LAST)
    profiles = {day: Profile.of(between(scored, day, day).select(columns), like=reference) for day in wanted}
    ends = days(TRAINED_THROUGH + dt.timedelta(days=1), LAST)
    found = [
        {"day": end, **psi(reference, Profile.merge(profiles[end - dt.timedelta(days=n)] for n in range(window_days)))}
        for end in ends
    ]
    return pl.DataFrame(found)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=["months", "drift"], default="months")
    parser.add_argument("folder", nargs="?", type=Path, help="where the joined rows are kept")
    asked = parser.parse_args()
    rows = _kept(asked.folder)
    pl.Config(
        tbl_rows=400,
        tbl_cols=50,
        float_precision=4,
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        tbl_width_chars=200,
        fmt_str_lengths=40,
    )
    if asked.what == "months":
        print(pl.DataFrame(list(by_month(rows, training.train, training.naive, "arrived_late", accuracy))))
        print(pl.DataFrame(list(by_month(rows, arrival.train, arrival.naive, "arr_delay", absolute_error))))
        ends = [TRAINED_THROUGH, *(dt.date(2013, month, 1) - dt.timedelta(days=1) for month in range(4, 13)), LAST]
        print(pl.DataFrame([{"through": end, **held_out(rows, end)} for end in ends]))
    else:
        for window_days in (1, 7, 14):
            found = drift(rows, window_days).with_columns(month=pl.col("day").dt.month())
            by = found.group_by("month").agg(pl.exclude("day").median()).sort("month")
            print(f"median PSI of {window_days}-day windows by month")
            print(by.transpose(include_header=True, header_name="feature", column_names=[f"m{m}" for m in by["month"]]).slice(1))


def _kept(folder: Path | None) -> pl.DataFrame:
    file = folder / "flights_with_features.parquet" if folder else None
    if file and file.exists():
        return pl.read_parquet(file)
    rows = joined(FIRST, LAST)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.write_parquet(file)
    return rows


if __name__ == "__main__":
    main()
