"""What every feature store must do, on every online backend. A test module gives the fixture `store`."""

import datetime as dt
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mlops_dagster.core.errors import DataError, DeclarationError, NotFoundError
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.feature_store.feast_store import FeastStore

MODEL = "delay"
START = dt.datetime(2013, 1, 1, tzinfo=dt.UTC)
DAYS, PLANES, ROUTES = 5, 40, 6
UTC = pl.Datetime("us", "UTC")


def day(number: int) -> dt.datetime:
    return START + dt.timedelta(days=number)


def feature_views(source: Any) -> list[Any]:
    """Two views of different entities, and an on-demand view of a request value and one of them."""
    from feast import Entity, FeatureView, Field, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Bool, Float64, Int64, String

    plane = Entity(name="plane", join_keys=["plane_id"], value_type=ValueType.STRING)
    origin = Entity(name="origin", join_keys=["origin"], value_type=ValueType.STRING)
    dest = Entity(name="dest", join_keys=["dest"], value_type=ValueType.STRING)
    plane_day = FeatureView(
        name="plane_day",
        entities=[plane],
        ttl=dt.timedelta(days=3),
        schema=[
            Field(name="plane_delay", dtype=Float64),
            Field(name="flights", dtype=Int64),
            Field(name="plane_id", dtype=String),
        ],
        source=source("plane_day"),
    )
    route_day = FeatureView(
        name="route_day",
        entities=[origin, dest],
        ttl=dt.timedelta(days=30),
        schema=[
            Field(name="route_delay", dtype=Float64),
            Field(name="busy", dtype=Bool),
            Field(name="weather", dtype=String),
            Field(name="origin", dtype=String),
            Field(name="dest", dtype=String),
        ],
        source=source("route_day"),
    )
    request = RequestSource(name="request", schema=[Field(name="dep_delay", dtype=Float64)])

    @on_demand_feature_view(sources=[request, route_day], schema=[Field(name="excess", dtype=Float64)], mode="python")
    def at_request(inputs: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(inputs["dep_delay"], inputs["route_delay"], strict=True)
        return {"excess": [None if left is None or right is None else left - right for left, right in pairs]}

    return [plane, origin, dest, plane_day, route_day, at_request]


FEATURES = ["plane_delay", "flights", "route_delay", "busy", "weather", "excess"]


def plane_rows(number: int, seed: int = 0) -> pl.DataFrame:
    """The day's rows of `plane_day`: half of the planes, each day others."""
    random = np.random.default_rng([number, seed])
    ids = [f"N{plane}" for plane in range(PLANES) if plane % 2 == number % 2]
    return pl.DataFrame(
        {
            "plane_id": ids,
            "event_timestamp": [day(number + 1)] * len(ids),
            "created_timestamp": [day(number + 1)] * len(ids),
            "plane_delay": random.normal(size=len(ids)),
            "flights": random.integers(0, 9, len(ids)),
        },
        schema_overrides={"event_timestamp": UTC, "created_timestamp": UTC},
    )


def route_rows(number: int) -> pl.DataFrame:
    random = np.random.default_rng([number, 9])
    return pl.DataFrame(
        {
            "origin": ["JFK"] * ROUTES,
            "dest": [f"D{route}" for route in range(ROUTES)],
            "event_timestamp": [day(number + 1)] * ROUTES,
            "created_timestamp": [day(number + 1)] * ROUTES,
            "route_delay": [*random.normal(size=ROUTES - 1), None],
            "busy": random.integers(0, 2, ROUTES).astype(bool),
            "weather": [f"w{number}"] * ROUTES,
        },
        schema_overrides={"event_timestamp": UTC, "created_timestamp": UTC},
    )


def write_days(lake: Lake, days: int = DAYS) -> None:
    for number in range(days):
        lake.write(f"{MODEL}/features/plane_day/{day(number).date()}.parquet", plane_rows(number))
        lake.write(f"{MODEL}/features/route_day/{day(number).date()}.parquet", route_rows(number))


def asked(count: int = 200, at: dt.datetime | None = None) -> pl.DataFrame:
    """Rows to predict for: unknown entities among them, in no order, some twice."""
    random = np.random.default_rng(7)
    moments = [day(0) + dt.timedelta(minutes=int(m)) for m in random.integers(0, DAYS * 1440, count)]
    rows = pl.DataFrame(
        {
            "id": [f"row {n}" for n in range(count)],
            "plane_id": [f"N{plane}" for plane in random.integers(0, PLANES + 3, count)],
            "origin": ["JFK"] * count,
            "dest": [f"D{route}" for route in random.integers(0, ROUTES + 1, count)],
            "dep_delay": random.normal(size=count),
            "event_timestamp": moments if at is None else [at] * count,
            "late": [None, 1] * (count // 2),
        },
        schema_overrides={"event_timestamp": UTC},
    )
    return pl.concat([rows, rows.head(3)])


def expected(rows: pl.DataFrame) -> pl.DataFrame:
    """The same features by a plain ASOF join in Polars."""
    planes = pl.concat([plane_rows(number) for number in range(DAYS)]).sort("event_timestamp")
    routes = pl.concat([route_rows(number) for number in range(DAYS)]).sort("event_timestamp")
    answer = rows.with_row_index("row").sort("event_timestamp")
    answer = answer.join_asof(planes, on="event_timestamp", by="plane_id", tolerance="3d", suffix="_p", check_sortedness=False)
    answer = answer.join_asof(
        routes, on="event_timestamp", by=["origin", "dest"], tolerance="30d", suffix="_r", check_sortedness=False
    )
    return answer.sort("row").with_columns(excess=pl.col("dep_delay") - pl.col("route_delay")).select(FEATURES)


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(
        one[name] == other[name] or abs(one[name] - other[name]) < 1e-12
        for one, other in zip(left, right, strict=True)
        for name in FEATURES
    )


class StoreContract:
    def test_the_signature_is_in_the_services_order(self, store: FeastStore) -> None:
        made = store.apply(MODEL, feature_views)
        assert [name for name, _ in made.features] == FEATURES
        assert dict(made.features) == {
            "plane_delay": "float64",
            "flights": "int64",
            "route_delay": "float64",
            "busy": "bool",
            "weather": "string",
            "excess": "float64",
        }
        assert made.entities == ("plane_id", "origin", "dest")
        assert made.request == (("dep_delay", "float64"),)
        assert made.views == ("plane_day", "route_day")
        assert store.signature(MODEL) == made == store.apply(MODEL, feature_views)

    def test_online_equals_offline_after_materializing(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        assert store.materialize(MODEL, day(0), day(DAYS)) == {"plane_day": PLANES, "route_day": ROUTES}
        rows = asked(at=day(DAYS))
        offline = store.historical(MODEL, rows.to_arrow()).select(FEATURES).to_pylist()
        online = store.online(MODEL, rows.to_dicts())
        assert same(online, offline)
        assert same(online, expected(rows).to_dicts())
        assert any(row["plane_delay"] is None for row in online)
        assert sum(row["plane_delay"] is not None for row in online) > 150

    def test_historical_rows_keep_their_order_number_and_columns(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        rows = asked()
        found = store.historical(MODEL, rows.to_arrow())
        assert found["id"].to_pylist() == rows["id"].to_list()
        assert found.column_names == [*rows.columns, *FEATURES]
        assert same(found.select(FEATURES).to_pylist(), expected(rows).to_dicts())

    def test_an_older_day_never_replaces_a_newer_one_online(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        store.materialize(MODEL, day(0), day(DAYS))
        rows = asked(at=day(DAYS)).to_dicts()
        before = store.online(MODEL, rows)
        assert store.materialize(MODEL, day(0), day(2)) == {"plane_day": 0, "route_day": 0}
        assert store.online(MODEL, rows) == before

    def test_materializing_a_corrected_day_again_brings_the_correction(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        store.materialize(MODEL, day(0), day(DAYS))
        last = DAYS - 1
        corrected = plane_rows(last, seed=1)
        lake.write(f"{MODEL}/features/plane_day/{day(last).date()}.parquet", corrected)
        assert store.materialize(MODEL, day(last) + dt.timedelta(seconds=1), day(DAYS))["plane_day"] == PLANES // 2
        row = {
            "plane_id": corrected["plane_id"][0],
            "origin": "JFK",
            "dest": "D0",
            "dep_delay": 1.0,
            "event_timestamp": day(DAYS),
        }
        assert store.online(MODEL, [row])[0]["plane_delay"] == pytest.approx(corrected["plane_delay"][0])

    def test_pushed_rows_are_seen_at_once_and_old_ones_are_not(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        store.materialize(MODEL, day(0), day(DAYS))
        hour = day(DAYS) + dt.timedelta(hours=1)
        stream = (
            route_rows(0).with_columns(event_timestamp=pl.lit(hour).cast(UTC), weather=pl.lit("storm")).drop("created_timestamp")
        )
        earlier = stream.with_columns(event_timestamp=pl.lit(day(1)).cast(UTC), weather=pl.lit("past"))
        assert store.push(MODEL, "route_day", pl.concat([stream, earlier]).to_arrow()) == ROUTES
        assert store.push(MODEL, "route_day", earlier.to_arrow()) == 0
        row = {"plane_id": "N1", "origin": "JFK", "dest": "D2", "dep_delay": None, "event_timestamp": hour}
        assert store.online(MODEL, [row])[0]["weather"] == "storm"

    def test_an_empty_range_writes_nothing(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        assert store.materialize(MODEL, day(100), day(101)) == {"plane_day": 0, "route_day": 0}

    def test_a_view_that_is_taken_away_leaves_the_service(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        store.materialize(MODEL, day(0), day(DAYS))

        def fewer(source: Any) -> list[Any]:
            return [item for item in feature_views(source) if item.name in ("plane", "plane_day")]

        assert [name for name, _ in store.apply(MODEL, fewer).features] == ["plane_delay", "flights"]
        assert store.materialize(MODEL, day(0), day(DAYS)) == {"plane_day": PLANES}
        assert set(store.online(MODEL, [{"plane_id": "N1", "event_timestamp": day(DAYS)}])[0]) == {"plane_delay", "flights"}
        assert [name for name, _ in store.apply(MODEL, feature_views).features] == FEATURES
        row = {"plane_id": "N1", "origin": "JFK", "dest": "D2", "dep_delay": 1.0, "event_timestamp": day(DAYS)}
        assert store.online(MODEL, [row])[0]["weather"] is None

    def test_what_does_not_exist_is_named(self, store: FeastStore, lake: Lake) -> None:
        for ask in (
            lambda: store.signature("nobody"),
            lambda: store.online("nobody", [{}]),
            lambda: store.materialize("nobody", day(0), day(1)),
        ):
            with pytest.raises(NotFoundError, match="nobody"):
                ask()
        store.apply(MODEL, feature_views)
        with pytest.raises(NotFoundError, match=r"plane_dya.*plane_day"):
            store.push(MODEL, "plane_dya", plane_rows(0).to_arrow())

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            (None, "Return a list"),
            ([], "Return a list"),
            (["plane"], "is no Entity"),
        ],
    )
    def test_definitions_that_are_none_are_refused(self, store: FeastStore, made: Any, message: str) -> None:
        with pytest.raises(DeclarationError, match=message):
            store.apply(MODEL, lambda source: made)

    def test_two_views_with_one_feature_name_are_refused(self, store: FeastStore) -> None:
        def twice(source: Any) -> list[Any]:
            made = feature_views(source)
            made[4].features[0].name = "plane_delay"
            return made

        with pytest.raises(DeclarationError, match="plane_delay defined by two views"):
            store.apply(MODEL, twice)

    def test_unusable_entity_rows_are_refused(self, store: FeastStore, lake: Lake) -> None:
        write_days(lake)
        store.apply(MODEL, feature_views)
        rows = asked().to_arrow()
        with pytest.raises(DataError, match=r"no column event_timestamp"):
            store.historical(MODEL, rows.drop_columns("event_timestamp"))
        with pytest.raises(DataError, match=r"no column dest, dep_delay"):
            store.historical(MODEL, rows.drop_columns(["dest", "dep_delay"]))
        empty = pa.nulls(rows.num_rows, pa.timestamp("us", tz="UTC"))
        with pytest.raises(DataError, match=r"event_timestamp is null in 203 of 203"):
            store.historical(MODEL, rows.set_column(rows.column_names.index("event_timestamp"), "event_timestamp", empty))
        with pytest.raises(DataError, match="has no time zone"):
            store.materialize(MODEL, dt.datetime(2013, 1, 1), day(1))
        with pytest.raises(DataError, match="no column flights"):
            store.push(MODEL, "plane_day", plane_rows(0).drop("flights").to_arrow())
