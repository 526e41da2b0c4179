"""A correction, a quarantine or a killed run at any moment around another stage: what is made says truly what it was made of, or nothing is made.

The stages are the real ones on real files; a hook in a resource lets something else happen in their middle.
"""

import datetime as dt

import pytest

from mlops_dagster import reproduce
from mlops_dagster.assets import late_data
from mlops_dagster.assets.lake_paths import read_manifest
from mlops_dagster.core.errors import TerminalError
from mlops_dagster.lineage import origins, quarantine
from mlops_dagster.resources.data_versions.dvc import DvcVersions
from mlops_dagster.resources.feature_engine.duckdb_engine import DuckDBEngine
from mlops_dagster.resources.feature_store.feast_store import FeastStore
from tests.lifecycle.data_site import DAY, FIRST, LAST, PROJECT, RAW, Site


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARCELS_CSV", str(folder / "parcels.csv"))
        made = Site(folder)
        with made.instance:
            made.in_sync(FIRST)
            yield made


@pytest.fixture
def site(base):
    yield base
    base.in_sync()


@pytest.fixture
def once(monkeypatch):
    """Lets something happen once, before or after the first call of a method that a condition holds for."""

    def hook(owner, name, what, after=False, when=lambda *arguments: True):
        real, done = getattr(owner, name), []

        def hooked(self, *arguments, **named):
            now = not done and when(*arguments)
            if now:
                done.append(True)
            if now and not after:
                what()
            answer = real(self, *arguments, **named)
            if now and after:
                what()
            return answer

        monkeypatch.setattr(owner, name, hooked)
        return done

    return hook


def of_training_set(keys, message) -> bool:
    return "training set through" in message


MOMENTS = {
    "before the rows are read": None,
    "while features are joined": (FeastStore, "historical", False, lambda *_: True),
    "before the record is recorded": (DvcVersions, "record", False, of_training_set),
    "before the manifest says so": (DvcVersions, "record", True, of_training_set),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_correction_that_is_not_validated_yet_is_not_what_the_training_set_is_made_of_and_is_told(site, once, moment):
    used, hooked = site.raw(), MOMENTS[moment]
    if hooked is None:
        site.correct()
        done = [True]
    else:
        owner, name, after, when = hooked
        done = once(owner, name, site.correct, after, when)
    site.train()
    assert done
    assert site.raw() != used
    record = late_data.newest_record(site.spec, site.lake)
    assert (record.raw_data[RAW], record.other_raw_data) == (used, {})
    told = site.check()
    assert not told.passed
    assert f"{DAY} rows: {used[:8]} was used, it is {site.raw()[:8]} now" in told.description
    assert site.status() == "STALE"
    site.in_sync()
    site.train()
    assert late_data.newest_record(site.spec, site.lake).raw_data[RAW] == site.raw()
    assert site.check().passed, site.check().description
    assert site.status() == "FRESH"


def test_features_of_the_old_content_beside_rows_of_the_new_one_are_in_the_record(site):
    used = site.raw()
    new = site.correct("validated_data")
    site.train()
    record = late_data.newest_record(site.spec, site.lake)
    assert (record.raw_data[RAW], record.other_raw_data) == (new, {RAW: [used]})
    assert "was used by features" in site.check().description


def test_a_day_whose_validation_is_still_to_come_is_told_as_not_used(site):
    later = LAST + dt.timedelta(days=1)
    site.make("raw_data", first=later, last=later + dt.timedelta(days=1))
    site.make("validated_data", "features", first=later + dt.timedelta(days=1), last=later + dt.timedelta(days=1))
    site.train()
    told = site.check()
    assert not told.passed
    assert f"{later} rows: came later" in told.description
    site.make("validated_data", first=later, last=later)
    site.train()
    assert f"{later} rows: came later" in site.check().description, "the features of the day after it do not know it yet"
    site.make("features", first=later, last=later + dt.timedelta(days=1))
    site.train()
    assert site.check().passed, site.check().description


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda site: site.correct("validated_data", "features"), f"for example late_parcel/.*{DAY}.*materialize"),
        (
            lambda site: quarantine.impose(*_decision(site)),
            "quarantine of raw_data/2024-01-06 of late_parcel changed while|for example late_parcel/features",
        ),
    ],
)
def test_no_training_set_is_made_of_rows_that_change_while_they_are_read(site, once, change, words):
    site.train()
    before = read_manifest(site.lake, site.spec, "training_set")
    once(FeastStore, "historical", lambda: change(site))
    with pytest.raises(TerminalError, match=words):
        site.train()
    assert read_manifest(site.lake, site.spec, "training_set") == before
    if quarantine.days(site.lake, "late_parcel"):
        quarantine.lift(*_decision(site))


@pytest.mark.parametrize("stage", ["validated_data", "features"])
def test_nothing_is_made_of_files_whose_writer_was_killed_before_it_recorded_them(site, once, stage):
    site.correct(*(["validated_data"] if stage == "features" else []))

    def killed():
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DvcVersions, "record", lambda *_: killed())
        with pytest.raises(TerminalError, match="killed"):
            site.make(stage)
    with pytest.raises(TerminalError, match=rf"of a run that was killed .* materialize late_parcel/{stage} of these days again"):
        site.train()
    if stage == "validated_data":
        with pytest.raises(TerminalError, match="inputs of late_parcel/features changed while it was made, or are of a run"):
            site.make("features")
    site.in_sync()
    site.train()


def test_features_are_not_stored_where_a_day_was_taken_out_while_they_were_computed(site, once):
    keys = site.lake.list("late_parcel/features/")
    once(DuckDBEngine, "run_each", lambda: quarantine.impose(*_decision(site)), after=True)
    with pytest.raises(TerminalError, match=f"quarantine of raw_data/{DAY} of late_parcel changed while features were computed"):
        site.make("features", first=DAY, last=LAST)
    gone = {f"late_parcel/features/depot_record/{DAY + dt.timedelta(days=n)}.parquet" for n in range(3)}
    assert set(site.lake.list("late_parcel/features/")) == set(keys) - gone
    quarantine.lift(*_decision(site))


def test_features_are_not_stored_where_rows_changed_while_they_were_computed(site, once):
    file = f"late_parcel/features/depot_record/{DAY}.parquet"
    before = site.lake.read_bytes(file)
    once(DuckDBEngine, "run_each", lambda: site.correct("validated_data"), after=True)
    with pytest.raises(TerminalError, match=f"inputs of late_parcel/features changed while it was made.*{DAY}"):
        site.make("features")
    assert site.lake.read_bytes(file) == before


def test_a_version_is_reproduced_from_the_raw_data_that_it_used_not_from_that_of_its_revision(site, tmp_path):
    used, content = site.raw(), site.lake.read_bytes(RAW)
    site.correct()
    site.train()
    manifest = read_manifest(site.lake, site.spec, "training_set")
    evidence = {**manifest, "training_set_key": manifest["key"]}
    reproduce.restore(site.spec, PROJECT, evidence, site.lake, site.versions, manifest["dvc_commit"], tmp_path)
    assert origins.md5(content) == used
    assert (tmp_path / "lake" / RAW).read_bytes() == content


def _decision(site):
    decision = quarantine.Decision("ana", "the scale broke", dt.datetime(2024, 2, 1, tzinfo=dt.UTC))
    return site.spec, site.lake, site.versions, site.resources["ledger"], DAY, decision
