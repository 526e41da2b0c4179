"""What is known of a flight when it pushes back: the weather and traffic of the hour, how its carrier, route and plane did lately.

Stored features carry the moment from which on they are known; what the request itself brings goes through an on-demand view.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from feast import Entity, FeatureView, Field, RequestSource
from feast.on_demand_feature_view import OnDemandFeatureView, on_demand_feature_view
from feast.types import Float64, Int64, String
from feast.value_type import ValueType

RECENT_DAYS = 14
"""Days that the daily views summarise; `features.lookback_days` in defs.yaml must not be smaller."""

LANDED_HOURS = 12
FADING = 0.7
"""Flights that landed in the last LANDED_HOURS hours count; each full hour makes their weight this much smaller."""

# A stored value is used for at most this long. The views are made every hour or every day, so that the second period is leeway.
_HOURLY = timedelta(hours=2)
_DAILY = timedelta(days=2)

_ENTITIES = {
    "origin": "Airport of departure: EWR, JFK or LGA.",
    "dest": "Airport of arrival, by its three letters.",
    "carrier": "Airline, by its two letters.",
    "route": "Origin and destination, such as JFK-LAX.",
    "tailnum": "Registration of the plane.",
}
VIEWS: dict[str, tuple[str, timedelta, list[str], str]] = {
    "origin_weather": (
        "origin",
        _HOURLY,
        ["wind_speed", "wind_gust", "precipitation", "visibility"],
        "Weather at the origin in the last full hour.",
    ),
    "origin_traffic": (
        "origin",
        _HOURLY,
        ["origin_departures", "origin_departure_delay", "origin_gain"],
        "Push-backs of the last 2 hours at the origin; minutes lost under way by its flights that landed last.",
    ),
    "destination_traffic": (
        "dest",
        timedelta(hours=LANDED_HOURS),
        ["destination_gain", "destination_arrival_delay"],
        "Minutes lost under way by the flights that landed last at the destination, and how late they were; newer ones weigh more.",
    ),
    "carrier_recent": (
        "carrier",
        _DAILY,
        ["carrier_gain", "carrier_late_share"],
        f"The carrier's flights of {RECENT_DAYS} days.",
    ),
    "route_recent": (
        "route",
        _DAILY,
        ["route_gain", "route_gain_spread", "route_late_share", "route_air_minutes"],
        f"The route's flights of {RECENT_DAYS} days.",
    ),
    "plane_recent": (
        "tailnum",
        _DAILY,
        ["plane_flights", "plane_gain", "plane_late_share"],
        f"The plane's flights of {RECENT_DAYS} days.",
    ),
}
REQUEST = ["dep_delay", "scheduled_block_minutes", "scheduled_hour", "scheduled_minute", "day_of_week"]
AT_PUSH_BACK = [
    "departure_delay",
    "block_minutes",
    "departure_minute",
    "weekday",
    "schedule_slack",
    "delay_and_route_gain",
    "delay_and_origin_gain",
    "delay_and_destination_gain",
]


def feature_views(source: Callable[[str], Any]) -> list[Entity | FeatureView | OnDemandFeatureView]:
    """Five entities, six stored views and one on-demand view. A gain is minutes added under way: arrival delay minus departure delay."""
    entities = {
        name: Entity(name=name, join_keys=[name], value_type=ValueType.STRING, description=text)
        for name, text in _ENTITIES.items()
    }
    views = {
        name: FeatureView(
            name=name,
            entities=[entities[key]],
            ttl=ttl,
            schema=[Field(name=key, dtype=String), *(Field(name=feature, dtype=Float64) for feature in features)],
            source=source(name),
            description=description,
        )
        for name, (key, ttl, features, description) in VIEWS.items()
    }
    request = RequestSource(name="push_back_request", schema=[Field(name=name, dtype=Int64) for name in REQUEST])
    at_push_back = on_demand_feature_view(
        name="at_push_back",
        sources=[request, views["route_recent"], views["origin_traffic"], views["destination_traffic"]],
        schema=[Field(name=name, dtype=Float64) for name in AT_PUSH_BACK],
        mode="python",
        description="The request's own values, and what they come to with the stored ones.",
    )(push_back)
    return [*entities.values(), *views.values(), at_push_back]


def push_back(inputs: dict[str, list]) -> dict[str, list]:
    # Feast runs this text on its own, without this module around it: everything it uses must be inside.
    def numbers(name):
        return [None if value is None else float(value) for value in inputs[name]]

    # Rounded as the stored values are: sums that differ only in their last bit would be one value to a model in float32.
    def together(left, right, sign=1.0):
        pairs = zip(left, right, strict=True)
        return [None if a is None or b is None else round(a + sign * b, 3) for a, b in pairs]

    delay, block = numbers("dep_delay"), numbers("scheduled_block_minutes")
    hours = [None if hour is None else 60.0 * hour for hour in inputs["scheduled_hour"]]
    return {
        "departure_delay": delay,
        "block_minutes": block,
        "departure_minute": together(hours, numbers("scheduled_minute")),
        "weekday": numbers("day_of_week"),
        "schedule_slack": together(block, inputs["route_air_minutes"], -1.0),
        "delay_and_route_gain": together(delay, inputs["route_gain"]),
        "delay_and_origin_gain": together(delay, inputs["origin_gain"]),
        "delay_and_destination_gain": together(delay, inputs["destination_gain"]),
    }


def compute() -> dict[str, str]:
    """The SQL of the stored views over the tables `flights` and `weather`, in DuckDB's dialect.

    A flight's outcome (`arr_delay`, `air_time`) is used only where its `arrived_at` is before the row's `event_timestamp`.
    """
    return {
        "origin_weather": _WEATHER,
        "origin_traffic": _ORIGIN_TRAFFIC,
        "destination_traffic": _DESTINATION_TRAFFIC,
        "carrier_recent": _recent("carrier", f"{_mean('gain')} AS carrier_gain, {_mean('arrived_late')} AS carrier_late_share"),
        "route_recent": _recent(
            "route",
            f"{_mean('gain')} AS route_gain, round(stddev_samp(gain), {_DIGITS}) AS route_gain_spread, "
            f"{_mean('arrived_late')} AS route_late_share, {_mean('air_time')} AS route_air_minutes",
        ),
        "plane_recent": _recent(
            "tailnum",
            f"CAST(count(*) AS DOUBLE) AS plane_flights, {_mean('gain')} AS plane_gain, {_mean('arrived_late')} AS plane_late_share",
        ),
    }


# Coarse enough that neither the order of a sum nor the float32 of a served model moves a value across a tree's threshold.
_DIGITS = 3


def _mean(expression: str) -> str:
    return f"round(avg({expression}), {_DIGITS})"


# No gust is reported where it does not exceed the wind.
_WEATHER = """
SELECT origin, event_timestamp, wind_speed, coalesce(wind_gust, wind_speed) AS wind_gust, precip AS precipitation, visib AS visibility
FROM weather
WHERE event_timestamp > $day_start AND event_timestamp <= $day_end
"""

# Each event counts at the full hours after it: one at 10:20 is of age 1 at 11:00, of age 2 at 12:00, and weighs less with age.
_FADING_AGES = ", ".join(f"({age}, {FADING ** (age - 1):.6f})" for age in range(1, LANDED_HOURS + 1))
_FADING_MEAN = (
    f"round(sum(CAST(weight AS DOUBLE) * {{0}}) / sum(CASE WHEN {{0}} IS NOT NULL THEN CAST(weight AS DOUBLE) END), {_DIGITS})"
)

_ORIGIN_TRAFFIC = f"""
WITH events AS (
  SELECT origin, event_timestamp AS moment, age, weight, CAST(dep_delay AS DOUBLE) AS delay, CAST(NULL AS DOUBLE) AS gain
  FROM flights CROSS JOIN (VALUES (1, 1.0), (2, 1.0)) AS ages(age, weight)
  WHERE event_timestamp >= $day_start - INTERVAL 3 HOUR AND event_timestamp < $day_end
  UNION ALL
  SELECT origin, arrived_at, age, weight, NULL, CAST(arr_delay - dep_delay AS DOUBLE)
  FROM flights CROSS JOIN (VALUES {_FADING_AGES}) AS ages(age, weight)
  WHERE arrived_at >= $day_start - INTERVAL {LANDED_HOURS + 1} HOUR AND arrived_at < $day_end
), hourly AS (
  SELECT origin, date_trunc('hour', moment) + INTERVAL 1 HOUR * age AS event_timestamp, weight, delay, gain FROM events
)
SELECT
  origin,
  event_timestamp,
  CAST(count(delay) AS DOUBLE) AS origin_departures,
  {_mean("delay")} AS origin_departure_delay,
  {_FADING_MEAN.format("gain")} AS origin_gain
FROM hourly
WHERE event_timestamp > $day_start AND event_timestamp <= $day_end
GROUP BY origin, event_timestamp
"""

# All weights fade alike, so that the mean changes only when something lands: other hours need no row.
_DESTINATION_TRAFFIC = f"""
WITH hourly AS (
  SELECT
    dest,
    date_trunc('hour', arrived_at) + INTERVAL 1 HOUR * age AS event_timestamp,
    age,
    weight,
    CAST(arr_delay - dep_delay AS DOUBLE) AS gain,
    CAST(arr_delay AS DOUBLE) AS delay
  FROM flights CROSS JOIN (VALUES {_FADING_AGES}) AS ages(age, weight)
  WHERE arrived_at >= $day_start - INTERVAL {LANDED_HOURS + 1} HOUR AND arrived_at < $day_end
)
SELECT
  dest,
  event_timestamp,
  {_FADING_MEAN.format("gain")} AS destination_gain,
  {_FADING_MEAN.format("delay")} AS destination_arrival_delay
FROM hourly
WHERE event_timestamp > $day_start AND event_timestamp <= $day_end
GROUP BY dest, event_timestamp
HAVING min(age) = 1
"""


def _recent(key: str, aggregates: str) -> str:
    """A daily view: the flights of one key that landed before the day's end, of RECENT_DAYS days of push-backs."""
    return f"""
SELECT {key}, $day_end AS event_timestamp, {aggregates}
FROM (
  SELECT {key}, CAST(arr_delay - dep_delay AS DOUBLE) AS gain, CAST(arrived_late AS DOUBLE) AS arrived_late, CAST(air_time AS DOUBLE) AS air_time
  FROM flights
  WHERE arrived_at < $day_end AND event_timestamp >= $day_end - INTERVAL {RECENT_DAYS} DAY AND {key} <> 'unknown'
) AS landed
GROUP BY {key}
"""
