"""Bad data on its way through the stages: told with the file or the column and what to do, and nothing is made of it."""

import contextlib
import datetime as dt
import importlib
import threading
from types import SimpleNamespace

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.core.errors import TerminalError
from mlops_dagster.lineage import origins
from mlops_dagster.runs import Runner
from tests.lifecycle.data_site import DAY, FIRST, PROJECT, RAW, VALIDATED, Site

FEATURES = f"late_parcel/features/depot_record/{DAY}.parquet"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARCELS_CSV", str(folder / "parcels.csv"))
        made = Site(folder)
        with made.instance:
            made.in_sync(FIRST)
            made.train()
            yield made


@pytest.fixture
def site(base):
    """The site, whose partitions are afterwards as they were."""
    held = {key: base.lake.read_bytes(key) for key in (RAW, VALIDATED, *base.lake.list("late_parcel/features/"))}
    yield base
    for key, content in held.items():
        base.lake.write_bytes(key, content)
    base.versions.record([*held], "as it was")


@pytest.fixture
def source(monkeypatch):
    """Lets a function of the project give something else, until the end of the test or of a `with`."""

    def gives(change, module="source", name="read_day"):
        place = importlib.import_module(f"{PROJECT}.{module}")
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *arguments: change(real(*arguments)))
        return contextlib.closing(SimpleNamespace(close=monkeypatch.undo))

    return gives


@pytest.mark.parametrize(
    ("key", "stage"), [(RAW, "validated_data"), (VALIDATED, "features"), (VALIDATED, "training_set"), (FEATURES, "training_set")]
)
@pytest.mark.parametrize("cut", [0, 100])
def test_a_partition_that_is_empty_or_cut_short_is_named_and_nothing_is_made_of_it(site, key, stage, cut):
    before = {k: site.lake.read_bytes(k) for k in (VALIDATED, FEATURES, "late_parcel/training_set/current.json")}
    site.lake.write_bytes(key, site.lake.read_bytes(key)[:cut])
    with pytest.raises(TerminalError, match=rf"{key}.*(Write that partition|Materialize those partitions|write it) again"):
        site.train() if stage == "training_set" else site.make(stage)
    assert {k: site.lake.read_bytes(k) for k in before if k != key} == {k: v for k, v in before.items() if k != key}


def test_a_features_partition_that_is_gone_is_named(site):
    site.lake.delete(FEATURES)
    with pytest.raises(TerminalError, match=f"for example {FEATURES}.*materialize late_parcel/features of these days again"):
        site.train()


@pytest.mark.parametrize("column", ["depot", "depot_parcels"])
def test_sql_that_lacks_a_column_of_its_view_is_told_before_anything_is_stored(site, source, column):
    before = site.lake.read_bytes(FEATURES)
    source(lambda queries: {v: f"SELECT * EXCLUDE ({column}) FROM ({sql})" for v, sql in queries.items()}, "features", "compute")
    with pytest.raises(TerminalError, match=f"the SQL of view 'depot_record' lacks {column}, which features.define asks for"):
        site.make("features")
    assert site.lake.read_bytes(FEATURES) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.drop(columns="event_timestamp"), "columns_and_types.*event_timestamp: timestamp.* became absent"),
        (
            lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_localize(None)),
            r"tz=UTC\] became timestamp\[us\]",
        ),
        (
            lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_convert("Asia/Tokyo")),
            r"tz=UTC\] became timestamp\[us, tz=Asia/Tokyo\]",
        ),
        (lambda rows: rows.drop(columns="weight_kg"), "weight_kg: double became absent"),
    ],
)
def test_a_day_of_other_columns_or_another_zone_stops_at_raw_data(site, source, change, words):
    before = site.lake.read_bytes(VALIDATED)
    source(change)
    with pytest.raises(TerminalError, match=words):
        site.make("raw_data", "validated_data")
    assert site.lake.read_bytes(VALIDATED) == before


def test_sql_of_a_view_that_is_not_defined_is_told(site, source):
    source(lambda queries: {**queries, "other": queries["depot_record"]}, "features", "compute")
    with pytest.raises(TerminalError, match=r"features.compute makes \['depot_record', 'other'\], features.define defines"):
        site.make("features")
    assert site.lake.list("late_parcel/features/other/") == []


def test_rows_without_a_moment_make_no_training_set(site, source):
    source(lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].where(rows.index > 0)))
    site.make("raw_data", "validated_data")
    with pytest.raises(TerminalError, match=r"event_timestamp is null in 1 of \d+ rows. Give each one"):
        site.train()


def test_a_ttl_that_excludes_everything_keeps_every_row(site, source):
    def short(defined):
        defined[1].ttl = dt.timedelta(microseconds=1)
        return defined

    rows = read_manifest(site.lake, site.spec, "training_set")["rows"]
    with source(short, "features", "feature_views"):
        site.make("features")
        site.train()
    made = read_manifest(site.lake, site.spec, "training_set")
    table = site.lake.read(made["key"])
    assert made["rows"] == rows
    assert table["depot_late_share"].null_count == rows
    site.make("features")
    site.train()
    assert site.lake.read(read_manifest(site.lake, site.spec, "training_set")["key"])["depot_late_share"].null_count < rows


def test_a_source_in_another_zone_and_unsorted_gives_the_same_training_set(base, source, tmp_path):
    source(lambda rows: rows.assign(event_timestamp=rows["event_timestamp"].dt.tz_convert("Asia/Tokyo")).iloc[::-1])
    other = Site(tmp_path, base.csv)
    with other.instance:
        other.in_sync(FIRST)
        other.train()
    one, two = (s.lake.read(read_manifest(s.lake, s.spec, "training_set")["key"]) for s in (base, other))
    at = two.column_names.index("event_timestamp")
    two = two.set_column(at, "event_timestamp", two["event_timestamp"].cast(pa.timestamp("us", "UTC")))
    one, two = (table.sort_by("id").to_pandas() for table in (one, two))
    # The mean of a depot's weights in another order may differ in its last bit.
    pd.testing.assert_series_equal(one.pop("depot_weight"), two.pop("depot_weight"), rtol=1e-13)
    assert two.equals(one)


def test_two_runs_of_one_day_at_once_leave_files_that_are_whole_and_recorded(site):
    failed = []

    def ingest():
        with dg.DagsterInstance.ephemeral() as instance:
            try:
                Runner(site.defs, instance).run("late_parcel_ingest", days=(str(DAY), str(DAY)))
            except TerminalError as error:
                failed.append(str(error))

    runs = [threading.Thread(target=ingest) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(failed) < 2, failed
    assert all("changed while it was made" in text for text in failed), failed
    assert origins.differing(site.lake, site.versions.contents("late_parcel/")) == []
    site.train()


def test_older_days_made_again_are_compared_with_what_the_online_store_holds_now(site):
    """The newest day's values stay online, so that the offline ones are those as of its end."""
    only = [dg.AssetKey(["late_parcel", "features"])]
    result = site.runner.run("late_parcel_ingest", days=(str(FIRST), str(DAY)), only=only)
    checks = {c.check_name: c for c in result.get_asset_check_evaluations()}
    assert checks["online_equals_offline"].passed, checks["online_equals_offline"].description
    assert "6 entities" in str(checks["online_equals_offline"].description)
